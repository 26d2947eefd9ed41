"""LoRA: a student that is a frozen model and a few small matrices, the adapter, which alone are trained.

Where student and teacher are the same model, the frozen weights are there once and serve both: the teacher is the
student with its adapter switched off (`FrozenBase`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmdp_fast.errors import InputError, first_line

from ..settings.config import TrainConfig


def add_adapter(student: Any, config: TrainConfig) -> None:
    """Freezes a transformers model and puts a trainable adapter into it, in place.

    The adapter is float32 with a model of any dtype, depends on `config.seed` alone, and changes nothing before it is
    trained. Raises InputError if peft is missing, or if the model has no such modules or is not to have them changed.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("--lora-rank needs peft, which comes with the extra: pip install 'cmdp_fast[lora]'")
    from peft import LoraConfig

    names = list(config.lora_target)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        target_modules="all-linear" if names == ["all-linear"] else names,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            student.add_adapter(settings)
        except ValueError as error:
            raise InputError(f"--lora-target {' '.join(names)}: {first_line(error)}") from error
    for embedding in (student.get_input_embeddings(), student.get_output_embeddings()):
        if hasattr(embedding, "base_layer"):  # they may be one, and the head is read as it is (`cf.head_of`)
            raise InputError(f"--lora-target {' '.join(names)}: leave the embedding and the head out")
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapter(model: Any) -> bool:
    """Whether `add_adapter` has been here."""
    return hasattr(model, "peft_config")


def save_adapted(student: Any, folder: Path) -> None:
    """Saves a student with an adapter as a model that stands alone, the adapter merged into its weights, and in
    `folder/adapter` the adapter by itself, in peft's format.

    The weights in memory stay as they are: merging them and taking the adapter out again would round them.
    """
    with torch.device("meta"):
        shell = type(student)(student.config)  # knows how to save such a model, and has no weights
    shell.generation_config = student.generation_config
    shell.save_pretrained(folder, state_dict=merged_weights(student))
    student.save_pretrained(folder / "adapter")


@torch.no_grad()
def merged_weights(student: Any) -> dict[str, Tensor]:
    """The state dict, on the CPU and in the model's dtypes, of the model without adapter that computes the same."""
    weights = {}
    for name, weight in student.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = weight.cpu()
    for name, module in student.named_modules():
        if hasattr(module, "get_delta_weight"):
            frozen = weights[f"{name}.weight"]
            for adapter in module.active_adapters:
                delta = module.get_delta_weight(adapter).cpu()
                weights[f"{name}.weight"] = (frozen.float() + delta.float()).to(frozen.dtype)
    return weights


class FrozenBase(nn.Module):
    """A student with an adapter, as it is without: the teacher that needs no weights of its own.

    It is called like the model, and works where a model is sampled from or asked for hidden states. It has no
    parameters: they are the student's. Not for use while a graph through the student is being recorded.
    """

    def __init__(self, student: Any) -> None:
        super().__init__()
        self._shared = (student,)  # in a tuple, so that it is no submodule

    def get_base_model(self) -> Any:
        """The model inside, as `cf.head_of` and `cf.last_hidden_state` look for it."""
        return self._shared[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._adapter_off():
            return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._adapter_off():
            return self.get_base_model().generate(*args, **kwargs)

    def get_input_embeddings(self) -> Any:
        return self.get_base_model().get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.get_base_model().get_output_embeddings()

    @property
    def config(self) -> Any:
        return self.get_base_model().config

    @property
    def device(self) -> torch.device:
        return self.get_base_model().device

    @property
    def generation_config(self) -> Any:
        return self.get_base_model().generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.get_base_model().generation_config = value

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        self.get_base_model().disable_adapters()
        try:
            yield
        finally:
            self.get_base_model().enable_adapters()

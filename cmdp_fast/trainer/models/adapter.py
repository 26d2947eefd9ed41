"""LoRA: a student that is a frozen model and a few small matrices, the adapter, which alone are trained; beside them,
if asked for, copies of whole modules (`--lora-modules-to-save lm_head`).

Where student and teacher are the same model, the frozen weights are there once and serve both: the teacher is the
student with its adapter switched off (`FrozenBase`).
"""

from __future__ import annotations

import copy
import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmdp_fast import installation
from cmdp_fast.errors import InputError, first_line

from ..settings.config import TrainConfig


def add_adapter(student: Any, config: TrainConfig) -> None:
    """Freezes a transformers model and puts a trainable adapter into it, in place.

    The adapter and the copies of `lora_modules_to_save` are float32 with a model of any dtype; the adapter depends on
    `config.seed` alone, and neither changes anything before it is trained. Raises InputError if peft is missing, or if
    the model has no such modules or is not to have them changed.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"--lora-rank needs peft, which comes with the extra: {installation.extra('lora')}")
    from peft import LoraConfig

    names, whole = list(config.lora_target), list(config.lora_modules_to_save)
    _check_copied(student, names, whole)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        target_modules="all-linear" if names == ["all-linear"] else names,
        modules_to_save=whole or None,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(config.seed)
        # Tied weights of which a copy is trained are two from then on (`_unties`)
        warnings.filterwarnings("ignore", message=r"Model has `tie_word_embeddings=True`")
        try:
            student.add_adapter(settings)
        except (ValueError, TypeError) as error:
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


def save_adapted(student: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Saves a student with an adapter as a model that stands alone, the adapter merged into its weights, and in
    `folder/adapter` the adapter by itself, in peft's format.

    The merged model is float32 whatever the frozen weights are: bfloat16 would round most small changes away. The
    weights in memory stay as they are: merging them and taking the adapter out again would round them. `weights`
    where the student does not hold them all itself.
    """
    student = student if weights is None else whole_adapted(student, weights)
    shell = _shell(student, untied=_unties(student))
    shell.generation_config = student.generation_config
    shell.save_pretrained(folder, state_dict=merged_weights(student))
    student.save_pretrained(folder / "adapter")


@torch.no_grad()
def merged_weights(student: Any) -> dict[str, Tensor]:
    """The state dict, on the CPU and in float32, of the model without adapter that computes the same."""
    weights: dict[str, Tensor] = {}
    read: dict[int, Tensor] = {}  # by their place, so that weights that are tied stay one
    copied = _copied(student)
    for name, weight in student.state_dict().items():
        if ".lora_" in name:
            continue
        name = _without_adapter(name)
        for module, active in copied.items():
            if name.startswith(f"{module}.original_module."):
                name = ""  # its trained copy takes the place
            name = name.replace(f"{module}.modules_to_save.{active}.", f"{module}.")
        if name:
            whole = weight.cpu().float() if weight.is_floating_point() else weight.cpu()
            weights[name] = read.setdefault(weight.data_ptr(), whole)
    for name, module in student.named_modules():
        if hasattr(module, "get_delta_weight"):
            place = f"{_without_adapter(name)}.{getattr(module, 'parameter_name', 'weight')}"
            for adapter in module.active_adapters:
                weights[place] = weights[place] + module.get_delta_weight(adapter).cpu().float()
    return weights


def _without_adapter(name: str) -> str:
    """A name in the model without adapter. peft puts a layer around each that it adapts, and around experts, whose
    weights are parameters of one module, as many as it adapts of these."""
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name)


def _copied(student: Any) -> dict[str, str]:
    """The modules of which a copy is trained in full, each with the name of the adapter that the copy belongs to."""
    from peft.utils import ModulesToSaveWrapper

    modules = student.named_modules()
    return {name: m.active_adapters[0] for name, m in modules if isinstance(m, ModulesToSaveWrapper)}


def _check_copied(student: Any, adapted: list[str], whole: list[str]) -> None:
    """Raises InputError unless a copy of each of these modules can be trained, and saved as a part of the model."""
    option, untied = f"--lora-modules-to-save {' '.join(whole)}", False
    for name in whole:
        found = [module for path, module in student.named_modules() if path.endswith(name)]  # as peft
        if not found:
            raise InputError(f"{option}: {type(student).__name__} has no module of the name {name}")
        if name in adapted or any(list(module.children()) for module in found):
            raise InputError(f"{option}: {name} is not a single layer without an adapter")
        untied = untied or any(_is_tied(student) and module in _embeddings(student) for module in found)
    if untied and _is_tied(_shell(student, untied=True)):
        raise InputError(
            f"{option}: {type(student).__name__} ties its head to its embedding and cannot be saved with two of them"
        )


def _embeddings(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _is_tied(model: Any) -> bool:
    embedding, head = _embeddings(model)
    return embedding is not None and head is not None and embedding.weight is head.weight


def _unties(student: Any) -> bool:
    """Whether a copy is trained of the embedding or of the head that were one before: now they are two."""
    embeddings = [module for module in _embeddings(student) if module is not None]
    originals = {id(getattr(module, "original_module", module).weight) for module in embeddings}
    copied = any(hasattr(module, "original_module") for module in embeddings)
    return copied and len(originals) < len(embeddings)


def check_spread(student: Any) -> None:
    """Raises InputError for a student that FSDP cannot spread over processes: one weight in two of its groups."""
    if has_adapter(student) and _unties(student):
        raise InputError(
            f"--lora-modules-to-save does not work with FSDP where the model, {type(student).__name__}, ties its head "
            "to its embedding: leave it out, or use DDP"
        )


def whole_adapted(student: Any, weights: dict[str, Tensor]) -> Any:
    """A student like this one, adapter and all, with these weights: its own are spread over the processes."""
    model = _shell(student, untied=False)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Model has `tie_word_embeddings=True`")
        model.add_adapter(next(iter(student.peft_config.values())))
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = student.generation_config
    return model


def _shell(student: Any, untied: bool) -> Any:
    """A model without adapter and without numbers in its weights, which knows how to save those of the student."""
    config = copy.deepcopy(student.config)
    if untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):
        return type(student)(config)


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
        head = self.get_base_model().get_output_embeddings()
        return getattr(head, "original_module", head)  # not the copy that is trained

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
        self._switch(on=False)
        try:
            yield
        finally:
            self._switch(on=True)

    def _switch(self, on: bool) -> None:
        """transformers' `enable_adapters` leaves copies of whole modules off, up to 5.23 at least."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        for module in self.get_base_model().modules():
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
                module.enable_adapters(on)

"""Models without their files of weights: random numbers in the shapes that a configuration has (`--random-weights`).

All matrices of a model are pieces of one block, which is little larger than the largest of them: eight billion weights
take the memory of an embedding, and seconds. Each has its own shape and dtype, so parameters and bytes are counted as
those of the real model, and what is measured on an architecture (padding, what follows the head) is measured on this
one. It is no model to train or to sample: matrices overlap in the block.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from cmdp_fast.errors import InputError

PERIOD = 1_048_583  # random numbers that a block repeats; a prime, so that no two rows of a matrix are alike
STEP, PLACES = 64, 1009  # elements from one place where a matrix may begin to the next, aligned for kernels; how many


class RandomCausalLM:
    """Stands where `AutoModelForCausalLM` would read a model's weights."""

    @staticmethod
    def from_pretrained(name: str, *, trust_remote_code: bool, dtype: torch.dtype, **options: Any) -> Any:
        """The model of a folder's or hub id's configuration, with its generation settings where it has any."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        about = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):  # tables of rotations are buffers, and real
            model = AutoModelForCausalLM.from_config(about, trust_remote_code=trust_remote_code, dtype=dtype, **options)
        model.tie_weights()  # which the parameters' way to the meta device has undone
        fill(model, float(getattr(about.get_text_config(), "initializer_range", None) or 0.02))
        with suppress(OSError):  # of a model that has none
            model.generation_config = GenerationConfig.from_pretrained(name)
        return model


def check_plain(role: str, name: str, about: Any) -> None:
    """Raises InputError for a model whose files hold quantised weights: those made here would take another size."""
    if quantised := getattr(about, "quantization_config", None):
        kind = getattr(quantised, "quant_method", None) or dict(quantised).get("quant_method", "quantised")
        raise InputError(
            f"--random-weights: the weights of --{role} {name} are quantised ({kind}), and random ones would not be: "
            "--dry-run alone reads them"
        )


def fill(model: nn.Module, deviation: float) -> None:
    """Gives a model whose parameters are shapes alone random ones of this standard deviation, in place.

    The weights of norms are 1, or the layers would make next to nothing of what they read. Parameters that are one stay
    one.
    """
    shapes = list(model.parameters())
    blocks = {dtype: _block(shapes, dtype, deviation) for dtype in {shape.dtype for shape in shapes}}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, shape in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(shape) not in made:
                start = STEP * (7919 * len(made) % PLACES)
                numbers = blocks[shape.dtype][start : start + shape.numel()].view(shape.shape)
                if shape.dim() == 1 and name == "weight":
                    numbers = torch.ones_like(numbers)
                made[id(shape)] = nn.Parameter(numbers, requires_grad=shape.requires_grad)
            setattr(module, name, made[id(shape)])


def _block(shapes: list[nn.Parameter], dtype: torch.dtype, deviation: float) -> Tensor:
    size = max(shape.numel() for shape in shapes if shape.dtype == dtype) + STEP * PLACES
    numbers = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).mul_(deviation).to(dtype)
    return numbers.repeat(-(-size // PERIOD))

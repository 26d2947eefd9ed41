"""Models that padding would mislead, or the want of it.

Prompts of different length stand in one batch with padding in front, and a model has to read a prompt with padding as
it would without. With `--padding-free` completions stand in one row, and a model has to read each as it would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmdp_fast.errors import InputError
from cmdp_fast.heads import evaluating
from cmdp_fast.positions import moved_by_padding, packing_mixes
from cmdp_fast.reading import completion_logits

from .records.throughput import has_experts
from .rollout import Rollout, Sampling


def check_reading(
    models: Mapping[str, Any],
    outputs: Callable[[Any, Rollout], Tensor],
    sampling: Sampling,
    *,
    padding_free: bool,
    half: bool,
) -> None:
    """Raises InputError for one of the models, by its role, that would read prompts or completions wrongly.

    ``outputs`` reads a batch as it is read in training; ``half``: in the training's autocast, where this is called.
    Models without parameters, a student with its adapter off, are not asked. With FSDP every process must call it.
    """
    dtypes = [torch.bfloat16] if half else []
    for role, model in models.items():
        if next(model.parameters(), None) is None:
            continue
        with evaluating(model):
            if _misled_by_padding(model, sampling, dtypes):
                raise InputError(
                    f"the {role} cannot be used: {type(model).__name__} reads a prompt otherwise with padding in "
                    "front, and position_ids do not help; prompts of different length would be sampled wrongly"
                )
            if padding_free and _misled_by_packing(model, outputs, sampling, dtypes):
                raise InputError(
                    f"the {role} cannot be used with --padding-free: {type(model).__name__} mixes sequences that "
                    "stand in one row, and position_ids do not keep them apart"
                )


def _misled_by_padding(model: Any, sampling: Sampling, dtypes: Sequence[torch.dtype]) -> bool:
    """A prompt is read as it is when completions are sampled, with position_ids: those help where a model would count
    its positions from the padding on, and do not where padding changes its state, as with RWKV."""

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        first, real = ids.shape[1] - int(mask.sum()) + 1, mask.bool()  # all but the first token are a completion
        parts = (ids[:, :first], real[:, :first], ids[:, first:], real[:, first:])
        return completion_logits(model, Rollout(*parts, finished=real[:, -1]))

    return moved_by_padding(read, model, sampling.vocab_size, sampling.pad, dtypes)


def _misled_by_packing(
    model: Any, outputs: Callable[[Any, Rollout], Tensor], sampling: Sampling, dtypes: Sequence[torch.dtype]
) -> bool:
    def read(sequences: list[Tensor]) -> Sequence[Tensor]:
        # The outputs of all tokens but the last, which nobody reads, predict a completion behind one token
        ids = torch.cat([nn.functional.pad(one, (0, 1)) for one in sequences])
        real = torch.ones_like(ids, dtype=torch.bool)
        parts = (ids[:, :1], real[:, :1], ids[:, 1:], real[:, 1:])
        return list(outputs(model, Rollout(*parts, finished=real[:, -1])))

    return packing_mixes(read, model, sampling.vocab_size, experts=has_experts(model), dtypes=dtypes)

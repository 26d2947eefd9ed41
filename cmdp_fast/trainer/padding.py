"""Models that padding would mislead, or the want of it.

Prompts of different length stand in one batch with padding in front, and a model has to read a prompt with padding as
it would without. With `--padding-free` completions stand in one row, and a model has to read each as it would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmdp_fast.heads import evaluating
from cmdp_fast.positions import moved_by_padding, packing_mixes
from cmdp_fast.scoring import completion_logits

from .records.throughput import has_experts
from .rollout import Rollout


def misled_by_padding(
    models: Mapping[str, Any],
    vocab_size: int,
    pad: int,
    dtypes: Iterable[torch.dtype] = (),
) -> str:
    """What keeps one of the models, by its role, from being used, as an error says it; empty if nothing does.

    A prompt is read as it is when completions are sampled, with position_ids: those help where a model would count its
    positions from the padding on, and do not where padding changes its state, as with RWKV. Models without parameters,
    a student with its adapter off, are not asked. With FSDP every process must call it; under mixed precision, in the
    autocast of the training.
    """
    for role, model in models.items():
        if next(model.parameters(), None) is None:
            continue

        def read(ids: Tensor, mask: Tensor, model: Any = model) -> Tensor:
            first, real = ids.shape[1] - int(mask.sum()) + 1, mask.bool()  # all but the first token are a completion
            parts = (ids[:, :first], real[:, :first], ids[:, first:], real[:, first:])
            return completion_logits(model, Rollout(*parts, finished=real[:, -1]))

        with evaluating(model):
            if moved_by_padding(read, model, vocab_size, pad, dtypes):
                return (
                    f"the {role} cannot be used: {type(model).__name__} reads a prompt otherwise with padding in "
                    "front, and position_ids do not help; prompts of different length would be sampled "
                    "wrongly"
                )
    return ""


def misled_by_packing(
    models: Mapping[str, Any],
    outputs: Callable[[Any, Rollout], Tensor],
    vocab_size: int,
    dtypes: Iterable[torch.dtype] = (),
) -> str:
    """What keeps one of the models, by its role, from being used with `--padding-free`; empty if nothing does.

    ``outputs`` reads a batch in one row, as it is read in training. Not asked are the same models as in
    `misled_by_padding`. With FSDP every process must call it; under mixed precision, in the autocast of the training.
    """
    for role, model in models.items():
        if next(model.parameters(), None) is None:
            continue

        def read(sequences: list[Tensor], model: Any = model) -> Sequence[Tensor]:
            # The outputs of all tokens but the last, which nobody reads, predict a completion behind one token
            ids = torch.cat([nn.functional.pad(one, (0, 1)) for one in sequences])
            real = torch.ones_like(ids, dtype=torch.bool)
            parts = (ids[:, :1], real[:, :1], ids[:, 1:], real[:, 1:])
            return list(outputs(model, Rollout(*parts, finished=real[:, -1])))

        with evaluating(model):
            if packing_mixes(read, model, vocab_size, experts=has_experts(model), dtypes=dtypes):
                return (
                    f"the {role} cannot be used with --padding-free: {type(model).__name__} mixes sequences that "
                    "stand in one row, and position_ids do not keep them apart"
                )
    return ""

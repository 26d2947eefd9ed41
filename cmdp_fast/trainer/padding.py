"""Models that padding would mislead: prompts of different length stand in one batch with padding in front, and a model
has to read a prompt with padding as it would without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.heads import evaluating
from cmdp_fast.positions import moved_by_padding
from cmdp_fast.scoring import completion_logits

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

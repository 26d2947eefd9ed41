"""Which logits stay for the backward pass of `linear_token_stats`, in what dtype, and what a choice by memory takes."""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cmdp_fast.compiling import constant
from cmdp_fast.ops.free_memory import free_memory
from cmdp_fast.ops.workspace import pitch

_log = logging.getLogger("cmdp_fast")

Saved = Literal["recompute", "teacher", "tiles", "auto"]  # from what takes no memory to what saves both products
SHARE_OF_FREE = 2  # what "auto" keeps takes no more than this part of the free memory
_KEEPS = {"recompute": "no logits", "teacher": "the teacher's logits", "tiles": "both models' logits"}


class Logits(NamedTuple):
    """Both models' logits ``[rows, V or more]``, or ``[rows, 0]`` where they do not stay."""

    student: Tensor
    teacher: Tensor


class Dtypes(NamedTuple):
    """In what the logits that stay are kept."""

    student: torch.dtype  # of statistics
    teacher: torch.dtype  # the same; with the teacher's alone, that of the factors of their product


def dtypes_of(saved: str, computed: torch.dtype, teacher_factors: torch.dtype) -> Dtypes:
    """``computed``: the dtype of the statistics. ``teacher_factors``: of the teacher's product."""
    return Dtypes(computed, teacher_factors if saved == "teacher" else computed)


def room(saved: str, like: Tensor, rows: int, width: int, dtypes: Dtypes) -> Logits:
    """Room for the logits that stay. Rows are not compacted: their number would depend on data."""
    wide, none = pitch(width, like.device), 0
    widths = {"recompute": (none, none), "teacher": (none, wide), "tiles": (wide, wide)}[saved]
    return Logits(*(like.new_empty((rows, w), dtype=d) for w, d in zip(widths, dtypes, strict=True)))


def choose(device: torch.device, rows: int, width: int, dtypes: Dtypes) -> str:
    """What ``saved="auto"`` stands for: as much as takes no more than half of the free memory.

    ``dtypes``: of ``saved="teacher"``. ``recompute`` where the system does not tell how much is free. Says on the
    logger ``cmdp_fast`` (INFO) what is kept and why, when the choice on a device is another than before.
    """
    limit = _memory_for_logits(device)
    numbers = rows * width
    if 2 * numbers * dtypes.student.itemsize <= limit:
        chosen = "tiles"
    elif numbers * dtypes.teacher.itemsize <= limit:
        chosen = "teacher"
    else:
        chosen = "recompute"
    _say(chosen, device, limit)
    return chosen


# A graph asks and says while it is made; its sizes may be symbols, with which neither can be called.


@constant
def _memory_for_logits(device: torch.device) -> int:
    free = free_memory(device)
    return -1 if free is None else free // SHARE_OF_FREE


@constant
def _say(chosen: str, device: torch.device, limit: int) -> None:
    if _said.get(device) != chosen:
        _said[device] = chosen
        room = f"{limit / 1e9:.3g} GB, half of what is free, is for logits" if limit >= 0 else "free memory is unknown"
        what = _KEEPS[chosen]
        _log.info('linear_token_stats(saved="auto") keeps %s for the backward pass on %s: %s', what, device, room)


_said: dict[torch.device, str] = {}

"""Which logits stay for the backward pass of `linear_token_stats`, in what dtype, and what a choice by memory takes."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast.ops.free_memory import free_memory
from cmdp_fast.ops.workspace import pitch

_log = logging.getLogger("cmdp_fast")

SAVED = ("recompute", "teacher", "tiles")  # from what takes no memory to what saves both products
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


@torch.compiler.assume_constant_result  # a graph asks while it is made
def choose(device: torch.device, rows: int, width: int, computed: torch.dtype, teacher_factors: torch.dtype) -> str:
    """What ``saved="auto"`` stands for: as much as takes no more than half of the free memory.

    ``recompute`` where the system does not tell how much is free. Says on the logger ``cmdp_fast`` (INFO) what is kept
    and why, when the choice on a device is another than before.
    """
    free = free_memory(device)
    numbers = rows * width
    sizes = {"tiles": 2 * numbers * computed.itemsize, "teacher": numbers * teacher_factors.itemsize}
    limit = 0 if free is None else free // SHARE_OF_FREE
    chosen = "recompute"
    for saved, size in sizes.items():
        if size <= limit:
            chosen = saved
            break
    if _said.get(device) != chosen:
        _said[device] = chosen
        known = "an unknown number of bytes is" if free is None else f"{_gigabytes(free)} are"
        _log.info(
            'linear_token_stats(saved="auto") keeps %s of %d rows x %d columns for the backward pass: %s free on %s, '
            "of which it takes up to half; both models' would take %s, the teacher's %s",
            _KEEPS[chosen],
            rows,
            width,
            known,
            device,
            _gigabytes(sizes["tiles"]),
            _gigabytes(sizes["teacher"]),
        )
    return chosen


_said: dict[torch.device, str] = {}


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"

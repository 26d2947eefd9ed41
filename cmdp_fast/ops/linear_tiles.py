"""Rows of hidden states and heads as `linear_token_stats` goes through them: which rows count, and in what tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast.ops import kept_logits
from cmdp_fast.ops.gemm import HALVES
from cmdp_fast.ops.kept_logits import Dtypes, Logits
from cmdp_fast.ops.projection import Factors, Projection, factors_dtype
from cmdp_fast.ops.tile_size import tile_shape
from cmdp_fast.reference import compute_dtype


class Batch(NamedTuple):
    """Rows of both models, in all that forward and backward pass need alike."""

    student: Factors
    teacher: Factors
    tokens: Tensor
    mask: Tensor | None
    temperature: float
    width: int  # columns here that count
    first_column: int
    autocast: str  # as gemm.autocast_dtype gives it
    saved: str  # one of kept_logits.SAVED
    backend: str


def computed_dtype(student: Factors, teacher: Factors) -> torch.dtype:
    """The dtype of the statistics."""
    return compute_dtype(student.hidden, student.head.weight, teacher.hidden, teacher.head.weight)


def room_for_logits(batch: Batch) -> Logits:
    """Room for the logits that stay for the backward pass."""
    return kept_logits.room(batch.saved, batch.student.hidden, batch.tokens.numel(), batch.width, kept_dtypes(batch))


def kept_dtypes(batch: Batch) -> Dtypes:
    computed = computed_dtype(batch.student, batch.teacher)
    return kept_logits.dtypes_of(batch.saved, computed, factors_dtype(batch.teacher, computed, batch.autocast))


class Tiles:
    """Both heads over the rows that count, and how they are cut into tiles."""

    def __init__(self, batch: Batch, logits: Logits, known: bool = False) -> None:
        """``logits``: those that stay, if they do; ``known``: they stand there."""
        tokens, mask, width = batch.tokens, batch.mask, batch.width
        self.counted = None if mask is None else mask.flatten().nonzero()[:, 0]
        self.shape = tokens.shape
        self.tokens = self.compact(tokens).long().contiguous()
        computed = computed_dtype(batch.student, batch.teacher)
        self.student, self.teacher = (
            Projection(
                self._of_these_rows(model, width),
                factors_dtype(model, computed, batch.autocast),
                kept if kept.shape[1] else None,
                known,
            )
            for model, kept in zip((batch.student, batch.teacher), logits, strict=True)
        )
        pair = self.student.dtype.itemsize + self.teacher.dtype.itemsize
        count = len(self.tokens)
        height, breadth = tile_shape(count, width, pair, tokens.device, self._column_bytes())
        self.rows = [slice(i, min(i + height, count)) for i in range(0, count, height)]
        self.columns = [slice(i, min(i + breadth, width)) for i in range(0, width, breadth)]

    def _column_bytes(self) -> int:
        """What both passes hold for every column of a tile beside the logits, so that their tiles are the same."""
        hidden = self.student.hidden
        in_float32 = 4 * hidden.shape[1] if hidden.dtype in HALVES else 0  # the head's gradient before it is rounded
        return self.student.column_bytes + self.teacher.column_bytes + in_float32

    def _of_these_rows(self, model: Factors, width: int) -> Factors:
        return Factors(self.compact(model.hidden, 1), model.head._replace(weight=model.head.weight[:width]))

    def compact(self, value: Tensor, trailing: int = 0) -> Tensor:
        """``[..., *]`` to ``[rows that count, *]``, the last ``trailing`` axes as they are."""
        rows = value.reshape((self.shape.numel(), *value.shape[value.dim() - trailing :]))
        return rows if self.counted is None else rows[self.counted]

    def spread(self, value: Tensor) -> Tensor:
        """``[rows that count, *]`` to ``[..., *]``, zero elsewhere."""
        if self.counted is not None:
            value = value.new_zeros(self.shape.numel(), *value.shape[1:]).index_copy_(0, self.counted, value)
        return value.reshape((*self.shape, *value.shape[1:]))

"""Rows of hidden states and heads as the `linear_*` operations go through them: which rows count, in what tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast.ops import kept_logits
from cmdp_fast.ops.gemm import HALVES
from cmdp_fast.ops.kept_logits import Dtypes, Logits
from cmdp_fast.ops.projection import Factors, Projection, factors_dtypes
from cmdp_fast.ops.tile_size import tile_shape, whole_rows
from cmdp_fast.reference import compute_dtype


class Rows(NamedTuple):
    """Rows of both models, in all that their tiles depend on."""

    student: Factors
    teacher: Factors
    mask: Tensor | None
    width: int  # columns here that count
    autocast: str  # as gemm.autocast_dtype gives it


class StudentRows(NamedTuple):
    """Rows of the student by itself, in all that their tiles depend on."""

    student: Factors
    mask: Tensor | None
    width: int  # columns that count
    autocast: str  # as gemm.autocast_dtype gives it


class Batch(NamedTuple):
    """Rows of both models, in all that forward and backward pass of token statistics need alike."""

    student: Factors
    teacher: Factors
    tokens: Tensor
    mask: Tensor | None
    temperature: float
    width: int  # columns here that count
    first_column: int
    autocast: str  # as gemm.autocast_dtype gives it
    saved: str  # one of kept_logits.Saved
    backend: str

    @property
    def rows(self) -> Rows:
        return Rows(self.student, self.teacher, self.mask, self.width, self.autocast)


def computed_dtype(student: Factors, teacher: Factors) -> torch.dtype:
    """The dtype of the statistics."""
    return compute_dtype(student.hidden, student.head.weight, teacher.hidden, teacher.head.weight)


def room_for_logits(batch: Batch) -> Logits:
    """Room for the logits that stay for the backward pass."""
    return kept_logits.room(batch.saved, batch.student.hidden, batch.tokens.numel(), batch.width, kept_dtypes(batch))


def kept_dtypes(batch: Batch) -> Dtypes:
    computed = computed_dtype(batch.student, batch.teacher)
    return kept_logits.dtypes_of(
        batch.saved, computed, factors_dtypes(batch.teacher, computed, batch.autocast).multiplied
    )


class Tiles:
    """The heads over the rows that count, and how they are cut into tiles. A student by itself is its own teacher."""

    def __init__(self, given: Rows | StudentRows, logits: Logits | None = None, known: bool = False) -> None:
        """``logits``: those that stay, if they do; ``known``: they stand there."""
        mask, self.width = given.mask, given.width
        self.counted = None if mask is None else mask.flatten().nonzero()[:, 0]
        self.shape = given.student.hidden.shape[:-1]
        models = (given.student,) if isinstance(given, StudentRows) else (given.student, given.teacher)
        computed = compute_dtype(*(t for model in models for t in (model.hidden, model.head.weight)))
        self._heads = [
            Projection(
                self._of_these_rows(model),
                factors_dtypes(model, computed, given.autocast),
                kept if kept is not None and kept.shape[1] else None,
                known,
            )
            for model, kept in zip(models, logits or [None] * len(models), strict=True)
        ]
        self.student, self.teacher = self._heads[0], self._heads[-1]
        self.count = len(self.student.hidden)  # rows that count
        self._pair = sum(head.dtype.itemsize for head in self._heads)
        device = self.student.hidden.device
        height, breadth = tile_shape(self.count, self.width, self._pair, device, self._column_bytes())
        self.rows = _cut(self.count, height)
        self.columns = _cut(self.width, breadth)

    def whole_rows(self) -> list[slice]:
        """Rows that are made at once where all of their columns are wanted."""
        return _cut(self.count, whole_rows(self.count, self.width, self._pair, self.student.hidden.device))

    def _column_bytes(self) -> int:
        """What both passes hold for every column of a tile beside the logits, so that their tiles are the same."""
        hidden = self.student.hidden
        in_float32 = 4 * hidden.shape[1] if hidden.dtype in HALVES else 0  # the head's gradient before it is rounded
        return sum(head.column_bytes for head in self._heads) + in_float32

    def _of_these_rows(self, model: Factors) -> Factors:
        return Factors(self.compact(model.hidden, 1), model.head._replace(weight=model.head.weight[: self.width]))

    def compact(self, value: Tensor, trailing: int = 0) -> Tensor:
        """``[..., *]`` to ``[rows that count, *]``, the last ``trailing`` axes as they are."""
        rows = value.reshape((self.shape.numel(), *value.shape[value.dim() - trailing :]))
        return rows if self.counted is None else rows[self.counted]

    def spread(self, value: Tensor) -> Tensor:
        """``[rows that count, *]`` to ``[..., *]``, zero elsewhere."""
        if self.counted is not None:
            value = value.new_zeros(self.shape.numel(), *value.shape[1:]).index_copy_(0, self.counted, value)
        return value.reshape((*self.shape, *value.shape[1:]))


def _cut(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]

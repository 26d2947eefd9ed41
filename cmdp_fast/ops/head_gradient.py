"""Sums the gradients of a head and of its hidden states over tiles of that of the logits, in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast.cpu import in_huge_pages
from cmdp_fast.ops import gemm
from cmdp_fast.ops.linear_tiles import Tiles
from cmdp_fast.ops.projection import Factors, Projection
from cmdp_fast.ops.workspace import Workspace

PARTS = ("hidden", "head_weight", "head_bias")  # of the student's `Factors`, as an operator names them


class Needed(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """An empty tensor for one that is not asked for."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


class Tile(NamedTuple):
    """Some rows and columns of both models, and where the gradient of the student's logits goes."""

    student: Tensor  # logits [R, C]
    teacher: Tensor
    out: Tensor  # [R, C]
    rows: slice
    columns: slice


class HeadGradient:
    """``hidden [rows, H]``, ``weight [V, H]`` and ``bias [V]``; an empty tensor for what is not needed.

    The head's gradient is complete once all rows of its columns have been added, so that only the selected piece of it
    is kept in float32 beside the result, and none where the head itself is float32.
    """

    def __init__(self, head: Projection, weight: Tensor, needed: Needed) -> None:
        """``weight`` is the whole head, ``head`` may stop at the last column that counts."""
        self.head, self.workspace = head, Workspace(weight.device)
        self.dtype = torch.promote_types(head.hidden.dtype, torch.float32)
        columns, device = len(head.weight), weight.device
        self.needs_hidden, self.needs_weight, self.needs_bias = needed
        self.hidden, self.weight, self.bias = (torch.empty(0, device=device) for _ in range(3))
        if self.needs_hidden:
            self.hidden = torch.zeros(head.hidden.shape, dtype=self.dtype, device=device)
        if self.needs_weight:
            self.weight = in_huge_pages(torch.empty(weight.shape, dtype=weight.dtype, device=device))
            self.weight[columns if len(head.hidden) else 0 :] = 0
        if self.needs_bias:
            self.bias = torch.zeros(len(weight), dtype=self.dtype, device=device)

    def add(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        """Adds a tile of the gradient of hidden W^T + bias, in the factors' dtype; the head's selected columns are
        ``columns``."""
        hidden = self.head.hidden[rows]
        if self.needs_hidden:
            gemm.accumulate(self.hidden[rows], gradient, self.head.piece, self.workspace)
        if self.needs_weight:
            gemm.accumulate(self._piece(columns), gradient.t(), hidden, self.workspace, fresh=rows.start == 0)
        if self.needs_bias:
            self.bias[columns] += gradient.sum(0, dtype=self.dtype)

    def leave(self, columns: slice) -> None:
        """All rows of these columns have been added. Where there are none, nothing has been: the zeros stay."""
        if self.needs_weight and self.weight.dtype != self.dtype and len(self.head.hidden):
            self.weight[columns] = self._piece(columns)

    def _piece(self, columns: slice) -> Tensor:
        target = self.weight[columns]
        if target.dtype == self.dtype:
            return target
        return self.workspace.matrix("piece", target.shape, self.dtype)


def sum_over_tiles(
    tiles: Tiles, weight: Tensor, needed: Needed, write: Callable[[Tile], None], *, alone: bool = False
) -> HeadGradient:
    """The sums, where ``write`` writes the gradient of a tile of the logits, times the student's `upstream_scale`.

    ``weight``: the student's whole head. ``alone``: the teacher's logits are not read, and need not be made.
    """
    student, teacher = tiles.student, tiles.teacher
    gradient = HeadGradient(student, weight, needed)
    for columns in tiles.columns:
        student.select(columns)
        if not alone:
            teacher.select(columns)
        for rows in tiles.rows:
            x = student.logits(rows)
            y = x if alone else teacher.logits(rows)
            out = student.gradient_tile(x)
            write(Tile(x, y, out, rows, columns))
            gradient.add(student.chain(out, x), rows, columns)
        gradient.leave(columns)
    return gradient


def finished(gradient: HeadGradient, tiles: Tiles, student: Factors) -> Gradients:
    """The sums in the shapes and dtypes of what they are gradients of."""
    hidden, bias = student.hidden, student.head.bias
    return Gradients(
        tiles.spread(gradient.hidden).to(hidden.dtype) if gradient.needs_hidden else gradient.hidden,
        gradient.weight,
        gradient.bias if bias is None else gradient.bias.to(bias.dtype),
    )


def by_name(student: str, asked: set[str], backward: Callable[[Needed], Gradients]) -> dict[str, Tensor]:
    """The gradients that are ``asked`` for, under the names of an operator's arguments; ``student``: what the names of
    the student's begin with."""
    names = [f"{student}_{part}" for part in PARTS]
    needed = Needed(*(name in asked for name in names))
    if not any(needed):
        return {}
    gradients = zip(names, backward(needed), needed, strict=True)
    return {name: gradient for name, gradient, needs in gradients if needs}


def room(student: Factors, needed: Needed) -> Gradients:
    """As much of it as there is before anything is computed: shapes and dtypes."""
    hidden, head = student
    parts = zip((hidden, head.weight, head.bias), needed, strict=True)
    return Gradients(*(t.new_empty(t.shape) if n and t is not None else hidden.new_empty(0) for t, n in parts))

"""A language-model head whose logits are made a tile at a time and thrown away.

    logits = capped(scale * (hidden W^T + bias)),    capped(l) = softcap * tanh(l / softcap), or l without a softcap.

The order is that of the models in transformers: right after the head Cohere multiplies by its scale and Granite divides
by its own, and Gemma 2 and 3 cap what the head gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from cmdp_fast import checks
from cmdp_fast.heads import Head
from cmdp_fast.ops import gemm
from cmdp_fast.ops.gemm import FactorDtypes
from cmdp_fast.ops.workspace import Workspace


class StudentHeadSettings(TypedDict, total=False):
    """What belongs to the student's bare head weight, as keywords; a `Head` brings it."""

    student_bias: Tensor | None
    student_softcap: float | None
    student_scale: float


class HeadSettings(StudentHeadSettings, total=False):
    """What belongs to both models' bare head weights, as keywords; a `Head` brings it."""

    teacher_bias: Tensor | None
    teacher_softcap: float | None
    teacher_scale: float


def head_given(name: str, weight: Tensor | Head, settings: Mapping[str, Any]) -> Head:
    """The head of the model called ``student`` or ``teacher``, given whole or as a weight and keywords.

    Raises TypeError for a `Head` with a keyword that repeats one of its fields.
    """
    own = {field: settings[f"{name}_{field}"] for field in Head._fields if f"{name}_{field}" in settings}
    if not isinstance(weight, Head):
        return Head(weight, **own)
    if own:
        repeated = ", ".join(f"{name}_{field}" for field in own)
        raise TypeError(f"{name}_weight is a Head, which brings its own; {repeated} must not be given as well")
    return weight


class Factors(NamedTuple):
    """The two factors of a model's logits: hidden states and the head that reads them."""

    hidden: Tensor  # [..., H]
    head: Head  # weight [V, H], bias [V]

    def settled(self) -> Factors:
        """With the numbers that an operator takes: a scale of 2 is 2.0."""
        weight, bias, softcap, scale = self.head
        return Factors(self.hidden, Head(weight, bias, softcap, float(scale)))

    def detached(self) -> Factors:
        """Without a gradient."""
        weight, bias, softcap, scale = self.head
        return Factors(
            self.hidden.detach(), Head(weight.detach(), None if bias is None else bias.detach(), softcap, scale)
        )


class Projection:
    """A model's logits by the tile, in memory that is used again; the hidden states are ``[rows, H]``."""

    def __init__(self, model: Factors, factors: FactorDtypes, kept: Tensor | None = None, known: bool = False) -> None:
        """``factors``: what hidden states and head are rounded to and multiplied in, `factors_dtypes`.

        ``kept [rows, V or more]``: where the logits stay, if they are to, in their dtype or in that of the factors;
        ``known``: they stand there.
        """
        hidden, (self.weight, self.bias, self.softcap, self.scale) = model
        self.rounded = factors.rounded
        self.hidden = hidden.to(factors.rounded).to(factors.multiplied)
        self.dtype = gemm.output_dtype(factors.multiplied, hidden.device)
        self.workspace = Workspace(hidden.device)
        self.kept, self.known = kept, known
        self.plain = self.bias is None and self.softcap is None and self.scale == 1.0
        self.columns = slice(0)
        self._piece: Tensor | None = None

    @property
    def upstream_scale(self) -> float:
        """What the gradient that arrives is multiplied by in place of the scale of a head in half precision.

        The gradient of its logits is rounded once, where the kernel writes it. Scaled afterwards it would be rounded
        twice.
        """
        return self.scale if self.softcap is None and self.hidden.dtype in gemm.HALVES else 1.0

    @property
    def column_bytes(self) -> int:
        """What a column of a tile takes beside the logits: the head's piece, where it is converted."""
        converted = self.weight.dtype != self.hidden.dtype
        return self.hidden.shape[1] * self.hidden.element_size() if converted else 0

    def select(self, columns: slice) -> None:
        """Which columns of the vocabulary `logits` gives."""
        self.columns = columns
        self._piece = None

    @property
    def piece(self) -> Tensor:
        """The selected columns' piece of the head, ``[C, H]``, converted if need be."""
        if self._piece is None:
            piece = self.weight[self.columns]
            for dtype in (self.rounded, self.hidden.dtype):
                if piece.dtype != dtype:
                    piece = self._memory("piece", piece, dtype).copy_(piece)
            self._piece = piece
        return self._piece

    def logits(self, rows: slice) -> Tensor:
        """The tile ``[R, C]`` of some rows and the selected columns. It lives until the next call, or stays."""
        place = None if self.kept is None else self.kept[rows, self.columns]
        if place is not None and self.known:
            return place
        hidden, head = self.hidden[rows], self.piece.t()
        # A product that is the logits may be rounded to the factors' dtype where it is written.
        here = () if place is None else (self.dtype, hidden.dtype) if self.plain else (self.dtype,)
        if place is not None and place.dtype in here:
            tile = place
        else:
            tile = self.workspace.matrix("logits", (len(hidden), head.shape[1]), self.dtype)
        self._write(hidden, head, tile)
        return tile if place is None or place is tile else place.copy_(tile)

    def whole(self, rows: slice, pieces: Sequence[slice]) -> Tensor:
        """The logits ``[R, V]`` of some rows, made a piece of the columns at a time. They live until the next call."""
        tile = self.workspace.matrix("whole rows", (rows.stop - rows.start, pieces[-1].stop), self.dtype)
        for columns in pieces:
            self.select(columns)
            self._write(self.hidden[rows], self.piece.t(), tile[:, columns])
        return tile

    def _write(self, hidden: Tensor, head: Tensor, tile: Tensor) -> None:
        """The logits of the selected columns; ``head [H, C]`` is their piece."""
        gemm.multiply(hidden, head, out=tile)
        if self.bias is not None:
            tile.add_(self.bias[self.columns])
        if self.softcap is not None:
            tile.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        elif self.scale != 1.0:
            tile.mul_(self.scale)

    def gradient_tile(self, logits: Tensor) -> Tensor:
        """Where the gradient of the logits goes: over the logits, unless they stay, `chain` needs them, or it is
        narrower than they are."""
        if self.softcap is not None:
            return self._memory("gradient", logits, logits.dtype)
        in_place = self.kept is None and logits.dtype == self.hidden.dtype
        return logits if in_place else self._memory("gradient", logits, self.hidden.dtype)

    def chain(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of hidden W^T + bias, in the factors' dtype, from that of the logits, which `upstream_scale`
        has scaled. Overwrites the gradient, and logits that are not to stay."""
        if self.softcap is None:
            return gradient if self.scale == self.upstream_scale else gradient.mul_(self.scale)
        inner = logits if self.kept is None else self._memory("inner", logits, logits.dtype).copy_(logits)
        inner.mul_(1 / self.softcap)
        inner.square_().neg_().add_(1.0).mul_(self.scale)
        if gradient.dtype == self.hidden.dtype:
            return gradient.mul_(inner)
        return torch.mul(gradient, inner, out=self._memory("narrow gradient", logits, self.hidden.dtype))

    def _memory(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        return self.workspace.matrix(name, like.shape, dtype)


def factors_dtypes(model: Factors, computed: torch.dtype, autocast: str) -> FactorDtypes:
    """What a model's hidden states and head are rounded to and multiplied in.

    ``computed``: the dtype of the statistics. If it is float64 both models are projected in float64.
    """
    if computed == torch.float64:
        return FactorDtypes(computed, computed)
    return gemm.factor_dtypes(model.hidden, model.head.weight, autocast)


def check(student: Factors, teacher: Factors) -> None:
    """Checks the hidden states and heads of both models."""
    check_model("student", student)
    check_model("teacher", teacher)
    x, y = student.hidden, teacher.hidden
    checks.same_device("teacher_hidden", y, "student_hidden", x)
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            "student_hidden and teacher_hidden must agree in all but the last axis, got "
            f"{list(x.shape)} and {list(y.shape)}"
        )


def common_width(student_width: int, teacher_width: int, vocab_size: int | None) -> int:
    """How many columns two heads are compared in, where each is whole."""
    check_widths(student_width, teacher_width, vocab_size)
    width = min(student_width, teacher_width) if vocab_size is None else vocab_size
    checks.prefix(width, student_width, teacher_width)
    return width


def check_widths(student_width: int, teacher_width: int, vocab_size: int | None) -> None:
    """Checks that heads of different width come with a number of columns to compare."""
    if vocab_size is None and student_width != teacher_width:
        raise ValueError(
            f"the student is {student_width} wide and the teacher {teacher_width}; "
            "pass vocab_size= to compare them over a common prefix"
        )


def check_model(name: str, model: Factors) -> None:
    """Checks the arguments of a model called ``student`` or ``teacher``."""
    hidden, (weight, bias, softcap, scale) = model
    given = [(f"{name}_hidden", hidden), (f"{name}_weight", weight)]
    if bias is not None:
        given.append((f"{name}_bias", bias))
    for argument, value in given:
        checks.tensor(argument, value)
        if value.dtype not in checks.LOGIT_DTYPES:
            raise TypeError(f"{argument} must be float32, bfloat16, float16 or float64, got {checks.describe(value)}")
        checks.same_device(argument, value, f"{name}_hidden", hidden)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(
            f"{name}_hidden [..., H] and {name}_weight [V, H] must agree in H, got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}_bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    checks.number(f"{name}_scale", scale)
    if scale == 0 or not -math.inf < scale < math.inf:
        raise ValueError(f"{name}_scale must be finite and not 0, got {scale}")
    if softcap is not None:
        checks.positive(f"{name}_softcap", softcap)

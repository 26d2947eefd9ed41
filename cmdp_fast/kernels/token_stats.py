"""Statistics, forward: all six values and the saved scalars from one read of both rows.

Why memory is read once: the state of `csrc/token_state.h` streams. Each lane (one thread) keeps the state of the
columns it has seen, so that the loop (`cmdp_fast.kernels.fold`) needs neither a barrier nor a shuffle. Lanes are merged
once, at the end.
Why it is exact: a state is exact relative to any finite reference, and merging is associative and commutative.

A row is split into segments, one program each; the number of segments depends on V alone. `finish_kernel` merges their
states in a fixed order. The same row therefore gives bitwise the same result in every batch and every run.

The loop takes logits as a language model says them. -inf, NaN, infinities or an abyss such as finfo.min show up as a
sum that is not finite (0 · inf); the program then folds its segment again, carefully.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import finish, launch
from cmdp_fast.kernels.finish import finish_rows
from cmdp_fast.kernels.fold import fold
from cmdp_fast.kernels.shared import (
    LN2,
    PER_NAT,
    STATE_FIELDS,
    excluded,
    finite,
    locate,
    merged,
    natural,
)
from cmdp_fast.layout import empty_statistics


@triton.jit
def top_of(row, start, stop, LANES: tl.constexpr):
    """The maximum of columns [start, stop); 0 if there is none that is finite."""
    columns = tl.arange(0, LANES)
    best = tl.full([LANES], float("-inf"), tl.float32)
    for at in range(start, stop, LANES):
        best = tl.maximum(
            best, tl.load(row + at + columns, mask=at + columns < stop, other=float("-inf")).to(tl.float32)
        )
    top = tl.max(best, 0)
    return tl.where(finite(top), top, 0.0)


@triton.jit
def fold_carefully(x_row, y_row, start, stop, scale, LANES: tl.constexpr):
    """As `fold`, but in nats and every special value included: differences in double, in which those of any two logits
    are finite and those of equal ones 0; 0 · anything = 0; a or b is +inf where only the student (only the teacher)
    uses a column.

    A column a step: this is rare, and the registers it takes count against the main loop too."""
    columns = tl.arange(0, LANES)
    factor = natural(scale)
    m = top_of(x_row, start, stop, LANES).to(tl.float64) * factor
    n = top_of(y_row, start, stop, LANES).to(tl.float64) * factor
    z = tl.zeros([LANES], tl.float32)
    u = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float64)
    b = tl.zeros([LANES], tl.float64)
    h = tl.zeros([LANES], tl.float64)
    k = tl.zeros([LANES], tl.float64)
    for at in range(start, stop, LANES):
        inside = at + columns < stop
        x = tl.load(x_row + at + columns, mask=inside, other=float("-inf")).to(tl.float64)
        y = tl.load(y_row + at + columns, mask=inside, other=float("-inf")).to(tl.float64)
        no_x, no_y = excluded(x), excluded(y)
        # Equal logits cancel: their products are rounded alike, before they are subtracted.
        t = tl.where(no_x, 0.0, x * factor - m)
        s = tl.where(no_y, 0.0, y * factor - n)
        p = tl.where(no_x, 0.0, tl.exp2((t * PER_NAT).to(tl.float32)))
        w = tl.where(no_y, 0.0, tl.exp2((s * PER_NAT).to(tl.float32)))
        z += p
        u += w
        a += tl.where(no_x, 0.0, tl.where(no_y, float("inf"), p * (t - s)))
        b += tl.where(no_y, 0.0, tl.where(no_x, float("inf"), w * (s - t)))
        h += p * t
        k += w * s
    return (
        m,
        n,
        tl.sum(z, 0).to(tl.float64),
        tl.sum(u, 0).to(tl.float64),
        tl.sum(a, 0),
        tl.sum(b, 0),
        tl.sum(h, 0),
        tl.sum(k, 0),
    )


@triton.jit
def fold_kernel(
    student,
    teacher,
    mask,
    partial,
    x_strides,
    y_strides,
    vocab,
    segments,
    scale,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STEP: tl.constexpr,
    SEGMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PTX: tl.constexpr,
):
    """One program a segment of a row: its state goes to partial [rows, segments, STATE_FIELDS]."""
    program = tl.program_id(0)
    row, segment = program // segments, program % segments
    if mask is not None:
        if tl.load(mask + row) == 0:
            return
    x_offset = locate(row, x_strides)
    y_offset = locate(row, y_strides)
    if ALIGNED:
        x_offset, y_offset = tl.multiple_of(x_offset, VECTOR), tl.multiple_of(y_offset, VECTOR)
    x_row, y_row = student + x_offset, teacher + y_offset
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, vocab)
    m, n, z, u, a, b, h, k = merged(*fold(x_row, y_row, start, stop, scale, LANES, VECTOR, STEP, ALIGNED, PTX))
    sums = finite(z) & finite(u) & finite(a) & finite(b) & finite(h) & finite(k)
    m, n, z, u = m.to(tl.float64) * LN2, n.to(tl.float64) * LN2, z.to(tl.float64), u.to(tl.float64)
    a, b, h, k = a.to(tl.float64) * LN2, b.to(tl.float64) * LN2, h.to(tl.float64) * LN2, k.to(tl.float64) * LN2
    careful = tl.zeros([], tl.float64)
    if not (sums & (z > 0) & (u > 0)):
        careful += 1
        m, n, z, u, a, b, h, k = fold_carefully(x_row, y_row, start, stop, scale, LANES)
    to = partial + program.to(tl.int64) * STATE_FIELDS
    tl.store(to, m)
    tl.store(to + 1, n)
    tl.store(to + 2, z)
    tl.store(to + 3, u)
    tl.store(to + 4, a)
    tl.store(to + 5, b)
    tl.store(to + 6, h)
    tl.store(to + 7, k)
    tl.store(to + 8, careful)


@triton.jit
def finish_kernel(
    rows,
    student,
    teacher,
    tokens,
    mask,
    partial,
    statistics,
    saved,
    x_strides,
    y_strides,
    vocab,
    segments,
    scale,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program for ROWS rows."""
    finish_rows(
        tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS),
        rows,
        student,
        teacher,
        tokens,
        mask,
        partial,
        statistics,
        saved,
        x_strides,
        y_strides,
        vocab,
        segments,
        scale,
        PARTS,
    )


class Folded(NamedTuple):
    """Partial states of all rows, and what it takes to finish them."""

    partial: Tensor  # [rows, segments, STATE_FIELDS] float64
    student: launch.Rows
    teacher: launch.Rows
    vocab: int
    segments: int
    scale: float

    @property
    def shape(self) -> tuple[tuple[int, int, int], tuple[int, int, int], int, int, float]:
        """The arguments of `finish_rows` after the saved scalars."""
        return (self.student.strides, self.teacher.strides, self.vocab, self.segments, self.scale)

    @property
    def parts(self) -> int:
        return triton.next_power_of_2(self.segments)


def fold_rows(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float, vocab: int) -> Folded:
    """Launches the one pass over the logits. ``mask``: bytes, or None."""
    rows = launch.count_rows(student)
    settings = launch.forward_settings(vocab, student.dtype, teacher.dtype)
    segments = launch.segments(vocab, settings)
    partial = student.new_empty((rows, segments, STATE_FIELDS.value), dtype=torch.float64)
    x, y = launch.rows_of(student), launch.rows_of(teacher)
    scale = launch.scale_of(temperature)
    wide_loads = launch.aligned(x, settings.vector) and launch.aligned(y, settings.vector)

    def run(settings: launch.Forward) -> None:
        fold_kernel[(rows * segments,)](
            x.tensor,
            y.tensor,
            mask,
            partial,
            x.strides,
            y.strides,
            vocab,
            segments,
            scale,
            LANES=settings.lanes,
            VECTOR=settings.vector,
            STEP=settings.step,
            SEGMENT=settings.segment,
            ALIGNED=wide_loads,
            PTX=launch.speaks_ptx(),
            **launch.compiled_for(settings.warps),
        )

    if rows > 0:
        run(launch.tuned(settings, (vocab, student.dtype, teacher.dtype, wide_loads, student.device), run))
    return Folded(partial, x, y, vocab, segments, scale)


def token_stats(
    student: Tensor, teacher: Tensor, tokens: Tensor | None, mask: Tensor | None, temperature: float, vocab: int
) -> tuple[list[Tensor], Tensor]:
    """The six statistics ``[...]`` float32 and the saved scalars ``[..., SAVED]`` float64.

    Without tokens the statistics are left unwritten: only the scalars are wanted.
    """
    rows = launch.count_rows(student)
    statistics, saved = empty_statistics(student)
    if rows == 0:
        return statistics, saved
    keep = launch.flags(mask)
    with launch.on(student):
        folded = fold_rows(student, teacher, keep, temperature, vocab)
        finish_kernel[(triton.cdiv(rows, finish.ROWS),)](
            rows,
            folded.student.tensor,
            folded.teacher.tensor,
            None if tokens is None else tokens.contiguous(),
            keep,
            folded.partial,
            tuple(statistics),
            saved,
            *folded.shape,
            ROWS=finish.ROWS,
            PARTS=folded.parts,
            **launch.compiled_for(finish.WARPS),
        )
    return statistics, saved

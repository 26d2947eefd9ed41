"""Helpers with one-word jobs for all kernels: where a row lies, how much a column weighs, how states merge.

Every kernel works in octaves: with L = log2(e)/temperature a logit x counts as t = L x - M, one fused multiply-add, and
weighs 2^t, one instruction of the GPU. M is any finite reference; the maximum keeps the power in range. Differences
t - s of the two models are taken relative to the references, so that a common shift of one model's logits costs no
precision. States leave the loops in nats, in double.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from cmdp_fast import layout
from cmdp_fast.kernels.shapes import Lanes, Row, SavedRow, State

LN2 = tl.constexpr(math.log(2.0))
PER_NAT = tl.constexpr(math.log2(math.e))  # octaves
# The reference of a lane that has seen no column. Finite, so that the first rise of the reference multiplies zeros by
# a number; a row whose every logit lies below it is left to the careful loop.
NOWHERE = tl.constexpr(-1e30)
LARGEST_REFERENCE = tl.constexpr(1e7)  # octaves
STATE_FIELDS = tl.constexpr(9)  # m, n, z, u, a, b, h, k, and 1 if the segment was folded carefully
SAVED = tl.constexpr(layout.SAVED)


@triton.jit
def locate(row, rows):
    """The offset of a row in elements, in 64 bits; `rows` are `Rows`.

    Rows are fewer than 2^31, and a division in 64 bits would cost as much as a tile.
    """
    row = row.to(tl.int32)
    outer = row // rows.inner
    return -(outer.to(tl.int64) * rows.outer_stride + (row - outer * rows.inner).to(tl.int64) * rows.stride)


@triton.jit
def row_of(row, logits):
    """One `Row` of both models."""
    student = logits.student + locate(row, logits.student_rows)
    teacher = logits.teacher + locate(row, logits.teacher_rows)
    return Row(student, teacher, logits.scale)


@triton.jit
def aligned_row_of(row, logits, COLUMNS: tl.constexpr):
    """As `row_of`, of rows that all begin at multiples of COLUMNS columns."""
    student = tl.multiple_of(locate(row, logits.student_rows), COLUMNS)
    teacher = tl.multiple_of(locate(row, logits.teacher_rows), COLUMNS)
    return Row(logits.student + student, logits.teacher + teacher, logits.scale)


@triton.jit
def taken(row, columns, inside):
    """Columns of a row in float32, 0 where not `inside`; all of them if that is None."""
    if inside is None:
        return tl.load(row + columns).to(tl.float32)
    else:
        return tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def zero(row, start, stop, TILE: tl.constexpr):
    """Writes 0 to columns [start, stop) of a row."""
    for first in range(start, stop, TILE):
        columns = first + tl.arange(0, TILE)
        tl.store(row + columns, tl.zeros([TILE], tl.float32).to(row.dtype.element_ty), mask=columns < stop)


@triton.jit
def octaves(x, scale, reference):
    """L x - M with one rounding."""
    return tl.fma(x, scale + tl.zeros_like(x), tl.zeros_like(x) - reference)


@triton.jit
def natural(scale):
    """The factor of the logits in nats and in double: 1/temperature but for the rounding of `scale`."""
    return (tl.zeros([], tl.float64) + scale) * LN2


@triton.jit
def excluded(x):
    return x == float("-inf")


@triton.jit
def raised(state, top, teacher_top):
    """A state in octaves after its references have been moved up to `top` and `teacher_top`."""
    drop, teacher_drop = state.m - top, state.n - teacher_top
    apart = drop - teacher_drop
    shrink, teacher_shrink = tl.exp2(drop), tl.exp2(teacher_drop)
    a = tl.fma(apart, state.z, state.a) * shrink
    b = tl.fma(-apart, state.u, state.b) * teacher_shrink
    h = tl.fma(drop, state.z, state.h) * shrink
    k = tl.fma(teacher_drop, state.u, state.k) * teacher_shrink
    return State(top, teacher_top, state.z * shrink, state.u * teacher_shrink, a, b, h, k)


class Rise(NamedTuple):
    """How far the references of a state in nats move up, and by which factors its weights shrink."""

    student: Lanes
    teacher: Lanes
    shrink: Lanes
    teacher_shrink: Lanes


@triton.jit
def rise_by(student, teacher):
    """The `Rise` of both references by so many nats."""
    return Rise(student, teacher, tl.exp2(-student * PER_NAT), tl.exp2(-teacher * PER_NAT))


@triton.jit
def raised_in_nats(state, rise):
    """The sums z, u, a, b, h, k of a state in nats after a `Rise`. As doubles they are not fused, as octaves are."""
    apart = rise.student - rise.teacher
    return (
        state.z * rise.shrink,
        state.u * rise.teacher_shrink,
        (state.a - apart * state.z) * rise.shrink,
        (state.b + apart * state.u) * rise.teacher_shrink,
        (state.h - rise.student * state.z) * rise.shrink,
        (state.k - rise.teacher * state.u) * rise.teacher_shrink,
    )


@triton.jit
def merged(lanes):
    """The state of all lanes `[L]`, merged once, in an order that depends on L alone."""
    top, teacher_top = tl.max(lanes.m, 0), tl.max(lanes.n, 0)
    state = raised(lanes, top, teacher_top)
    return State(
        top,
        teacher_top,
        tl.sum(state.z, 0),
        tl.sum(state.u, 0),
        tl.sum(state.a, 0),
        tl.sum(state.b, 0),
        tl.sum(state.h, 0),
        tl.sum(state.k, 0),
    )


@triton.jit
def saved_row(at):
    """The `SavedRow` at a pointer. Numbers that the caller does not use are not loaded."""
    return SavedRow(
        m=tl.load(at),
        n=tl.load(at + 1),
        log_z=tl.load(at + 2),
        log_u=tl.load(at + 3),
        entropy=tl.load(at + 4),
        reverse_kl=tl.load(at + 5),
        careful=tl.load(at + 6),
    )


@triton.jit
def is_reference(octaves):
    """Whether float32 may be relative to a reference: below 2^24 octaves its numbers lie an octave apart, and a larger
    one may be rounded by more than that."""
    return tl.abs(octaves) < LARGEST_REFERENCE


@triton.jit
def finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def store_state(at, state, inside):
    """Writes the eight fields of a state where `inside`; everywhere if that is None."""
    tl.store(at, state.m, mask=inside)
    tl.store(at + 1, state.n, mask=inside)
    tl.store(at + 2, state.z, mask=inside)
    tl.store(at + 3, state.u, mask=inside)
    tl.store(at + 4, state.a, mask=inside)
    tl.store(at + 5, state.b, mask=inside)
    tl.store(at + 6, state.h, mask=inside)
    tl.store(at + 7, state.k, mask=inside)

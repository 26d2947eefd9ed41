"""From partial states to statistics: the states of a row's segments are merged and finished, in double.

A tile is [ROWS, PARTS]; each of its rows is a row of logits. Kernels that call `finish_rows` with the same tile and the
same number of warps add in the same order, so that the statistics are bitwise the same whichever of them finishes them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from cmdp_fast.kernels.shapes import Lanes, State
from cmdp_fast.kernels.shared import (
    LN2,
    SAVED,
    STATE_FIELDS,
    finite,
    locate,
    natural,
    raised_in_nats,
    rise_by,
)

ROWS = 32  # rows per step
WARPS = 4


class Merged(NamedTuple):
    """A row's state, in nats and in double, and its special cases."""

    state: State
    only_student: Lanes  # above 0 if a column is used by the student only; a is without it
    only_teacher: Lanes  # likewise, of b
    careful: Lanes  # above 0 if a segment was folded carefully


@triton.jit
def rise_of(m, z):
    """How far the reference of each part lies below the highest one that carries weight, and that one."""
    top = tl.max(tl.where(z > 0, m, float("-inf")), 1)
    top = tl.where(finite(top), top, 0.0)
    return tl.where(z > 0, top[:, None] - m, 0.0), top


@triton.jit
def total_of(raised, infinite):
    """The total over the parts, and whether a part is infinite, which is left out."""
    return tl.sum(tl.where(infinite, 0.0, raised), 1), tl.max(infinite.to(tl.int32), 1)


@triton.jit
def merged_parts(folded, row, keep, PARTS: tl.constexpr):
    """The states of the segments of each row `row` [ROWS] that is to `keep`, `Merged` [ROWS]."""
    part = tl.arange(0, PARTS)[None, :]
    present = (part < folded.segments) & keep[:, None]
    at = folded.partial + (row[:, None] * folded.segments + part) * STATE_FIELDS
    parts = State(
        tl.load(at, mask=present, other=0.0),
        tl.load(at + 1, mask=present, other=0.0),
        tl.load(at + 2, mask=present, other=0.0),
        tl.load(at + 3, mask=present, other=0.0),
        tl.load(at + 4, mask=present, other=0.0),
        tl.load(at + 5, mask=present, other=0.0),
        tl.load(at + 6, mask=present, other=0.0),
        tl.load(at + 7, mask=present, other=0.0),
    )
    rise, top = rise_of(parts.m, parts.z)
    teacher_rise, teacher_top = rise_of(parts.n, parts.u)
    z, u, a, b, h, k = raised_in_nats(parts, rise_by(rise, teacher_rise))
    a, only_student = total_of(a, parts.a == float("inf"))
    b, only_teacher = total_of(b, parts.b == float("inf"))
    h, _ = total_of(h, parts.h == float("inf"))
    k, _ = total_of(k, parts.k == float("inf"))
    careful = tl.max(tl.load(at + 8, mask=present, other=0.0), 1)
    return Merged(State(top, teacher_top, tl.sum(z, 1), tl.sum(u, 1), a, b, h, k), only_student, only_teacher, careful)


@triton.jit
def put(to, value, valid, keep, inside):
    """Stores the values of rows: NaN where a row is not valid, 0 where it is masked."""
    value = tl.where(keep, tl.where(valid, value, float("nan")), 0.0)
    tl.store(to, value.to(to.dtype.element_ty), mask=inside)


@triton.jit
def kept(row, inside, mask):
    """Which of the rows or tokens that are `inside` the mask lets through."""
    if mask is None:
        return inside
    else:
        return inside & (tl.load(mask + row, mask=inside, other=0) != 0)


@triton.jit
def finish_rows(row, stop, folded, results, PARTS: tl.constexpr):
    """Writes the statistics (unless there are no tokens) and saved scalars of the rows `row` [ROWS] below `stop`.

    folded: a `Folded` of as many segments as PARTS has room for. results: a `Results`.
    """
    row = row.to(tl.int64)
    inside = row < stop
    logits = folded.logits
    keep = kept(row, inside, logits.mask)
    state, only_student, only_teacher, careful = merged_parts(folded, row, keep, PARTS)
    # A row is usable if both models have probability somewhere and nothing in it was NaN or +inf.
    valid = (state.z > 0) & (state.u > 0) & finite(state.z) & finite(state.u)
    z, u = tl.where(valid, state.z, 1.0), tl.where(valid, state.u, 1.0)
    log_z, log_u = tl.log2(z) * LN2, tl.log2(u) * LN2
    # Rounding may take a number that cannot be negative just below zero.
    h = tl.maximum(log_z - state.h / z, 0.0)
    k = tl.maximum(log_u - state.k / u, 0.0)
    r = tl.where(only_student > 0, float("inf"), tl.maximum(state.a / z - log_z + log_u, 0.0))
    f = tl.where(only_teacher > 0, float("inf"), tl.maximum(state.b / u - log_u + log_z, 0.0))
    if logits.tokens is not None:
        token = tl.load(logits.tokens + row, mask=keep, other=0).to(tl.int64)
        # A token outside the vocabulary has no logit: NaN. The host cannot look without stalling the device.
        known = (token >= 0) & (token < logits.width) & keep
        nan = float("nan")
        x = tl.load(logits.student + locate(row, logits.student_rows) + token, mask=known, other=nan)
        y = tl.load(logits.teacher + locate(row, logits.teacher_rows) + token, mask=known, other=nan)
        own = x.to(tl.float64) * natural(logits.scale) - state.m - log_z
        teacher_own = y.to(tl.float64) * natural(logits.scale) - state.n - log_u
        logprob, teacher_logprob, entropy, teacher_entropy, reverse_kl, forward_kl = results.statistics
        put(logprob + row, tl.where(own > 0, 0.0, own), valid, keep, inside)
        put(teacher_logprob + row, tl.where(teacher_own > 0, 0.0, teacher_own), valid, keep, inside)
        put(entropy + row, h, valid, keep, inside)
        put(teacher_entropy + row, k, valid, keep, inside)
        put(reverse_kl + row, r, valid, keep, inside)
        put(forward_kl + row, f, valid, keep, inside)
    to = results.saved + row * SAVED
    put(to, state.m, valid, keep, inside)
    put(to + 1, state.n, valid, keep, inside)
    put(to + 2, log_z, valid, keep, inside)
    put(to + 3, log_u, valid, keep, inside)
    put(to + 4, h, valid, keep, inside)
    put(to + 5, r, valid, keep, inside)
    put(to + 6, careful, keep, keep, inside)

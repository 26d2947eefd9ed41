"""From partial states to statistics: the states of a row's segments are merged and finished, in double.

A tile is [ROWS, PARTS], one row of logits a row. Whoever calls `finish_rows` with the same tile and the same number of
warps adds in the same order, so that the statistics are bitwise the same whichever kernel finishes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cmdp_fast.kernels.shared import LN2, PER_NAT, SAVED, STATE_FIELDS, finite, locate, natural

ROWS = 32  # rows a step
WARPS = 4


@triton.jit
def rise_of(m, z):
    """How far the reference of each part lies below the highest one that carries weight, and that one."""
    top = tl.max(tl.where(z > 0, m, float("-inf")), 1)
    top = tl.where(finite(top), top, 0.0)
    return tl.where(z > 0, top[:, None] - m, 0.0), top


@triton.jit
def total_of(sums, weight, rise, shrink):
    """sum shrink (sums - rise weight) over the parts, and whether one of them is +inf, which is left out."""
    infinite = sums == float("inf")
    return tl.sum(tl.where(infinite, 0.0, shrink * (sums - rise * weight)), 1), tl.max(infinite.to(tl.int32), 1)


@triton.jit
def merged_parts(at, present):
    """The states of the parts of each row `[ROWS, PARTS]` merged: m, n, z, u, a, b, h, k [ROWS] in nats; whether a
    column is used by one model only (a and b are without it); and whether a part was folded carefully."""
    m = tl.load(at, mask=present, other=0.0)
    n = tl.load(at + 1, mask=present, other=0.0)
    z = tl.load(at + 2, mask=present, other=0.0)
    u = tl.load(at + 3, mask=present, other=0.0)
    a = tl.load(at + 4, mask=present, other=0.0)
    b = tl.load(at + 5, mask=present, other=0.0)
    h = tl.load(at + 6, mask=present, other=0.0)
    k = tl.load(at + 7, mask=present, other=0.0)
    rise, top = rise_of(m, z)
    teacher_rise, teacher_top = rise_of(n, u)
    shrink, teacher_shrink = tl.exp2(-rise * PER_NAT), tl.exp2(-teacher_rise * PER_NAT)
    a, only_student = total_of(a, z, rise - teacher_rise, shrink)
    b, only_teacher = total_of(b, u, teacher_rise - rise, teacher_shrink)
    h, _ = total_of(h, z, rise, shrink)
    k, _ = total_of(k, u, teacher_rise, teacher_shrink)
    careful = tl.max(tl.load(at + 8, mask=present, other=0.0), 1)
    z, u = tl.sum(z * shrink, 1), tl.sum(u * teacher_shrink, 1)
    return top, teacher_top, z, u, a, b, h, k, only_student, only_teacher, careful


@triton.jit
def put(to, value, valid, keep, inside):
    """Stores the values of rows: NaN where a row is not valid, 0 where it is masked."""
    value = tl.where(keep, tl.where(valid, value, float("nan")), 0.0)
    tl.store(to, value.to(to.dtype.element_ty), mask=inside)


@triton.jit
def finish_rows(
    row,
    stop,
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
    PARTS: tl.constexpr,
):
    """Statistics (unless tokens is None) and saved scalars of the rows `row` [ROWS] below `stop`."""
    row = row.to(tl.int64)
    inside = row < stop
    keep = inside
    if mask is not None:
        keep = inside & (tl.load(mask + row, mask=inside, other=0) != 0)
    part = tl.arange(0, PARTS)[None, :]
    present = (part < segments) & keep[:, None]
    at = partial + (row[:, None] * segments + part) * STATE_FIELDS
    m, n, z, u, a, b, h, k, only_student, only_teacher, careful = merged_parts(at, present)
    # A row is usable if both models have probability somewhere and nothing in it was NaN or +inf.
    valid = (z > 0) & (u > 0) & finite(z) & finite(u)
    z, u = tl.where(valid, z, 1.0), tl.where(valid, u, 1.0)
    log_z, log_u = tl.log2(z) * LN2, tl.log2(u) * LN2
    # Rounding may take what cannot be negative just below zero.
    h = tl.maximum(log_z - h / z, 0.0)
    k = tl.maximum(log_u - k / u, 0.0)
    r = tl.where(only_student > 0, float("inf"), tl.maximum(a / z - log_z + log_u, 0.0))
    f = tl.where(only_teacher > 0, float("inf"), tl.maximum(b / u - log_u + log_z, 0.0))
    if tokens is not None:
        token = tl.load(tokens + row, mask=keep, other=0).to(tl.int64)
        # A token outside the vocabulary has no logit: NaN. The host cannot look without stalling the device.
        known = (token >= 0) & (token < vocab) & keep
        nan = float("nan")
        x = tl.load(student + locate(row, x_strides) + token, mask=known, other=nan)
        y = tl.load(teacher + locate(row, y_strides) + token, mask=known, other=nan)
        own = x.to(tl.float64) * natural(scale) - m - log_z
        teacher_own = y.to(tl.float64) * natural(scale) - n - log_u
        put(statistics[0] + row, tl.where(own > 0, 0.0, own), valid, keep, inside)
        put(statistics[1] + row, tl.where(teacher_own > 0, 0.0, teacher_own), valid, keep, inside)
        put(statistics[2] + row, h, valid, keep, inside)
        put(statistics[3] + row, k, valid, keep, inside)
        put(statistics[4] + row, r, valid, keep, inside)
        put(statistics[5] + row, f, valid, keep, inside)
    to = saved + row * SAVED
    put(to, m, valid, keep, inside)
    put(to + 1, n, valid, keep, inside)
    put(to + 2, log_z, valid, keep, inside)
    put(to + 3, log_u, valid, keep, inside)
    put(to + 4, h, valid, keep, inside)
    put(to + 5, r, valid, keep, inside)
    put(to + 6, careful, keep, keep, inside)

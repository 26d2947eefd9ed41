"""From partial states to statistics: the states of a row's segments are merged and turned into nats, in double.

A tile is [ROWS, PARTS], one row of logits a row. Whoever calls `finish_rows` with the same tile and the same number of
warps adds in the same order, so that the statistics are bitwise the same whichever kernel finishes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cmdp_fast.kernels.shared import LN2, SAVED, STATE_FIELDS, finite, locate

ROWS = 32  # rows a step
WARPS = 4


@triton.jit
def rise_of(m, z):
    """How far the reference of each part lies below the highest one that carries weight, and that one."""
    top = tl.max(tl.where(z > 0, m, float("-inf")), 1)
    top = tl.where(finite(top), top, 0.0)
    return tl.where(z > 0, top[:, None] - m, 0.0), top


@triton.jit
def mean_of(sums, weight, rise, shrink, total):
    """sum shrink (sums - rise weight) / total over the parts, where +inf stays +inf."""
    infinite = sums == float("inf")
    value = tl.sum(tl.where(infinite, 0.0, shrink * (sums - rise * weight)), 1) / total
    return tl.where(tl.max(infinite.to(tl.int32), 1) > 0, float("inf"), value)


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
    logprob,
    teacher_logprob,
    entropy,
    teacher_entropy,
    reverse_kl,
    forward_kl,
    saved,
    x_inner,
    x_stride,
    x_outer_stride,
    y_inner,
    y_stride,
    y_outer_stride,
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
    shrink, teacher_shrink = tl.exp2(-rise), tl.exp2(-teacher_rise)
    z_all, u_all = tl.sum(z * shrink, 1), tl.sum(u * teacher_shrink, 1)
    # A row is usable if both models have probability somewhere and nothing in it was NaN or +inf.
    valid = (z_all > 0) & (u_all > 0) & finite(z_all) & finite(u_all)
    z_all, u_all = tl.where(valid, z_all, 1.0), tl.where(valid, u_all, 1.0)
    log_z, log_u = tl.log2(z_all), tl.log2(u_all)
    # Rounding may take what cannot be negative just below zero.
    h_all = tl.maximum(log_z - mean_of(h, z, rise, shrink, z_all), 0.0) * LN2
    k_all = tl.maximum(log_u - mean_of(k, u, teacher_rise, teacher_shrink, u_all), 0.0) * LN2
    r = tl.maximum(mean_of(a, z, rise - teacher_rise, shrink, z_all) - log_z + log_u, 0.0) * LN2
    f = tl.maximum(mean_of(b, u, teacher_rise - rise, teacher_shrink, u_all) - log_u + log_z, 0.0) * LN2
    if tokens is not None:
        token = tl.load(tokens + row, mask=keep, other=0).to(tl.int64)
        # A token outside the vocabulary has no logit: NaN. The host cannot look without stalling the device.
        known = (token >= 0) & (token < vocab) & keep
        nan = float("nan")
        x = tl.load(student + locate(row, x_inner, x_stride, x_outer_stride) + token, mask=known, other=nan)
        y = tl.load(teacher + locate(row, y_inner, y_stride, y_outer_stride) + token, mask=known, other=nan)
        own = (x.to(tl.float64) * scale - top - log_z) * LN2
        teacher_own = (y.to(tl.float64) * scale - teacher_top - log_u) * LN2
        put(logprob + row, tl.where(own > 0, 0.0, own), valid, keep, inside)
        put(teacher_logprob + row, tl.where(teacher_own > 0, 0.0, teacher_own), valid, keep, inside)
        put(entropy + row, h_all, valid, keep, inside)
        put(teacher_entropy + row, k_all, valid, keep, inside)
        put(reverse_kl + row, r, valid, keep, inside)
        put(forward_kl + row, f, valid, keep, inside)
    careful = tl.max(tl.load(at + 8, mask=present, other=0.0), 1)
    # From 2^24 octaves on a normaliser in float32 may be off by more than an octave, beyond what `split` repairs.
    careful = tl.where(tl.maximum(tl.abs(top), tl.abs(teacher_top)) < 1e7, careful, 1.0)
    to = saved + row * SAVED
    put(to, top, valid, keep, inside)
    put(to + 1, teacher_top, valid, keep, inside)
    put(to + 2, log_z, valid, keep, inside)
    put(to + 3, log_u, valid, keep, inside)
    put(to + 4, h_all, valid, keep, inside)
    put(to + 5, r, valid, keep, inside)
    put(to + 6, careful, keep, keep, inside)

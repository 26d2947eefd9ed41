"""Helpers with one-word jobs for all kernels: where a row lies, what a column weighs, how partial states merge.

Every kernel works in octaves: with L = log2(e)/temperature a logit x counts as t = L x - M, one fused multiply-add, and
weighs 2^t, one instruction of the GPU. M is any finite reference; the maximum keeps the power in range. Differences
t - s of the two models are taken relative to the references, so that a common shift of one model's logits costs no
precision. States leave the loops in nats, in double.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2.0))
PER_NAT = tl.constexpr(math.log2(math.e))  # octaves
# The reference of a lane that has seen no column. Finite, so that the first rise of the reference multiplies zeros by
# a number; a row whose every logit lies below it is left to the careful loop.
NOWHERE = tl.constexpr(-1e30)
STATE_FIELDS = tl.constexpr(9)  # m, n, z, u, a, b, h, k, and 1 if the segment was folded carefully
# What the backward pass needs of a row, in double and in nats: the references m and n, log z, log u, H, R, and 1 if the
# row has to be done carefully.
SAVED = tl.constexpr(7)


@triton.jit
def locate(row, strides):
    """The offset of a row in elements, in 64 bits: rows are numbered over at most two axes.

    Rows are fewer than 2^31, and a division in 64 bits would cost as much as a tile.
    """
    inner, inner_stride, outer_stride = strides
    row = row.to(tl.int32)
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride


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
    """What the kernels multiply logits by, in nats and in double: 1/temperature but for the rounding of `scale`."""
    return (tl.zeros([], tl.float64) + scale) * LN2


@triton.jit
def excluded(x):
    return x == float("-inf")


@triton.jit
def raised(m, n, z, u, a, b, h, k, top, teacher_top):
    """The six sums after the references have been moved up to `top` and `teacher_top`."""
    drop, teacher_drop = m - top, n - teacher_top
    apart = drop - teacher_drop
    shrink, teacher_shrink = tl.exp2(drop), tl.exp2(teacher_drop)
    a = tl.fma(apart, z, a) * shrink
    b = tl.fma(-apart, u, b) * teacher_shrink
    h = tl.fma(drop, z, h) * shrink
    k = tl.fma(teacher_drop, u, k) * teacher_shrink
    return z * shrink, u * teacher_shrink, a, b, h, k


@triton.jit
def merged(m, n, z, u, a, b, h, k):
    """The state of all lanes `[L]`, merged once, in an order that depends on L alone."""
    top, teacher_top = tl.max(m, 0), tl.max(n, 0)
    z, u, a, b, h, k = raised(m, n, z, u, a, b, h, k, top, teacher_top)
    return (
        top,
        teacher_top,
        tl.sum(z, 0),
        tl.sum(u, 0),
        tl.sum(a, 0),
        tl.sum(b, 0),
        tl.sum(h, 0),
        tl.sum(k, 0),
    )


@triton.jit
def finite(value):
    return tl.abs(value) < float("inf")

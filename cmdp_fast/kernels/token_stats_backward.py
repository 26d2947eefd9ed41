"""Statistics, backward: one expression a column for the four upstream gradients, in one pass.

With t = L x - M, s = L y - N, where M and N are the normalisers in octaves rounded to float32 and r, q what rounding
left, p = 2^t 2^-r and w = 2^s 2^-q, and the table of gradients in `cmdp_fast/reference.py` becomes

    dx = 2^t (c0 + c1 t + c2 (t - s - center)) - c3 2^s + onehot c4,     center = R in octaves.

Splitting the normalisers keeps p to a rounding error although L x may be large. t - s is taken as a difference, so
that nearly equal models do not cancel, and R comes off it at once, so that models far apart do not either.
An upstream gradient that is None is compiled away, and with both KLs absent the teacher is not read.

A row with special values, or with upstream gradients so large that float32 may overflow on the way, is done in double.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import launch
from cmdp_fast.kernels.shared import LN2, PER_NAT, SAVED, locate, octaves

MODEST = tl.constexpr(1e7)  # upstream gradients up to here cannot overflow float32 on the way to a finite result


@triton.jit
def split(reference, log_sum):
    """A normaliser in octaves as float32, and what the rounding left."""
    exact = reference + log_sum
    rounded = exact.to(tl.float32)
    return rounded, (exact - rounded.to(tl.float64)).to(tl.float32)


@triton.jit
def upstream(gradient, row):
    """The upstream gradient of a row in double; 0 if there is none."""
    if gradient is None:
        return tl.zeros([], tl.float64)
    else:
        return tl.load(gradient + row).to(tl.float64)


@triton.jit
def careful_gradient(
    x, y, own, at, scale, natural, g_l, g_h, g_r, g_f, LOGPROB: tl.constexpr, FORWARD: tl.constexpr
):
    """dx of some columns in double. Excluded columns have probability 0, and 0 · anything = 0."""
    factor = tl.zeros([], tl.float64) + scale
    log_p = (x.to(tl.float64) * factor - tl.load(at)) - tl.load(at + 2)
    log_w = (y.to(tl.float64) * factor - tl.load(at + 1)) - tl.load(at + 3)
    h, r = tl.load(at + 4) * PER_NAT, tl.load(at + 5) * PER_NAT
    p, w = tl.exp2(log_p), tl.exp2(log_w)
    # Where R is infinite so is its gradient, which would poison the step: it passes none.
    bracket = tl.where(r == float("inf"), 0.0, g_r * ((log_p - log_w) - r)) - g_h * (log_p + h)
    value = tl.where(p == 0, 0.0, LN2 * p * bracket)
    if FORWARD:
        value += g_f * (p - w)
    if LOGPROB:
        value += g_l * (tl.where(own, 1.0, 0.0) - p)
    return value * natural


@triton.jit
def backward_kernel(
    student,
    teacher,
    tokens,
    mask,
    saved,
    g_logprob,
    g_entropy,
    g_reverse_kl,
    g_forward_kl,
    out,
    x_inner,
    x_stride,
    x_outer_stride,
    y_inner,
    y_stride,
    y_outer_stride,
    out_inner,
    out_stride,
    out_outer_stride,
    vocab,
    width,
    blocks,
    scale,
    natural,
    BLOCK: tl.constexpr,
):
    """One program a block of columns of a row. `out` may be the student's logits: each column is read, then written."""
    program = tl.program_id(0)
    row, block = program // blocks, program % blocks
    columns = block * BLOCK + tl.arange(0, BLOCK)
    written = columns < width
    to = out + locate(row, out_inner, out_stride, out_outer_stride) + columns
    if mask is not None:
        if tl.load(mask + row) == 0:
            tl.store(to, tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty), mask=written)
            return
    inside = columns < vocab
    at = saved + row.to(tl.int64) * SAVED
    x_at = student + locate(row, x_inner, x_stride, x_outer_stride) + columns
    y_at = teacher + locate(row, y_inner, y_stride, y_outer_stride) + columns
    x = tl.load(x_at, mask=inside, other=0.0)
    g_l, g_h = upstream(g_logprob, row), upstream(g_entropy, row)
    g_r, g_f = upstream(g_reverse_kl, row), upstream(g_forward_kl, row)
    largest = tl.maximum(tl.maximum(tl.abs(g_l), tl.abs(g_h)), tl.maximum(tl.abs(g_r), tl.abs(g_f)))
    if tl.where(largest >= MODEST, 1.0, tl.load(at + 6)) != 0:
        y = tl.load(y_at, mask=inside, other=0.0)
        own = tl.zeros([BLOCK], tl.int1)
        if g_logprob is not None:
            own = columns == tl.load(tokens + row)
        value = careful_gradient(
            x, y, own, at, scale, natural, g_l, g_h, g_r, g_f, g_logprob is not None, g_forward_kl is not None
        )
        tl.store(to, tl.where(inside, value, 0.0).to(tl.float32).to(out.dtype.element_ty), mask=written)
        return

    m, r = split(tl.load(at), tl.load(at + 2))
    t = octaves(x.to(tl.float32), scale, m)
    p = tl.exp2(t)
    weight = natural * tl.exp2(-r)
    factor = tl.zeros([BLOCK], tl.float32) + (g_f - g_l).to(tl.float32)
    if g_entropy is not None:
        h = tl.load(at + 4).to(tl.float32)
        factor -= g_h.to(tl.float32) * (LN2 * (t - r) + h)
    if (g_reverse_kl is not None) or (g_forward_kl is not None):
        n, q = split(tl.load(at + 1), tl.load(at + 3))
        y = tl.load(y_at, mask=inside, other=0.0)
        s = octaves(y.to(tl.float32), scale, n)
        if g_reverse_kl is not None:
            divergence = tl.load(at + 5) * PER_NAT
            center = divergence.to(tl.float32)
            rest = (center.to(tl.float64) - divergence).to(tl.float32) + (q - r)
            factor += g_r.to(tl.float32) * LN2 * (((t - s) - center) + rest)
    # Where p is 0 the bracket may overflow, and 0 · anything = 0.
    value = weight * (p * tl.where(p == 0, 0.0, factor))
    if g_forward_kl is not None:
        value -= natural * tl.exp2(-q) * g_f.to(tl.float32) * tl.exp2(s)
    if g_logprob is not None:
        value += tl.where(columns == tl.load(tokens + row), natural * g_l.to(tl.float32), 0.0)
    tl.store(to, tl.where(inside, value, 0.0).to(out.dtype.element_ty), mask=written)


def token_stats_backward(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    temperature: float,
    vocab: int,
    out: Tensor,
) -> None:
    """Writes the gradient of the student's logits into ``out`` ``[..., V]``, which may be the logits themselves."""
    rows, width = launch.count_rows(student), student.shape[-1]
    if rows == 0:
        return
    settings = launch.column_settings(width)
    blocks = -(-width // settings.block)
    x, y, to = launch.rows_of(student), launch.rows_of(teacher), launch.rows_of(out)
    if to.tensor is not out:
        raise ValueError(f"the gradient must be writable with at most two strides, got strides {out.stride()}")
    scale = launch.scale_of(temperature)
    flowing = [None if g is None else g.contiguous() for g in upstream]
    with launch.on(student):
        backward_kernel[(rows * blocks,)](
            x.tensor,
            y.tensor,
            tokens.contiguous(),
            launch.flags(mask),
            saved,
            *flowing,
            to.tensor,
            *x.strides,
            *y.strides,
            *to.strides,
            vocab,
            width,
            blocks,
            scale,
            launch.natural_of(scale),
            BLOCK=settings.block,
            num_warps=settings.warps,
        )

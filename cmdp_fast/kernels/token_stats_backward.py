"""Statistics, backward: one expression a column for the four upstream gradients, in one pass.

With t = L x - M, s = L y - N, where M and N are the normalisers in octaves rounded to float32 and r, q what rounding
left, p = 2^t 2^-r and w = 2^s 2^-q, and the table of gradients in `cmdp_fast/reference.py` becomes

    dx = 2^t (c0 + c1 t + c2 (t - s - center)) - c3 2^s + onehot c4,     center = R in octaves.

Splitting the normalisers keeps p to a rounding error although L x may be large. t - s is taken as a difference, so
that nearly equal models do not cancel, and R comes off it at once, so that models far apart do not either.
An upstream gradient that is None is compiled away, and with both KLs absent the teacher is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import launch
from cmdp_fast.kernels.shared import LN2, PER_NAT, locate, octaves

NO_TEACHER = tl.constexpr(-3e38)  # where the teacher excludes a column that matters, R is infinite and c2 is 0


@triton.jit
def split(normalizer):
    """A normaliser in octaves as float32, and what the rounding left."""
    exact = normalizer * PER_NAT
    rounded = exact.to(tl.float32)
    return rounded, (exact - rounded.to(tl.float64)).to(tl.float32)


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
    at = saved + row.to(tl.int64) * 4
    m, r = split(tl.load(at))
    x = tl.load(student + locate(row, x_inner, x_stride, x_outer_stride) + columns, mask=inside, other=0.0)
    t = octaves(x.to(tl.float32), scale, m)
    p = tl.exp2(t)
    weight = natural * tl.exp2(-r)

    constant = 0.0
    if g_logprob is not None:
        g_l = tl.load(g_logprob + row).to(tl.float32)
        constant -= g_l
    if g_forward_kl is not None:
        g_f = tl.load(g_forward_kl + row).to(tl.float32)
        constant += g_f
    factor = tl.zeros([BLOCK], tl.float32) + constant
    if g_entropy is not None:
        g_h = tl.load(g_entropy + row).to(tl.float32)
        h = tl.load(at + 2).to(tl.float32)
        factor -= g_h * (LN2 * (t - r) + h)
    if (g_reverse_kl is not None) or (g_forward_kl is not None):
        n, q = split(tl.load(at + 1))
        y = tl.load(teacher + locate(row, y_inner, y_stride, y_outer_stride) + columns, mask=inside, other=0.0)
        s = octaves(y.to(tl.float32), scale, n)
        # A NaN or infinity of the teacher has made every normaliser NaN; only -inf arrives here.
        if g_reverse_kl is not None:
            g_r = tl.load(g_reverse_kl + row).to(tl.float32)
            divergence = tl.load(at + 3)
            bounded = divergence != float("inf")
            g_r = tl.where(bounded, g_r, 0.0)
            divergence = tl.where(bounded, divergence, 0.0) * PER_NAT
            center = divergence.to(tl.float32)
            rest = (center.to(tl.float64) - divergence).to(tl.float32) + (q - r)
            difference = t - tl.maximum(s, NO_TEACHER, propagate_nan=tl.PropagateNan.ALL)
            factor += g_r * LN2 * ((difference - center) + rest)
    # Where p is 0 the bracket may be infinite, and 0 · anything = 0. A NaN stays one.
    value = weight * (p * tl.where(p == 0, 0.0, factor))
    if g_forward_kl is not None:
        value -= natural * tl.exp2(-q) * g_f * tl.exp2(s)
    if g_logprob is not None:
        value += tl.where(columns == tl.load(tokens + row), natural * g_l, 0.0)
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

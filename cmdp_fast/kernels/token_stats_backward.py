"""Statistics, backward: one expression a column for the four upstream gradients, in one pass.

With t = L x - M, s = L y - N, where M and N are the normalisers in octaves rounded to float32 and r, q what rounding
left, p = 2^t 2^-r and w = 2^s 2^-q. All constants of a row fold into a few coefficients, and the table of gradients in
`cmdp_fast/reference.py` becomes

    dx = 2^t (c0 + c1 t + c2 (t - s - center)) - c3 2^s,     center = R in octaves.

Splitting the normalisers keeps p to a rounding error although L x may be large. t - s is taken as a difference, so
that nearly equal models do not cancel, and R comes off it at once, so that models far apart do not either.
The token's own column is done apart, in double. An upstream gradient that is None is compiled away, and with both KLs
absent the main loop does not read the teacher.

A row with special values, or with coefficients so large that float32 may overflow on the way, is done in double.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import launch
from cmdp_fast.kernels.shared import LN2, PER_NAT, SAVED, locate, natural, octaves, taken, zero

MODEST = tl.constexpr(1e7)  # coefficients up to here do not overflow float32 on the way to a finite result


@triton.jit
def split(reference, log_sum):
    """A normaliser in octaves as float32, and what the rounding left."""
    exact = (reference + log_sum) * PER_NAT
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
def log_probabilities(x, y, at, scale):
    """log p and log w of some columns in nats and in double, -inf where excluded."""
    factor = natural(scale)
    log_p = (x.to(tl.float64) * factor - tl.load(at)) - tl.load(at + 2)
    log_w = (y.to(tl.float64) * factor - tl.load(at + 1)) - tl.load(at + 3)
    return log_p, log_w


@triton.jit
def careful_gradient(x, y, own, at, scale, g_l, g_h, g_r, g_f, LOGPROB: tl.constexpr, FORWARD: tl.constexpr):
    """dx of some columns in double. Excluded columns have probability 0, and 0 · anything = 0."""
    log_p, log_w = log_probabilities(x, y, at, scale)
    h, r = tl.load(at + 4), tl.load(at + 5)
    p, w = tl.exp2(log_p * PER_NAT), tl.exp2(log_w * PER_NAT)
    # Where R is infinite so is its gradient, which would poison the step: it passes none.
    bracket = tl.where(r == float("inf"), 0.0, g_r * ((log_p - log_w) - r)) - g_h * (log_p + h)
    value = tl.where(p == 0, 0.0, p * bracket)
    if FORWARD:
        value += g_f * (p - w)
    if LOGPROB:
        value += g_l * (tl.where(own, 1.0, 0.0) - p)
    return value * natural(scale)


@triton.jit
def tile_gradient(
    x_row,
    y_row,
    columns,
    inside,
    scale,
    m,
    n,
    center,
    c0,
    c1,
    c2,
    c3,
    ENTROPY: tl.constexpr,
    REVERSE: tl.constexpr,
    FORWARD: tl.constexpr,
):
    """dx of some columns but for the token's own; without special values."""
    t = octaves(taken(x_row, columns, inside), scale, m)
    p = tl.exp2(t)
    factor = tl.zeros_like(t) + c0
    if ENTROPY:
        factor = tl.fma(t, tl.zeros_like(t) + c1, factor)
    if y_row is not None:
        s = octaves(taken(y_row, columns, inside), scale, n)
        if REVERSE:
            factor = tl.fma((t - s) - center, tl.zeros_like(t) + c2, factor)
    # Where p is 0 the bracket may overflow, and 0 · anything = 0.
    value = p * tl.where(p == 0, 0.0, factor)
    if FORWARD:
        value = tl.fma(tl.exp2(s), tl.zeros_like(t) - c3, value)
    return value


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
    x_strides,
    y_strides,
    out_strides,
    vocab,
    width,
    blocks,
    scale,
    first_column,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """One program SPAN columns of a row, a TILE at a time. `out` may be the student's logits: a column is read, then
    written."""
    program = tl.program_id(0)
    row, block = program // blocks, program % blocks
    start = block * SPAN
    stop = tl.minimum(start + SPAN, width)
    to_row = out + locate(row, out_strides)
    tile = tl.arange(0, TILE)
    if mask is not None:
        if tl.load(mask + row) == 0:
            zero(to_row, start, stop, TILE)
            return
    at = saved + row.to(tl.int64) * SAVED
    x_row = student + locate(row, x_strides)
    y_row = teacher + locate(row, y_strides)
    g_l, g_h = upstream(g_logprob, row), upstream(g_entropy, row)
    g_r, g_f = upstream(g_reverse_kl, row), upstream(g_forward_kl, row)
    token = tl.zeros([], tl.int64)
    if g_logprob is not None:
        token = tl.load(tokens + row).to(tl.int64) - first_column

    m, r = split(tl.load(at), tl.load(at + 2))
    n, q = split(tl.load(at + 1), tl.load(at + 3))
    divergence = tl.load(at + 5) * PER_NAT
    center = divergence.to(tl.float32)
    along_t, along_difference = -g_h * LN2, g_r * LN2
    constant = g_f - g_l - g_h * tl.load(at + 4) - along_t * r
    if g_reverse_kl is not None:  # what the rounded center and normalisers left of t - s - R
        constant += along_difference * (center - divergence + (q - r))
    factor = natural(scale)
    weight = factor * tl.exp2(-r)
    c0, c1, c2 = weight * constant, weight * along_t, weight * along_difference
    c3 = factor * tl.exp2(-q) * g_f
    largest = tl.maximum(tl.maximum(tl.abs(c0), tl.abs(c1)), tl.maximum(tl.abs(c2), tl.abs(c3)))
    c0, c1, c2, c3 = c0.to(tl.float32), c1.to(tl.float32), c2.to(tl.float32), c3.to(tl.float32)

    if tl.where(largest >= MODEST, 1.0, tl.load(at + 6)) != 0:
        # Few columns at a time: this is rare, and the registers it takes count against the other way too.
        for first in range(start, stop, CAREFUL):
            columns = first + tl.arange(0, CAREFUL)
            inside = columns < vocab
            x = tl.load(x_row + columns, mask=inside, other=0.0)
            y = tl.load(y_row + columns, mask=inside, other=0.0)
            value = careful_gradient(
                x, y, columns == token, at, scale, g_l, g_h, g_r, g_f,
                g_logprob is not None, g_forward_kl is not None,
            )  # fmt: skip
            value = tl.where(inside, value, 0.0).to(tl.float32).to(out.dtype.element_ty)
            tl.store(to_row + columns, value, mask=columns < width)
        return

    own_here = (start <= token) & (token < tl.minimum(stop, vocab)) & (g_logprob is not None)
    own = tl.zeros([], tl.float32)
    if own_here:  # apart and in double, and read before a neighbour writes over it
        x, y = tl.load(x_row + token), tl.load(y_row + token)
        own += careful_gradient(
            x, y, True, at, scale, g_l, g_h, g_r, g_f, g_logprob is not None, g_forward_kl is not None
        ).to(tl.float32)
        tl.debug_barrier()
    with_teacher: tl.constexpr = (g_reverse_kl is not None) or (g_forward_kl is not None)
    with_y_row = y_row if with_teacher else None
    whole = start + tl.maximum(tl.minimum(stop, vocab) - start, 0) // TILE * TILE
    for first in range(start, whole, TILE):
        columns = first + tile
        value = tile_gradient(
            x_row, with_y_row, columns, None, scale, m, n, center, c0, c1, c2, c3,
            g_entropy is not None, g_reverse_kl is not None, g_forward_kl is not None,
        )  # fmt: skip
        tl.store(to_row + columns, value.to(out.dtype.element_ty))
    for first in range(whole, stop, TILE):
        columns = first + tile
        inside = columns < vocab
        value = tile_gradient(
            x_row, with_y_row, columns, inside, scale, m, n, center, c0, c1, c2, c3,
            g_entropy is not None, g_reverse_kl is not None, g_forward_kl is not None,
        )  # fmt: skip
        value = tl.where(inside, value, 0.0)
        tl.store(to_row + columns, value.to(out.dtype.element_ty), mask=columns < width)
    if own_here:
        tl.debug_barrier()
        tl.store(to_row + token, own.to(out.dtype.element_ty))


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
    first_column: int = 0,
) -> None:
    """Writes the gradient of the student's logits into ``out`` ``[..., V]``, which may be the logits themselves.

    They may be a tile of the vocabulary that begins at ``first_column``; ``saved`` is that of whole rows.
    """
    rows, width = launch.count_rows(student), student.shape[-1]
    if rows == 0:
        return
    settings = launch.column_settings(width)
    blocks = -(-width // settings.span)
    x, y, to = launch.rows_of(student), launch.rows_of(teacher), launch.rows_of(out)
    if to.tensor is not out:
        raise ValueError(f"the gradient must be writable with at most two strides, got strides {out.stride()}")
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
            x.strides,
            y.strides,
            to.strides,
            vocab,
            width,
            blocks,
            launch.scale_of(temperature),
            first_column,
            TILE=settings.tile,
            SPAN=settings.span,
            CAREFUL=settings.careful,
            **launch.compiled_for(settings.warps),
        )

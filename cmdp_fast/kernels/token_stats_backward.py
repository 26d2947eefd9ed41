"""Statistics, backward: one expression per column for the four upstream gradients, in one pass.

With t = L x - M, s = L y - N, where M and N are the normalisers in octaves rounded to float32 and r, q the rests that
rounding left, p = 2^t 2^-r and w = 2^s 2^-q. All constants of a row fold into a few coefficients, and the table of
gradients in `cmdp_fast/reference.py` becomes

    dx = 2^t (c0 + c1 t + c2 (t - s - center)) - c3 2^s,     center = R in octaves.

Splitting the normalisers keeps p to a rounding error although L x may be large. t - s is taken as a difference, so
that nearly equal models do not cancel, and R comes off it at once, so that models far apart do not either.
The token's own column is done apart, in double. An upstream gradient that is None is compiled away, and with both KLs
absent the main loop does not read the teacher.

A row with special values, or with coefficients so large that float32 may overflow on the way, is done in double.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.arrays import count_rows, of_rows, settled_upstream
from cmdp_fast.kernels import launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.shapes import Lanes, Pointer, Rows, constants
from cmdp_fast.kernels.shared import LN2, PER_NAT, SAVED, locate, natural, octaves, row_of, saved_row, taken, zero
from cmdp_fast.layout import Pair, Upstream

MODEST = tl.constexpr(1e7)  # coefficients up to here do not overflow float32 on the way to a finite result


class Normalisers(NamedTuple):
    """Those of a row in octaves, rounded to float32, and the rests that rounding left."""

    student: Lanes  # M
    student_rest: Lanes  # r
    teacher: Lanes  # N
    teacher_rest: Lanes  # q


class Flow(NamedTuple):
    """The upstream gradients of one row, in double; 0 where there is none."""

    logprob: Lanes
    entropy: Lanes
    reverse_kl: Lanes
    forward_kl: Lanes


class Slopes(NamedTuple):
    """The constants of a row, float32: see the top of this file."""

    student: Lanes  # M
    teacher: Lanes  # N
    center: Lanes
    constant: Lanes  # c0
    along_t: Lanes  # c1
    along_difference: Lanes  # c2
    teacher_weight: Lanes  # c3


class Target(NamedTuple):
    """Where a gradient is written, and how a row of it is cut into programs."""

    out: Pointer
    rows: Rows
    width: int  # columns of a row; those that do not count get 0
    blocks: int  # programs of a row


@triton.jit
def split(reference, log_sum):
    """A normaliser in octaves as float32, and the rest that rounding left."""
    exact = (reference + log_sum) * PER_NAT
    rounded = exact.to(tl.float32)
    return rounded, (exact - rounded.to(tl.float64)).to(tl.float32)


@triton.jit
def normalisers_of(numbers):
    """The normalisers of a `SavedRow`."""
    m, r = split(numbers.m, numbers.log_z)
    n, q = split(numbers.n, numbers.log_u)
    return Normalisers(m, r, n, q)


@triton.jit
def flowing(gradient, row):
    """The upstream gradient of a row in double; 0 if there is none."""
    if gradient is None:
        return tl.zeros([], tl.float64)
    else:
        return tl.load(gradient + row).to(tl.float64)


@triton.jit
def log_probabilities(x, y, numbers, scale):
    """log p and log w of some columns in nats and in double, -inf where excluded. numbers: a `SavedRow`."""
    factor = natural(scale)
    log_p = (x.to(tl.float64) * factor - numbers.m) - numbers.log_z
    log_w = (y.to(tl.float64) * factor - numbers.n) - numbers.log_u
    return log_p, log_w


@triton.jit
def careful_gradient(x, y, own, saved, scale, flow, upstream):
    """dx of some columns in double. Excluded columns have probability 0, and 0 · anything = 0.

    own: whether a column is the token's. flow: the row's `Flow`. upstream: the `Upstream`, whose None are left out.
    """
    numbers = saved_row(saved)  # loaded where it is needed: held all the time, it takes registers of the main loop
    log_p, log_w = log_probabilities(x, y, numbers, scale)
    h, r = numbers.entropy, numbers.reverse_kl
    p, w = tl.exp2(log_p * PER_NAT), tl.exp2(log_w * PER_NAT)
    # Where R is infinite so is its gradient, which would poison the step: it passes none.
    bracket = tl.where(r == float("inf"), 0.0, flow.reverse_kl * ((log_p - log_w) - r)) - flow.entropy * (log_p + h)
    value = tl.where(p == 0, 0.0, p * bracket)
    if upstream.forward_kl is not None:
        value += flow.forward_kl * (p - w)
    if upstream.logprob is not None:
        value += flow.logprob * (tl.where(own, 1.0, 0.0) - p)
    return value * natural(scale)


@triton.jit
def tile_gradient(row, columns, inside, slopes, upstream):
    """dx of some columns of a `Row` but for the token's own; without special values."""
    t = octaves(taken(row.student, columns, inside), row.scale, slopes.student)
    p = tl.exp2(t)
    factor = tl.zeros_like(t) + slopes.constant
    if upstream.entropy is not None:
        factor = tl.fma(t, tl.zeros_like(t) + slopes.along_t, factor)
    if (upstream.reverse_kl is not None) or (upstream.forward_kl is not None):
        s = octaves(taken(row.teacher, columns, inside), row.scale, slopes.teacher)
        if upstream.reverse_kl is not None:
            factor = tl.fma((t - s) - slopes.center, tl.zeros_like(t) + slopes.along_difference, factor)
    # Where p is 0 the bracket may overflow, and 0 · anything = 0.
    value = p * tl.where(p == 0, 0.0, factor)
    if upstream.forward_kl is not None:
        value = tl.fma(tl.exp2(s), tl.zeros_like(t) - slopes.teacher_weight, value)
    return value


@direct
@triton.jit
def backward_kernel(logits, saved, upstream, target, first_column, settings):
    """One program per `span` columns of a row, which it does a `tile` at a time. `target.out` may be the student's
    logits: a column is read, then written.

    logits: a `Logits`, whole or a tile of the vocabulary that begins at `first_column`. saved: [rows, SAVED] of whole
    rows. upstream: an `Upstream` of [rows]. target: a `Target`. settings: a `launch.Columns` of constants.
    """
    TILE: tl.constexpr = settings.tile
    CAREFUL: tl.constexpr = settings.careful
    program = tl.program_id(0)
    row, block = program // target.blocks, program % target.blocks
    width, vocab = target.width, logits.width
    start = block * settings.span
    stop = tl.minimum(start + settings.span, width)
    to_row = target.out + locate(row, target.rows)
    dtype = to_row.dtype.element_ty
    tile = tl.arange(0, TILE)
    if logits.mask is not None:
        if tl.load(logits.mask + row) == 0:
            zero(to_row, start, stop, TILE)
            return
    at = saved + row.to(tl.int64) * SAVED
    pair = row_of(row, logits)
    flow = Flow(
        flowing(upstream.logprob, row),
        flowing(upstream.entropy, row),
        flowing(upstream.reverse_kl, row),
        flowing(upstream.forward_kl, row),
    )
    token = tl.zeros([], tl.int64)
    if upstream.logprob is not None:
        token = tl.load(logits.tokens + row).to(tl.int64) - first_column

    numbers = saved_row(at)
    m, r, n, q = normalisers_of(numbers)
    divergence = numbers.reverse_kl * PER_NAT
    center = divergence.to(tl.float32)
    along_t, along_difference = -flow.entropy * LN2, flow.reverse_kl * LN2
    constant = flow.forward_kl - flow.logprob - flow.entropy * numbers.entropy - along_t * r
    if upstream.reverse_kl is not None:  # the rests of t - s - R that the rounded center and normalisers left
        constant += along_difference * (center - divergence + (q - r))
    factor = natural(logits.scale)
    weight = factor * tl.exp2(-r)
    c0, c1, c2 = weight * constant, weight * along_t, weight * along_difference
    c3 = factor * tl.exp2(-q) * flow.forward_kl
    largest = tl.maximum(tl.maximum(tl.abs(c0), tl.abs(c1)), tl.maximum(tl.abs(c2), tl.abs(c3)))
    slopes = Slopes(m, n, center, c0.to(tl.float32), c1.to(tl.float32), c2.to(tl.float32), c3.to(tl.float32))

    if tl.where(largest >= MODEST, 1.0, numbers.careful) != 0:
        # Few columns at a time: this is rare, and the registers it takes count against the other way too.
        for first in range(start, stop, CAREFUL):
            columns = first + tl.arange(0, CAREFUL)
            inside = columns < vocab
            x = tl.load(pair.student + columns, mask=inside, other=0.0)
            y = tl.load(pair.teacher + columns, mask=inside, other=0.0)
            value = careful_gradient(x, y, columns == token, at, logits.scale, flow, upstream)
            value = tl.where(inside, value, 0.0).to(tl.float32).to(dtype)
            tl.store(to_row + columns, value, mask=columns < width)
        return

    own_here = (start <= token) & (token < tl.minimum(stop, vocab)) & (upstream.logprob is not None)
    own = tl.zeros([], tl.float32)
    if own_here:  # apart and in double, and read before a neighbour writes over it
        x, y = tl.load(pair.student + token), tl.load(pair.teacher + token)
        own += careful_gradient(x, y, True, at, logits.scale, flow, upstream).to(tl.float32)
        tl.debug_barrier()
    whole = start + tl.maximum(tl.minimum(stop, vocab) - start, 0) // TILE * TILE
    for first in range(start, whole, TILE):
        columns = first + tile
        value = tile_gradient(pair, columns, None, slopes, upstream)
        tl.store(to_row + columns, value.to(dtype))
    for first in range(whole, stop, TILE):
        columns = first + tile
        inside = columns < vocab
        value = tl.where(inside, tile_gradient(pair, columns, inside, slopes, upstream), 0.0)
        tl.store(to_row + columns, value.to(dtype), mask=columns < width)
    if own_here:
        tl.debug_barrier()
        tl.store(to_row + token, own.to(dtype))


def token_stats_backward(pair: Pair, saved: Tensor, upstream: Upstream, out: Tensor, first_column: int = 0) -> None:
    """Writes the gradient of the student's logits into ``out`` ``[..., V]``, which may be the logits themselves.

    They may be a tile of the vocabulary that begins at ``first_column``; ``saved`` is that of whole rows.
    Columns from ``pair.width`` on get 0.
    """
    rows, width = count_rows(pair.student), pair.student.shape[-1]
    if rows == 0:
        return
    out_rows = launch.writable_rows(out)
    with launch.on(pair.student):
        logits = launch.logits_of(pair)
        flow = settled_upstream(upstream, None, pair.student)
        scalars = of_rows("the saved scalars", saved, torch.float64, pair.student, SAVED.value)

        def run(settings: launch.Columns, out: Tensor, out_rows: Rows, rows: int) -> None:
            blocks = -(-width // settings.span)
            backward_kernel[(rows * blocks,)](
                logits,
                scalars,
                flow,
                Target(out, out_rows, width, blocks),
                first_column,
                constants(settings),
                **launch.compiled_for(settings.warps),
            )

        settings = launch.column_settings(width)
        wide = launch.aligned(logits, launch.KNOWN) and launch.aligned_rows(out, out_rows, launch.KNOWN)
        if not wide:
            settings = launch.halved(settings)
        if launch.AUTOTUNE:
            arrived = "".join("0" if g is None else "1" for g in upstream)
            key = ("token_stats_backward", width, pair.student.dtype, pair.teacher.dtype, out.dtype, arrived, wide)
            scratch = launch.scratch_for(out, out_rows, rows)
            table = launch.column_choices(settings)
            settings = launch.tuned(table, key, pair.student, lambda choice: partial(run, choice, *scratch))
        run(settings, out, out_rows, rows)

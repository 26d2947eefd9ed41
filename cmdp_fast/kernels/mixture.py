"""Divergences from a mixture: c_teacher KL(w‖M) + c_student KL(p‖M) with M = (1 - b) p + b w, 0 < b < 1.

The mixture's logarithm needs both normalisers first, hence a second pass. Of each column the larger of p and w is taken
as the unit: with delta = log2 w - log2 p and rho = 2^-|delta| the mixture is g times the larger one,

    g = (1 - b) + b rho  or, if w > p,  b + (1 - b) rho,       min(b, 1 - b) <= g <= 1,
    log2(M/p) = log2 g + max(delta, 0),  log2(M/w) = log2 g + max(-delta, 0),

so that no logarithm of a probability is taken, and none of a large number. |delta| is bounded by 126: beyond it one
model has no weight in the column, and g, which is its own limit there, is above 0 for every b.

    value    -sum p c_student log(M/p) + w c_teacher log(M/w)
    gradient p (G - sum p G) / temperature,  G = -c_student log(M/p) - (1 - b)(c_student p + c_teacher w)/M

On an NVIDIA GPU log2 g and 1/g are one instruction each: lg2.approx, wrong by 2^-22 at most for 1/2 < g < 2 and by
2^-22 |log2 g| below, and rcp.approx, by one unit in the last place (PTX ISA). The errors of log2 g come into the value
with the weights c_student p + c_teacher w. Even if all had the same sign it would be wrong by ln 2 2^-22 (c_student +
c_teacher) max(1, log2 1/b, log2 1/(1 - b)): 1.7e-7 for the JSD. The models being equal, and both logarithms 0, eager
PyTorch takes differences of log-probabilities of about 10, which float32 has to 5e-7 each. A test puts the largest
errors in (tests/kernels/test_mixture_error.py).

The bound is absolute: g has lost what is small of a share, and so the value has of its digits where it is small itself.
Of models far apart at beta = .999 it is 8e-3, and the bound 2e-5 of it. The native kernels (csrc/cpu/mixture.h) take
the logarithm of 1 - v, to a relative error; here that would take some ten instructions more per column. A share below
2^-126 counts as none, so that models more than 126 octaves apart then are 126 octaves apart.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.arrays import count_rows, of_rows
from cmdp_fast.kernels import launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.fold import places, read, widened
from cmdp_fast.kernels.shapes import Folded, Lanes, Rows, constants
from cmdp_fast.kernels.shared import (
    LN2,
    PER_NAT,
    SAVED,
    aligned_row_of,
    locate,
    natural,
    octaves,
    row_of,
    saved_row,
    taken,
    zero,
)
from cmdp_fast.kernels.token_stats import parts, room_of, token_stats
from cmdp_fast.kernels.token_stats_backward import MODEST, Target, log_probabilities, normalisers_of
from cmdp_fast.layout import Mixture, Pair

FAR = tl.constexpr(126.0)
FAR_CAREFULLY = tl.constexpr(1000.0)


class Weights(NamedTuple):
    """A `Mixture` and 1 - b: from a b that was rounded to float32 it would have lost its digits near 1."""

    b: float
    rest: float
    c_teacher: float
    c_student: float


def weights_of(mixture: Mixture) -> Weights:
    return Weights(mixture.b, 1 - mixture.b, mixture.c_teacher, mixture.c_student)


class Saved(NamedTuple):
    """The numbers per row that a mixture's backward pass needs."""

    scalars: Tensor  # [rows, SAVED]
    mean: Tensor  # [rows]: sum p G


class Sums(NamedTuple):
    """Sums over columns, without the rests of the normalisers and in octaves."""

    student: Lanes  # p log2(M/p)
    teacher: Lanes  # w log2(M/w)
    shares: Lanes  # p (c_student p + c_teacher w)/M


@triton.jit
def clamped(x, low, high):
    """x within [low, high]; a NaN stays one."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log2_of(g, PTX: tl.constexpr):
    """log2 of numbers in (0, 1]: see the top of this file for its error."""
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [g], tl.float32, True, 1)
    else:
        return tl.log2(g)


@triton.jit
def reciprocal(g, PTX: tl.constexpr):
    """1/g."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [g], tl.float32, True, 1)
    else:
        return 1.0 / g


@triton.jit
def compared(t, s, rests, weights, PTX: tl.constexpr):
    """Of columns 2^t and 2^s: log2(M/p), log2(M/w), and (c_student p + c_teacher w)/M. weights: `Weights`.

    rests: what the octaves t and s leave out of delta.
    """
    b, rest, c_teacher, c_student = weights
    delta = s - t + rests
    ahead = delta > 0  # the teacher's is the larger
    distance = tl.minimum(tl.abs(delta), FAR)
    rho = tl.exp2(-distance)
    g = tl.fma(rho, tl.where(ahead, rest, b), tl.where(ahead, b, rest))
    log_g = log2_of(g, PTX)
    shares = tl.fma(rho, tl.where(ahead, c_student, c_teacher), tl.where(ahead, c_teacher, c_student))
    student, teacher = tl.where(ahead, distance, 0.0), tl.where(ahead, 0.0, distance)
    return log_g + student, log_g + teacher, shares * reciprocal(g, PTX)


@triton.jit
def add(sums, x, y, inside, scale, normalisers, weights, PTX: tl.constexpr):
    """One column [L] of both models into the `Sums`. One that is not `inside` counts for nothing; None: all are."""
    m, r, n, q = normalisers
    t, s = octaves(x, scale, m), octaves(y, scale, n)
    of_student, of_teacher, shares = compared(t, s, r - q, weights, PTX)
    p, w = tl.exp2(t), tl.exp2(s)
    if inside is not None:
        p, w = tl.where(inside, p, 0.0), tl.where(inside, w, 0.0)
    return Sums(
        tl.fma(p, of_student, sums.student), tl.fma(w, of_teacher, sums.teacher), tl.fma(p, shares, sums.shares)
    )


@triton.jit
def careful_terms(x, y, scale, saved, weights):
    """A column's share of the value, p, and G, in double."""
    b, rest, c_teacher, c_student = weights
    log_p, log_w = log_probabilities(x, y, saved_row(saved), scale)
    log_p, log_w = log_p * PER_NAT, log_w * PER_NAT
    p, w = tl.exp2(log_p), tl.exp2(log_w)
    delta = clamped(tl.where((p == 0) & (w == 0), 0.0, log_w - log_p), -FAR_CAREFULLY, FAR_CAREFULLY)
    ahead = delta > 0
    distance = tl.abs(delta)
    rho = tl.exp2(-distance)
    log_g = tl.log2(tl.where(ahead, rest, b) * rho + tl.where(ahead, b, rest))
    of_student, of_teacher = log_g + tl.where(ahead, distance, 0.0), log_g + tl.where(ahead, 0.0, distance)
    value = -(p * c_student * of_student + w * c_teacher * of_teacher) * LN2
    shares = tl.where(ahead, c_student * rho + c_teacher, c_student + c_teacher * rho) * tl.exp2(-log_g)
    slope = -c_student * LN2 * of_student - rest * shares
    return value, p, slope


@direct
@triton.jit
def mixture_kernel(folded, saved, weights, settings, ALIGNED: tl.constexpr, PTX: tl.constexpr):
    """One program per segment of a row, which is read as the statistics' loop reads it.

    folded: a `Folded` whose `partial`, [rows, segments, 2], gets the sums of the values and of p G. saved: [rows,
    SAVED]. weights: `Weights`. settings: a `launch.Forward` of constants. ALIGNED, PTX: as `fold`.
    """
    LANES: tl.constexpr = settings.lanes
    VECTOR: tl.constexpr = settings.vector
    program = tl.program_id(0)
    row, segment = program // folded.segments, program % folded.segments
    logits = folded.logits
    if logits.mask is not None:
        if tl.load(logits.mask + row) == 0:
            return
    if ALIGNED:
        pair = aligned_row_of(row, logits, VECTOR)
    else:
        pair = row_of(row, logits)
    at = saved + row.to(tl.int64) * SAVED
    start = segment * settings.segment
    stop = tl.minimum(start + settings.segment, logits.width)
    to = folded.partial + program.to(tl.int64) * 2
    if saved_row(at).careful != 0:
        total = tl.zeros([LANES], tl.float64)
        slopes = tl.zeros([LANES], tl.float64)
        for first in range(start, stop, LANES):
            lane = first + tl.arange(0, LANES)
            inside = lane < stop
            x = tl.load(pair.student + lane, mask=inside, other=0.0)
            y = tl.load(pair.teacher + lane, mask=inside, other=0.0)
            v, p, slope = careful_terms(x, y, pair.scale, at, weights)
            total += tl.where(inside, v, 0.0)
            slopes += tl.where(inside, p * slope, 0.0)
        tl.store(to, tl.sum(total, 0))
        tl.store(to + 1, tl.sum(slopes, 0))
        return
    normalisers = normalisers_of(saved_row(at))
    X: tl.constexpr = pair.student.dtype.element_ty
    Y: tl.constexpr = pair.teacher.dtype.element_ty
    x_halves: tl.constexpr = 2 if ALIGNED and X.primitive_bitwidth == 16 else 1
    y_halves: tl.constexpr = 2 if ALIGNED and Y.primitive_bitwidth == 16 else 1
    tile: tl.constexpr = LANES * VECTOR
    tiles = (stop - start) // tile
    x_at = places(pair.student + start, LANES, VECTOR, ALIGNED)
    y_at = places(pair.teacher + start, LANES, VECTOR, ALIGNED)
    zeros = tl.zeros([LANES], tl.float32)
    sums = Sums(zeros, zeros, zeros)
    for _ in range(tiles):
        xs = read(x_at, LANES, VECTOR, 1, ALIGNED)
        ys = read(y_at, LANES, VECTOR, 1, ALIGNED)
        for i in tl.static_range(VECTOR):
            x = widened(xs[i // x_halves], X, i % x_halves)
            y = widened(ys[i // y_halves], Y, i % y_halves)
            sums = add(sums, x, y, None, pair.scale, normalisers, weights, PTX)
        x_at += tile // x_halves
        y_at += tile // y_halves
    for first in range(start + tiles * tile, stop, LANES):  # the rest, a column per step
        columns = first + tl.arange(0, LANES)
        inside = columns < stop
        x, y = taken(pair.student, columns, inside), taken(pair.teacher, columns, inside)
        sums = add(sums, x, y, inside, pair.scale, normalisers, weights, PTX)
    _, rest, c_teacher, c_student = weights
    student_rest, teacher_rest = tl.exp2(-normalisers.student_rest), tl.exp2(-normalisers.teacher_rest)
    student = tl.sum(sums.student, 0).to(tl.float64) * student_rest * c_student * LN2
    teacher = tl.sum(sums.teacher, 0).to(tl.float64) * teacher_rest * c_teacher * LN2
    shares = tl.sum(sums.shares, 0).to(tl.float64) * student_rest * rest
    tl.store(to, -(student + teacher))
    tl.store(to + 1, -(student + shares))


@direct
@triton.jit
def finish_kernel(mask, partial, value, mean, segments, PARTS: tl.constexpr):
    """One program per row: adds its segments, in double and in a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    count = segments
    if mask is not None:
        count = tl.where(tl.load(mask + row) != 0, segments, 0)
    part = tl.arange(0, PARTS)
    present = part < count
    at = partial + (row * segments + part) * 2
    total = tl.sum(tl.load(at, mask=present, other=0.0), 0)
    tl.store(value + row, tl.where(total < 0, 0.0, total).to(tl.float32))
    tl.store(mean + row, tl.sum(tl.load(at + 1, mask=present, other=0.0), 0))


class Slopes(NamedTuple):
    """The constants of a row: its gradient is 2^t (constant + along_log log2(M/p) + along_shares shares)."""

    constant: Lanes
    along_log: Lanes
    along_shares: Lanes


@triton.jit
def tile_gradient(row, columns, inside, normalisers, slopes, weights, PTX: tl.constexpr):
    """The gradient of some columns of a `Row`; without special values."""
    m, r, n, q = normalisers
    t = octaves(taken(row.student, columns, inside), row.scale, m)
    s = octaves(taken(row.teacher, columns, inside), row.scale, n)
    distance, _, shares = compared(t, s, r - q, weights, PTX)
    slope = tl.fma(distance, tl.zeros_like(t) + slopes.along_log, tl.zeros_like(t) + slopes.constant)
    return tl.exp2(t) * tl.fma(shares, tl.zeros_like(t) + slopes.along_shares, slope)


@direct
@triton.jit
def backward_kernel(logits, saved, upstream, target, weights, settings, PTX: tl.constexpr):
    """One program per `span` columns of a row, which it does a `tile` at a time.

    logits: a `Logits`. saved: a `Saved`. upstream: [rows]. target: a `Target`. weights: `Weights`. settings: a
    `launch.Columns` of constants. PTX: as `fold`.
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
    at = saved.scalars + row.to(tl.int64) * SAVED
    pair = row_of(row, logits)
    center = tl.load(saved.mean + row)
    outer = tl.load(upstream + row).to(tl.float64) * natural(pair.scale)
    if tl.where(tl.abs(outer) >= MODEST, 1.0, saved_row(at).careful) != 0:
        for first in range(start, stop, CAREFUL):
            columns = first + tl.arange(0, CAREFUL)
            inside = columns < vocab
            x = tl.load(pair.student + columns, mask=inside, other=0.0)
            y = tl.load(pair.teacher + columns, mask=inside, other=0.0)
            _, p, slope = careful_terms(x, y, pair.scale, at, weights)
            value = tl.where(inside, p * (slope - center) * outer, 0.0).to(tl.float32)
            tl.store(to_row + columns, value.to(dtype), mask=columns < width)
        return
    normalisers = normalisers_of(saved_row(at))
    _, rest, _, c_student = weights
    factor = (outer * tl.exp2(-normalisers.student_rest)).to(tl.float32)
    slopes = Slopes(-factor * center.to(tl.float32), -factor * (c_student * LN2), -factor * rest)
    whole = start + tl.maximum(tl.minimum(stop, vocab) - start, 0) // TILE * TILE
    for first in range(start, whole, TILE):
        columns = first + tile
        value = tile_gradient(pair, columns, None, normalisers, slopes, weights, PTX)
        tl.store(to_row + columns, value.to(dtype))
    for first in range(whole, stop, TILE):
        columns = first + tile
        inside = columns < vocab
        value = tile_gradient(pair, columns, inside, normalisers, slopes, weights, PTX)
        tl.store(to_row + columns, tl.where(inside, value, 0.0).to(dtype), mask=columns < width)


def mixture(pair: Pair, weights: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence ``[...]`` float32; saved scalars ``[..., SAVED]`` and the mean of G ``[...]``, both float64."""
    shape, rows = pair.student.shape[:-1], count_rows(pair.student)
    pair = pair._replace(tokens=None)
    _, saved = token_stats(pair)
    value = pair.student.new_empty(shape, dtype=torch.float32)
    mean = pair.student.new_empty(shape, dtype=torch.float64)
    if rows == 0:
        return value, saved, mean
    with launch.on(pair.student):
        logits, dtypes = launch.logits_of(pair), (pair.student.dtype, pair.teacher.dtype)
        settings = launch.forward_settings(pair.width, *dtypes)
        wide_loads = launch.aligned(logits, settings.vector)

        def run(settings: launch.Forward, folded: Folded) -> None:
            mixture_kernel[(rows * folded.segments,)](
                folded,
                saved,
                weights_of(weights),
                constants(settings),
                ALIGNED=wide_loads,
                PTX=launch.speaks_ptx(),
                **launch.compiled_for(settings.warps),
            )

        if launch.AUTOTUNE:
            key = ("mixture", pair.width, *dtypes)
            # It takes `vector` columns a step.
            table = [choice for choice in launch.forward_choices(settings, pair.width) if choice.step == settings.step]
            settings = launch.tuned(
                table, key, pair.student, lambda choice: partial(run, choice, room_of(pair, logits, choice, 2))
            )
        folded = room_of(pair, logits, settings, 2)
        run(settings, folded)
        finish_kernel[(rows,)](
            logits.mask, folded.partial, value, mean, folded.segments, PARTS=parts(folded), **launch.compiled_for(1)
        )
    return value, saved, mean


def mixture_backward(pair: Pair, saved: Tensor, mean: Tensor, upstream: Tensor, weights: Mixture, out: Tensor) -> None:
    """Writes the gradient of the student's logits into ``out``, contiguous ``[..., V]``. Columns from ``pair.width`` on
    get 0."""
    rows, width = count_rows(pair.student), pair.student.shape[-1]
    if rows == 0:
        return
    with launch.on(pair.student):
        logits = launch.logits_of(pair._replace(tokens=None))
        of_student = Saved(
            of_rows("the saved scalars", saved, torch.float64, pair.student, SAVED.value),
            of_rows("the saved mean", mean, torch.float64, pair.student),
        )
        upstream = of_rows("a gradient", upstream, None, pair.student)

        def run(settings: launch.Columns, out: Tensor, out_rows: Rows, rows: int) -> None:
            blocks = -(-width // settings.span)
            backward_kernel[(rows * blocks,)](
                logits,
                of_student,
                upstream,
                Target(out, out_rows, width, blocks),
                weights_of(weights),
                constants(settings),
                PTX=launch.speaks_ptx(),
                **launch.compiled_for(settings.warps),
            )

        settings = launch.halved(launch.column_settings(width))  # 16 columns per thread take 72 registers and more
        out_rows = launch.writable_rows(out)
        if launch.AUTOTUNE:
            key = ("mixture_backward", width, pair.student.dtype, pair.teacher.dtype, out.dtype)
            scratch = launch.scratch_for(out, out_rows, rows)
            table = launch.column_choices(settings)
            settings = launch.tuned(table, key, pair.student, lambda choice: partial(run, choice, *scratch))
        run(settings, out, out_rows, rows)

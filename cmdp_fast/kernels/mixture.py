"""Divergences from a mixture: c_teacher KL(w‖M) + c_student KL(p‖M) with M = (1 - b) p + b w, 0 < b < 1.

The mixture's logarithm needs both normalisers first, hence a second pass. With rho = w/p = 2^delta the mixture is p g,
g = (1 - b) + b rho, so that log p - log M = -log g and log w - log M = delta - log g: no logarithm of a probability is
taken. Clamping delta to ±126 changes nothing: beyond it one model has no weight in the column, and delta - log g has
reached its limit -log b.

    value    sum p (-c_student log g) + w c_teacher (delta - log g)
    gradient p (G - sum p G) / temperature,  G = -c_student log g - (1 - b)(c_student + c_teacher rho)/g
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.fold import places, read, widened
from cmdp_fast.kernels.shapes import Folded, constants
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
from cmdp_fast.kernels.token_stats import parts, token_stats
from cmdp_fast.kernels.token_stats_backward import MODEST, Target, log_probabilities, normalisers_of
from cmdp_fast.layout import Mixture, Pair

FAR = tl.constexpr(126.0)
FAR_CAREFULLY = tl.constexpr(1000.0)


class Saved(NamedTuple):
    """The numbers per row that a mixture's backward pass needs."""

    scalars: Tensor  # [rows, SAVED]
    mean: Tensor  # [rows]: sum p G


@triton.jit
def clamped(x, low, high):
    """x within [low, high]; a NaN stays one."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def terms(x, y, scale, normalisers, weights):
    """A column's share of the value, p, and G; without special values. weights: a `Mixture`."""
    m, r, n, q = normalisers
    b, c_teacher, c_student = weights
    t, s = octaves(x, scale, m), octaves(y, scale, n)
    p, w = tl.exp2(t) * tl.exp2(-r), tl.exp2(s) * tl.exp2(-q)
    delta = tl.minimum(tl.maximum(s - t + (r - q), -FAR), FAR)
    rho = tl.exp2(delta)
    g = tl.fma(rho, tl.zeros_like(rho) + b, tl.zeros_like(rho) + (1 - b))
    # In octaves until after the subtraction: where one model has no weight, delta and log g are both about 126.
    log_g = tl.log2(g)
    value = (w * c_teacher * (delta - log_g) - p * c_student * log_g) * LN2
    slope = -c_student * LN2 * log_g - (1 - b) * (c_student + c_teacher * rho) / g
    return value, p, slope


@triton.jit
def careful_terms(x, y, scale, saved, weights):
    """As `terms`, in double."""
    b, c_teacher, c_student = weights
    log_p, log_w = log_probabilities(x, y, saved_row(saved), scale)
    log_p, log_w = log_p * PER_NAT, log_w * PER_NAT
    p, w = tl.exp2(log_p), tl.exp2(log_w)
    delta = clamped(tl.where((p == 0) & (w == 0), 0.0, log_w - log_p), -FAR_CAREFULLY, FAR_CAREFULLY)
    rho = tl.exp2(delta)
    g = (1 - b) + b * rho
    log_g = tl.log2(g)
    value = (w * c_teacher * (delta - log_g) - p * c_student * log_g) * LN2
    slope = -c_student * LN2 * log_g - (1 - b) * (c_student + c_teacher * rho) / g
    return value, p, slope


@direct
@triton.jit
def mixture_kernel(folded, saved, weights, settings, ALIGNED: tl.constexpr):
    """One program per segment of a row, which is read as the statistics' loop reads it.

    folded: a `Folded` whose `partial`, [rows, segments, 2], gets the sums of the values and of p G. saved: [rows,
    SAVED]. weights: a `Mixture`. settings: a `launch.Forward` of constants. ALIGNED: as `fold`.
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
    numbers = saved_row(at)
    normalisers = normalisers_of(numbers)
    start = segment * settings.segment
    stop = tl.minimum(start + settings.segment, logits.width)
    to = folded.partial + program.to(tl.int64) * 2
    if numbers.careful != 0:
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
    X: tl.constexpr = pair.student.dtype.element_ty
    Y: tl.constexpr = pair.teacher.dtype.element_ty
    x_halves: tl.constexpr = 2 if ALIGNED and X.primitive_bitwidth == 16 else 1
    y_halves: tl.constexpr = 2 if ALIGNED and Y.primitive_bitwidth == 16 else 1
    tile: tl.constexpr = LANES * VECTOR
    tiles = (stop - start) // tile
    x_at = places(pair.student + start, LANES, VECTOR, ALIGNED)
    y_at = places(pair.teacher + start, LANES, VECTOR, ALIGNED)
    value = tl.zeros([LANES], tl.float32)
    mean = tl.zeros([LANES], tl.float32)
    for _ in range(tiles):
        xs = read(x_at, LANES, VECTOR, 1, ALIGNED)
        ys = read(y_at, LANES, VECTOR, 1, ALIGNED)
        for i in tl.static_range(VECTOR):
            x = widened(xs[i // x_halves], X, i % x_halves)
            y = widened(ys[i // y_halves], Y, i % y_halves)
            v, p, slope = terms(x, y, pair.scale, normalisers, weights)
            value += v
            mean = tl.fma(p, slope, mean)
        x_at += tile // x_halves
        y_at += tile // y_halves
    for first in range(start + tiles * tile, stop, LANES):  # the rest, a column per step
        columns = first + tl.arange(0, LANES)
        inside = columns < stop
        x, y = taken(pair.student, columns, inside), taken(pair.teacher, columns, inside)
        v, p, slope = terms(x, y, pair.scale, normalisers, weights)
        value += tl.where(inside, v, 0.0)
        mean += tl.where(inside, p * slope, 0.0)
    tl.store(to, tl.sum(value, 0).to(tl.float64))
    tl.store(to + 1, tl.sum(mean, 0).to(tl.float64))


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


@direct
@triton.jit
def backward_kernel(logits, saved, upstream, target, weights, settings):
    """One program per `span` columns of a row, which it does a `tile` at a time.

    logits: a `Logits`. saved: a `Saved`. upstream: [rows]. target: a `Target`. weights: a `Mixture`. settings: a
    `launch.Columns` of constants.
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
    middle, factor = center.to(tl.float32), outer.to(tl.float32)
    whole = start + tl.maximum(tl.minimum(stop, vocab) - start, 0) // TILE * TILE
    for first in range(start, whole, TILE):
        columns = first + tile
        x, y = taken(pair.student, columns, None), taken(pair.teacher, columns, None)
        _, p, slope = terms(x, y, pair.scale, normalisers, weights)
        tl.store(to_row + columns, (p * (slope - middle) * factor).to(dtype))
    for first in range(whole, stop, TILE):
        columns = first + tile
        inside = columns < vocab
        x, y = taken(pair.student, columns, inside), taken(pair.teacher, columns, inside)
        _, p, slope = terms(x, y, pair.scale, normalisers, weights)
        value = p * (slope - middle) * factor
        tl.store(to_row + columns, tl.where(inside, value, 0.0).to(dtype), mask=columns < width)


def mixture(pair: Pair, weights: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence ``[...]`` float32; saved scalars ``[..., SAVED]`` and the mean of G ``[...]``, both float64."""
    shape, rows = pair.student.shape[:-1], launch.count_rows(pair.student)
    pair = pair._replace(tokens=None)
    _, saved = token_stats(pair)
    value = pair.student.new_empty(shape, dtype=torch.float32)
    mean = pair.student.new_empty(shape, dtype=torch.float64)
    if rows == 0:
        return value, saved, mean
    with launch.on(pair.student):
        settings = launch.forward_settings(pair.width, pair.student.dtype, pair.teacher.dtype)
        segments = launch.segments(pair.width, settings)
        partial = pair.student.new_empty((rows, segments, 2), dtype=torch.float64)
        folded = Folded(launch.logits_of(pair), partial, segments)
        mixture_kernel[(rows * segments,)](
            folded,
            saved,
            weights,
            constants(settings),
            ALIGNED=launch.aligned(folded.logits, settings.vector),
            **launch.compiled_for(settings.warps),
        )
        finish_kernel[(rows,)](
            folded.logits.mask, partial, value, mean, segments, PARTS=parts(folded), **launch.compiled_for(1)
        )
    return value, saved, mean


def mixture_backward(pair: Pair, saved: Tensor, mean: Tensor, upstream: Tensor, weights: Mixture, out: Tensor) -> None:
    """Writes the gradient of the student's logits into ``out``, contiguous ``[..., V]``. Columns from ``pair.width`` on
    get 0."""
    rows, width = launch.count_rows(pair.student), pair.student.shape[-1]
    if rows == 0:
        return
    settings = launch.column_settings(width)
    blocks = -(-width // settings.span)
    with launch.on(pair.student):
        backward_kernel[(rows * blocks,)](
            launch.logits_of(pair._replace(tokens=None)),
            Saved(saved, mean),
            upstream.contiguous(),
            Target(*launch.rows_of(out), width, blocks),
            weights,
            constants(settings),
            **launch.compiled_for(settings.warps),
        )

"""Divergences from a mixture: c_teacher KL(w‖M) + c_student KL(p‖M) with M = (1 - b) p + b w, 0 < b < 1.

The mixture's logarithm needs both normalisers first, hence a second pass. With rho = w/p = 2^delta the mixture is p g,
g = (1 - b) + b rho, so that log p - log M = -log g and log w - log M = delta - log g: no logarithm of a probability is
taken. Clamping delta to ±126 changes nothing: beyond it one model has no weight in the column, and delta - log g has
reached its limit -log b.

    value    sum p (-c_student log g) + w c_teacher (delta - log g)
    gradient p (G - sum p G) / temperature,  G = -c_student log g - (1 - b)(c_student + c_teacher rho)/g
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import launch
from cmdp_fast.kernels.fold import places, read, widened
from cmdp_fast.kernels.shared import LN2, PER_NAT, SAVED, locate, natural, octaves, taken, zero
from cmdp_fast.kernels.token_stats import token_stats
from cmdp_fast.kernels.token_stats_backward import MODEST, log_probabilities, split

FAR = tl.constexpr(126.0)
FAR_CAREFULLY = tl.constexpr(1000.0)


@triton.jit
def clamped(x, low, high):
    """x within [low, high]; a NaN stays one."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def terms(x, y, scale, m, r, n, q, b, c_teacher, c_student):
    """A column's share of the value, p, and G; without special values."""
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
def careful_terms(x, y, scale, at, b, c_teacher, c_student):
    """As `terms`, in double."""
    log_p, log_w = log_probabilities(x, y, at, scale)
    log_p, log_w = log_p * PER_NAT, log_w * PER_NAT
    p, w = tl.exp2(log_p), tl.exp2(log_w)
    delta = clamped(tl.where((p == 0) & (w == 0), 0.0, log_w - log_p), -FAR_CAREFULLY, FAR_CAREFULLY)
    rho = tl.exp2(delta)
    g = (1 - b) + b * rho
    log_g = tl.log2(g)
    value = (w * c_teacher * (delta - log_g) - p * c_student * log_g) * LN2
    slope = -c_student * LN2 * log_g - (1 - b) * (c_student + c_teacher * rho) / g
    return value, p, slope


@triton.jit
def mixture_kernel(
    student,
    teacher,
    mask,
    saved,
    partial,
    x_strides,
    y_strides,
    vocab,
    segments,
    scale,
    b,
    c_teacher,
    c_student,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SEGMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program a segment of a row, read as the statistics' loop reads it; the sums of the values and of p G go to
    partial [rows, segments, 2]."""
    program = tl.program_id(0)
    row, segment = program // segments, program % segments
    if mask is not None:
        if tl.load(mask + row) == 0:
            return
    x_offset = locate(row, x_strides)
    y_offset = locate(row, y_strides)
    if ALIGNED:
        x_offset, y_offset = tl.multiple_of(x_offset, VECTOR), tl.multiple_of(y_offset, VECTOR)
    x_row, y_row = student + x_offset, teacher + y_offset
    at = saved + row.to(tl.int64) * SAVED
    m, r = split(tl.load(at), tl.load(at + 2))
    n, q = split(tl.load(at + 1), tl.load(at + 3))
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, vocab)
    to = partial + program.to(tl.int64) * 2
    if tl.load(at + 6) != 0:
        total = tl.zeros([LANES], tl.float64)
        slopes = tl.zeros([LANES], tl.float64)
        for first in range(start, stop, LANES):
            lane = first + tl.arange(0, LANES)
            inside = lane < stop
            x = tl.load(x_row + lane, mask=inside, other=0.0)
            y = tl.load(y_row + lane, mask=inside, other=0.0)
            v, p, slope = careful_terms(x, y, scale, at, b, c_teacher, c_student)
            total += tl.where(inside, v, 0.0)
            slopes += tl.where(inside, p * slope, 0.0)
        tl.store(to, tl.sum(total, 0))
        tl.store(to + 1, tl.sum(slopes, 0))
        return
    X: tl.constexpr = x_row.dtype.element_ty
    Y: tl.constexpr = y_row.dtype.element_ty
    x_halves: tl.constexpr = 2 if ALIGNED and X.primitive_bitwidth == 16 else 1
    y_halves: tl.constexpr = 2 if ALIGNED and Y.primitive_bitwidth == 16 else 1
    loads: tl.constexpr = 1 if ALIGNED else VECTOR
    tile: tl.constexpr = LANES * VECTOR
    tiles = (stop - start) // tile
    x_at = places(x_row + start, LANES, VECTOR, ALIGNED)
    y_at = places(y_row + start, LANES, VECTOR, ALIGNED)
    value = tl.zeros([LANES], tl.float32)
    mean = tl.zeros([LANES], tl.float32)
    for _ in range(tiles):
        xs = read(x_at, LANES, VECTOR, loads, ALIGNED)
        ys = read(y_at, LANES, VECTOR, loads, ALIGNED)
        for i in tl.static_range(VECTOR):
            x = widened(xs[i // x_halves], X, i % x_halves)
            y = widened(ys[i // y_halves], Y, i % y_halves)
            v, p, slope = terms(x, y, scale, m, r, n, q, b, c_teacher, c_student)
            value += v
            mean = tl.fma(p, slope, mean)
        x_at += tile // x_halves
        y_at += tile // y_halves
    for first in range(start + tiles * tile, stop, LANES):  # what is left, a column a step
        columns = first + tl.arange(0, LANES)
        inside = columns < stop
        x, y = taken(x_row, columns, inside), taken(y_row, columns, inside)
        v, p, slope = terms(x, y, scale, m, r, n, q, b, c_teacher, c_student)
        value += tl.where(inside, v, 0.0)
        mean += tl.where(inside, p * slope, 0.0)
    tl.store(to, tl.sum(value, 0).to(tl.float64))
    tl.store(to + 1, tl.sum(mean, 0).to(tl.float64))


@triton.jit
def finish_kernel(mask, partial, value, mean, segments, PARTS: tl.constexpr):
    """One program a row: adds its segments, in double and in a fixed order."""
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


@triton.jit
def backward_kernel(
    student,
    teacher,
    mask,
    saved,
    mean,
    upstream,
    out,
    x_strides,
    y_strides,
    out_strides,
    vocab,
    width,
    blocks,
    scale,
    b,
    c_teacher,
    c_student,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """One program SPAN columns of a row, a TILE at a time."""
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
    center = tl.load(mean + row)
    outer = tl.load(upstream + row).to(tl.float64) * natural(scale)
    if tl.where(tl.abs(outer) >= MODEST, 1.0, tl.load(at + 6)) != 0:
        for first in range(start, stop, CAREFUL):
            columns = first + tl.arange(0, CAREFUL)
            inside = columns < vocab
            x = tl.load(x_row + columns, mask=inside, other=0.0)
            y = tl.load(y_row + columns, mask=inside, other=0.0)
            _, p, slope = careful_terms(x, y, scale, at, b, c_teacher, c_student)
            value = tl.where(inside, p * (slope - center) * outer, 0.0).to(tl.float32)
            tl.store(to_row + columns, value.to(out.dtype.element_ty), mask=columns < width)
        return
    m, r = split(tl.load(at), tl.load(at + 2))
    n, q = split(tl.load(at + 1), tl.load(at + 3))
    middle, factor = center.to(tl.float32), outer.to(tl.float32)
    whole = start + tl.maximum(tl.minimum(stop, vocab) - start, 0) // TILE * TILE
    for first in range(start, whole, TILE):
        columns = first + tile
        x, y = taken(x_row, columns, None), taken(y_row, columns, None)
        _, p, slope = terms(x, y, scale, m, r, n, q, b, c_teacher, c_student)
        tl.store(to_row + columns, (p * (slope - middle) * factor).to(out.dtype.element_ty))
    for first in range(whole, stop, TILE):
        columns = first + tile
        inside = columns < vocab
        x, y = taken(x_row, columns, inside), taken(y_row, columns, inside)
        _, p, slope = terms(x, y, scale, m, r, n, q, b, c_teacher, c_student)
        value = p * (slope - middle) * factor
        tl.store(to_row + columns, tl.where(inside, value, 0.0).to(out.dtype.element_ty), mask=columns < width)


def mixture(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float, vocab: int, weights: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence ``[...]`` float32; saved scalars ``[..., SAVED]`` and the mean of G ``[...]``, both float64.

    ``weights``: b, c_teacher, c_student.
    """
    shape, rows = student.shape[:-1], launch.count_rows(student)
    _, saved = token_stats(student, teacher, None, mask, temperature, vocab)
    value = student.new_empty(shape, dtype=torch.float32)
    mean = student.new_empty(shape, dtype=torch.float64)
    if rows == 0:
        return value, saved, mean
    x, y, keep = launch.rows_of(student), launch.rows_of(teacher), launch.flags(mask)
    with launch.on(student):
        settings = launch.forward_settings(vocab, student.dtype, teacher.dtype)
        segments = launch.segments(vocab, settings)
        partial = student.new_empty((rows, segments, 2), dtype=torch.float64)
        mixture_kernel[(rows * segments,)](
            x.tensor,
            y.tensor,
            keep,
            saved,
            partial,
            x.strides,
            y.strides,
            vocab,
            segments,
            launch.scale_of(temperature),
            *weights,
            LANES=settings.lanes,
            VECTOR=settings.vector,
            SEGMENT=settings.segment,
            ALIGNED=launch.aligned(x, settings.vector) and launch.aligned(y, settings.vector),
            **launch.compiled_for(settings.warps),
        )
        finish_kernel[(rows,)](
            keep, partial, value, mean, segments, PARTS=triton.next_power_of_2(segments), **launch.compiled_for(1)
        )
    return value, saved, mean


def mixture_backward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    mean: Tensor,
    upstream: Tensor,
    temperature: float,
    vocab: int,
    weights: tuple[float, ...],
    out: Tensor,
) -> None:
    """Writes the gradient of the student's logits into ``out``, contiguous ``[..., V]``."""
    rows, width = launch.count_rows(student), student.shape[-1]
    if rows == 0:
        return
    settings = launch.column_settings(width)
    blocks = -(-width // settings.span)
    x, y, to = launch.rows_of(student), launch.rows_of(teacher), launch.rows_of(out)
    with launch.on(student):
        backward_kernel[(rows * blocks,)](
            x.tensor,
            y.tensor,
            launch.flags(mask),
            saved,
            mean,
            upstream.contiguous(),
            to.tensor,
            x.strides,
            y.strides,
            to.strides,
            vocab,
            width,
            blocks,
            launch.scale_of(temperature),
            *weights,
            TILE=settings.tile,
            SPAN=settings.span,
            CAREFUL=settings.careful,
            **launch.compiled_for(settings.warps),
        )

"""Statistics, forward: all six values and the saved scalars from one read of both rows.

Why memory is read once: the state of `csrc/token_state.h` streams. Each lane (one thread) keeps the state of the
columns it has seen, so that the loop (`cmdp_fast.kernels.fold`) needs neither a barrier nor a shuffle. Lanes are merged
once, at the end.
Why it is exact: a state is exact relative to any finite reference, and merging is associative and commutative.

A row is split into segments, one program each; the number of segments depends on V alone. `finish_kernel` merges their
states in a fixed order. The same row therefore gives bitwise the same result in every batch and every run.

The loop takes logits as a language model says them. -inf, NaN, infinities or an abyss such as finfo.min show up as a
sum that is not finite (0 · inf); the program then folds its segment again, carefully.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import launch
from cmdp_fast.kernels.fold import fold
from cmdp_fast.kernels.shared import (
    LN2,
    STATE_FIELDS,
    excluded,
    finite,
    locate,
    merged,
    octaves,
)


@triton.jit
def top_of(row, start, stop, LANES: tl.constexpr):
    """The maximum of columns [start, stop); 0 if there is none that is finite."""
    columns = tl.arange(0, LANES)
    best = tl.full([LANES], float("-inf"), tl.float32)
    for at in range(start, stop, LANES):
        best = tl.maximum(
            best, tl.load(row + at + columns, mask=at + columns < stop, other=float("-inf")).to(tl.float32)
        )
    top = tl.max(best, 0)
    return tl.where(finite(top), top, 0.0)


@triton.jit
def fold_carefully(x_row, y_row, start, stop, scale, shrink, LANES: tl.constexpr):
    """As `fold`, every special value included. Octaves are counted in units of 1/shrink, in which any finite logit is
    a finite number; 0 · anything = 0; a or b is +inf where only the student (only the teacher) uses a column.

    A column a step: this is rare, and the registers it takes count against the main loop too."""
    columns = tl.arange(0, LANES)
    small = scale * shrink
    m = top_of(x_row, start, stop, LANES) * small
    n = top_of(y_row, start, stop, LANES) * small
    z = tl.zeros([LANES], tl.float32)
    u = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float32)
    b = tl.zeros([LANES], tl.float32)
    h = tl.zeros([LANES], tl.float32)
    k = tl.zeros([LANES], tl.float32)
    for at in range(start, stop, LANES):
        inside = at + columns < stop
        x = tl.load(x_row + at + columns, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(y_row + at + columns, mask=inside, other=float("-inf")).to(tl.float32)
        no_x, no_y = excluded(x), excluded(y)
        t = tl.where(no_x, 0.0, octaves(x, small, m))
        s = tl.where(no_y, 0.0, octaves(y, small, n))
        p = tl.where(no_x, 0.0, tl.exp2(t / shrink))
        w = tl.where(no_y, 0.0, tl.exp2(s / shrink))
        difference = t - s
        z += p
        u += w
        a += tl.where(no_x, 0.0, tl.where(no_y, float("inf"), p * difference))
        b += tl.where(no_y, 0.0, tl.where(no_x, float("inf"), w * -difference))
        h += p * t
        k += w * s
    units = 1.0 / shrink
    return (
        m.to(tl.float64) * units,
        n.to(tl.float64) * units,
        tl.sum(z, 0).to(tl.float64),
        tl.sum(u, 0).to(tl.float64),
        tl.sum(a, 0).to(tl.float64) * units,
        tl.sum(b, 0).to(tl.float64) * units,
        tl.sum(h, 0).to(tl.float64) * units,
        tl.sum(k, 0).to(tl.float64) * units,
    )


@triton.jit
def fold_kernel(
    student,
    teacher,
    mask,
    partial,
    x_inner,
    x_stride,
    x_outer_stride,
    y_inner,
    y_stride,
    y_outer_stride,
    vocab,
    segments,
    scale,
    shrink,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STEP: tl.constexpr,
    SEGMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PTX: tl.constexpr,
):
    """One program a segment of a row: its state goes to partial [rows, segments, 8]."""
    program = tl.program_id(0)
    row, segment = program // segments, program % segments
    if mask is not None:
        if tl.load(mask + row) == 0:
            return
    x_offset = locate(row, x_inner, x_stride, x_outer_stride)
    y_offset = locate(row, y_inner, y_stride, y_outer_stride)
    if ALIGNED:
        x_offset, y_offset = tl.multiple_of(x_offset, VECTOR), tl.multiple_of(y_offset, VECTOR)
    x_row, y_row = student + x_offset, teacher + y_offset
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, vocab)
    m, n, z, u, a, b, h, k = merged(*fold(x_row, y_row, start, stop, scale, LANES, VECTOR, STEP, ALIGNED, PTX))
    sums = finite(z) & finite(u) & finite(a) & finite(b) & finite(h) & finite(k)
    m, n, z, u = m.to(tl.float64), n.to(tl.float64), z.to(tl.float64), u.to(tl.float64)
    a, b, h, k = a.to(tl.float64), b.to(tl.float64), h.to(tl.float64), k.to(tl.float64)
    if not (sums & (z > 0) & (u > 0)):
        m, n, z, u, a, b, h, k = fold_carefully(x_row, y_row, start, stop, scale, shrink, LANES)
    to = partial + program.to(tl.int64) * 8
    tl.store(to, m)
    tl.store(to + 1, n)
    tl.store(to + 2, z)
    tl.store(to + 3, u)
    tl.store(to + 4, a)
    tl.store(to + 5, b)
    tl.store(to + 6, h)
    tl.store(to + 7, k)


@triton.jit
def rise_of(m, z):
    """How far each part's reference lies below the highest one that carries weight, and that reference."""
    top = tl.max(tl.where(z > 0, m, float("-inf")), 0)
    top = tl.where(finite(top), top, 0.0)
    return tl.where(z > 0, top - m, 0.0), top


@triton.jit
def mean_of(sums, weight, rise, shrink, total):
    """sum shrink (sums - rise weight) / total over the parts, where +inf stays +inf."""
    infinite = sums == float("inf")
    value = tl.sum(tl.where(infinite, 0.0, shrink * (sums - rise * weight)), 0) / total
    return tl.where(tl.max(infinite.to(tl.int32), 0) > 0, float("inf"), value)


@triton.jit
def finish_kernel(
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
    """One program a row: merges its segments, in double, and writes the statistics and the scalars to save."""
    row = tl.program_id(0).to(tl.int64)
    keep = True
    if mask is not None:
        keep = tl.load(mask + row) != 0
    part = tl.arange(0, PARTS)
    present = (part < segments) & keep
    at = partial + (row * segments + part) * 8
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
    # A segment that one model excludes altogether has no reference of that model: any will do, as its sum is +inf or 0.
    z_all, u_all = tl.sum(z * shrink, 0), tl.sum(u * teacher_shrink, 0)
    valid = (z_all > 0) & (u_all > 0) & finite(z_all) & finite(u_all)
    z_all, u_all = tl.where(valid, z_all, 1.0), tl.where(valid, u_all, 1.0)
    log_z, log_u = tl.log2(z_all), tl.log2(u_all)
    nan = float("nan")
    h_all = tl.maximum(log_z - mean_of(h, z, rise, shrink, z_all), 0.0) * LN2
    k_all = tl.maximum(log_u - mean_of(k, u, teacher_rise, teacher_shrink, u_all), 0.0) * LN2
    r = tl.maximum(mean_of(a, z, rise - teacher_rise, shrink, z_all) - log_z + log_u, 0.0) * LN2
    f = tl.maximum(mean_of(b, u, teacher_rise - rise, teacher_shrink, u_all) - log_u + log_z, 0.0) * LN2
    if tokens is not None:
        token = tl.load(tokens + row).to(tl.int64)
        # A token outside the vocabulary has no logit. The host cannot look without stalling the device.
        known = (token >= 0) & (token < vocab) & keep
        x = tl.load(student + locate(row, x_inner, x_stride, x_outer_stride) + token, mask=known, other=nan)
        y = tl.load(teacher + locate(row, y_inner, y_stride, y_outer_stride) + token, mask=known, other=nan)
        own = (x.to(tl.float64) * scale - top - log_z) * LN2
        teacher_own = (y.to(tl.float64) * scale - teacher_top - log_u) * LN2
        own = tl.where(own > 0, 0.0, own)
        teacher_own = tl.where(teacher_own > 0, 0.0, teacher_own)
        tl.store(logprob + row, tl.where(keep, tl.where(valid, own, nan), 0.0).to(tl.float32))
        tl.store(teacher_logprob + row, tl.where(keep, tl.where(valid, teacher_own, nan), 0.0).to(tl.float32))
        tl.store(entropy + row, tl.where(keep, tl.where(valid, h_all, nan), 0.0).to(tl.float32))
        tl.store(teacher_entropy + row, tl.where(keep, tl.where(valid, k_all, nan), 0.0).to(tl.float32))
        tl.store(reverse_kl + row, tl.where(keep, tl.where(valid, r, nan), 0.0).to(tl.float32))
        tl.store(forward_kl + row, tl.where(keep, tl.where(valid, f, nan), 0.0).to(tl.float32))
    to = saved + row * 4
    tl.store(to, tl.where(keep, tl.where(valid, (top + log_z) * LN2, nan), 0.0))
    tl.store(to + 1, tl.where(keep, tl.where(valid, (teacher_top + log_u) * LN2, nan), 0.0))
    tl.store(to + 2, tl.where(keep, tl.where(valid, h_all, nan), 0.0))
    tl.store(to + 3, tl.where(keep, tl.where(valid, r, nan), 0.0))


def token_stats(
    student: Tensor, teacher: Tensor, tokens: Tensor | None, mask: Tensor | None, temperature: float, vocab: int
) -> tuple[list[Tensor], Tensor]:
    """The six statistics ``[...]`` float32 (none without tokens) and the saved scalars ``[..., 4]`` float64."""
    shape, rows = student.shape[:-1], launch.count_rows(student)
    wanted = tokens is not None
    statistics = [student.new_empty(shape, dtype=torch.float32) for _ in range(6 if wanted else 0)]
    saved = student.new_empty((*shape, 4), dtype=torch.float64)
    if rows == 0:
        return statistics, saved
    settings = launch.forward_settings(vocab, student.dtype, teacher.dtype)
    segments = launch.segments(vocab, settings)
    partial = student.new_empty((rows, segments, STATE_FIELDS), dtype=torch.float64)
    x, y = launch.rows_of(student), launch.rows_of(teacher)
    index = tokens.contiguous() if tokens is not None else None
    keep = launch.flags(mask)
    scale = launch.scale_of(temperature)
    with launch.on(student):
        fold_kernel[(rows * segments,)](
            x.tensor,
            y.tensor,
            keep,
            partial,
            *x.strides,
            *y.strides,
            vocab,
            segments,
            scale,
            launch.shrink_of(scale),
            LANES=settings.lanes,
            VECTOR=settings.vector,
            STEP=settings.step,
            SEGMENT=settings.segment,
            ALIGNED=launch.aligned(x, settings.vector) and launch.aligned(y, settings.vector),
            PTX=launch.speaks_ptx(),
            num_warps=settings.warps,
        )
        finish_kernel[(rows,)](
            x.tensor,
            y.tensor,
            index,
            keep,
            partial,
            *(statistics if wanted else [None] * 6),
            saved,
            *x.strides,
            *y.strides,
            vocab,
            segments,
            scale,
            PARTS=launch.padded(segments),
            num_warps=1,
        )
    return statistics, saved

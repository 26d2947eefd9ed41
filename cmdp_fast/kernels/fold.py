"""The main loop of the statistics: one lane folds its own columns and never looks at another lane.

A step gives each lane STEP columns of both rows, by 128-bit loads where the rows are aligned, else a column per load.
The lane finds the maximum of its columns (two 16-bit numbers at a time, before they are widened), raises its references
once, and adds the columns one by one. All tensors are [L], one column each, so that a thread runs plain scalar code;
summing tiles [L, C] along C instead costs an extra addition and multiplication for every sum of every tile.

Instructions per column, of both models together: 2 widen, 2 multiply-adds make octaves, 2 exponentials, 1 difference,
6 sums, 1/4 load; and a share of the maximum and of raising the references, which shrinks as STEP grows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cmdp_fast.kernels.shapes import State
from cmdp_fast.kernels.shared import NOWHERE, octaves, raised


@triton.jit
def unstacked(tile, LANES: tl.constexpr, COUNT: tl.constexpr):
    """The COUNT (2 or 4) columns [L] of a tile [L, COUNT] of which a thread holds whole rows: nothing moves."""
    if COUNT == 2:
        first, second = tl.split(tile)
        return (first, second)
    else:
        even, odd = tl.split(tl.reshape(tile, [LANES, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first, second, third, fourth)


@triton.jit
def places(row, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """Where each lane begins to read: [L, words] of 32 bits, which hold two 16-bit columns, if ALIGNED, else [L].

    A lane reads the same columns in the same order either way: where a row happens to lie must not change its result.
    """
    lane = tl.arange(0, LANES)
    if ALIGNED:
        words: tl.constexpr = row.dtype.element_ty.primitive_bitwidth * VECTOR // 32
        return row.to(tl.pointer_type(tl.int32), bitcast=True) + lane[:, None] * words + tl.arange(0, words)[None, :]
    else:
        return row + lane * VECTOR


@triton.jit
def read(at, LANES: tl.constexpr, VECTOR: tl.constexpr, GROUPS: tl.constexpr, ALIGNED: tl.constexpr):
    """GROUPS times VECTOR columns of each lane: words [L] if ALIGNED, a load per group, else columns [L]."""
    columns = ()
    for group in tl.static_range(GROUPS):
        if ALIGNED:
            columns = columns + unstacked(tl.load(at + group * LANES * at.shape[1]), LANES, at.shape[1])
        else:
            for i in tl.static_range(VECTOR):
                columns = columns + (tl.load(at + group * LANES * VECTOR + i),)  # noqa: RUF005 (Triton knows no starred items)
    return columns


@triton.jit
def widened(column, DTYPE: tl.constexpr, HALF: tl.constexpr):
    """A column in float32: a number, or (of a word that holds two) its lower half 0 or upper half 1."""
    if column.dtype != tl.int32:
        return column.to(tl.float32)
    elif tl.float32 == DTYPE:
        return column.to(tl.float32, bitcast=True)
    elif tl.bfloat16 == DTYPE:  # a bfloat16 is the upper half of a float32
        if HALF == 0:
            return (column << 16).to(tl.float32, bitcast=True)
        else:
            return (column & -65536).to(tl.float32, bitcast=True)
    else:
        return (column >> 16 * HALF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def larger_halves(one, other, DTYPE: tl.constexpr):
    """The larger of two 16-bit numbers, twice, in one instruction of an NVIDIA GPU. A NaN loses."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [one, other], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [one, other], tl.int32, True, 1)


@triton.jit
def highest(columns, DTYPE: tl.constexpr, COUNT: tl.constexpr, HALVES: tl.constexpr, PTX: tl.constexpr):
    """The maximum [L] over the COUNT · HALVES columns of each lane. A NaN loses here and shows up in the sums."""
    if HALVES == 2 and PTX:
        pair = columns[0]
        for i in tl.static_range(1, COUNT):
            pair = larger_halves(pair, columns[i], DTYPE)
        return tl.maximum(widened(pair, DTYPE, 0), widened(pair, DTYPE, 1))
    else:
        best = widened(columns[0], DTYPE, 0)
        for i in tl.static_range(1, COUNT * HALVES):
            best = tl.maximum(best, widened(columns[i // HALVES], DTYPE, i % HALVES))
        return best


@triton.jit
def add(state, x, y, scale, inside):
    """One column [L] of both models into the sums, the references being high enough. One that is not `inside` weighs
    nothing; None: all are."""
    t, s = octaves(x, scale, state.m), octaves(y, scale, state.n)
    p, w = tl.exp2(t), tl.exp2(s)
    if inside is not None:
        t, s = tl.where(inside, t, 0.0), tl.where(inside, s, 0.0)
        p, w = tl.where(inside, p, 0.0), tl.where(inside, w, 0.0)
    difference = t - s
    return State(
        state.m,
        state.n,
        state.z + p,
        state.u + w,
        tl.fma(p, difference, state.a),
        tl.fma(-w, difference, state.b),
        tl.fma(p, t, state.h),
        tl.fma(w, s, state.k),
    )


@triton.jit
def nothing(LANES: tl.constexpr):
    """The states [L] of no columns."""
    reference = tl.full([LANES], NOWHERE, tl.float32)
    zeros = tl.zeros([LANES], tl.float32)
    return State(reference, reference, zeros, zeros, zeros, zeros, zeros, zeros)


@triton.jit
def fold(row, start, stop, settings, ALIGNED: tl.constexpr, PTX: tl.constexpr):
    """The states [L] of columns [start, stop) of a `Row`, one per lane, for logits without special values.

    settings: a `launch.Forward` of constants.
    ALIGNED: rows and `start` lie at multiples of `vector` columns and of 16 bytes (8 for the narrower of two dtypes).
    PTX: the compiler understands NVIDIA's assembly.
    """
    LANES: tl.constexpr = settings.lanes
    VECTOR: tl.constexpr = settings.vector
    STEP: tl.constexpr = settings.step
    X: tl.constexpr = row.student.dtype.element_ty
    Y: tl.constexpr = row.teacher.dtype.element_ty
    x_halves: tl.constexpr = 2 if ALIGNED and X.primitive_bitwidth == 16 else 1
    y_halves: tl.constexpr = 2 if ALIGNED and Y.primitive_bitwidth == 16 else 1
    state = nothing(LANES)
    tile: tl.constexpr = LANES * STEP
    tiles = (stop - start) // tile
    groups: tl.constexpr = STEP // VECTOR
    x_at = places(row.student + start, LANES, VECTOR, ALIGNED)
    y_at = places(row.teacher + start, LANES, VECTOR, ALIGNED)
    for _ in range(tiles):
        xs = read(x_at, LANES, VECTOR, groups, ALIGNED)
        ys = read(y_at, LANES, VECTOR, groups, ALIGNED)
        top = tl.maximum(state.m, highest(xs, X, STEP // x_halves, x_halves, PTX) * row.scale)
        teacher_top = tl.maximum(state.n, highest(ys, Y, STEP // y_halves, y_halves, PTX) * row.scale)
        state = raised(state, top, teacher_top)
        for i in tl.static_range(STEP):
            x = widened(xs[i // x_halves], X, i % x_halves)
            y = widened(ys[i // y_halves], Y, i % y_halves)
            state = add(state, x, y, row.scale, None)
        x_at += tile // x_halves
        y_at += tile // y_halves
    for at in range(start + tiles * tile, stop, LANES):  # the rest, a column per step
        column = at + tl.arange(0, LANES)
        inside = column < stop
        x = tl.load(row.student + column, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(row.teacher + column, mask=inside, other=float("-inf")).to(tl.float32)
        state = raised(state, tl.maximum(state.m, x * row.scale), tl.maximum(state.n, y * row.scale))
        state = add(state, x, y, row.scale, inside)
    return state

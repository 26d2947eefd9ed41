"""The main loop of the statistics: one lane folds its own columns and never looks at another lane.

A step gives each lane STEP columns of both rows, by 128-bit loads where the rows are aligned, else a column per load.
What is left of a row after the whole steps is read in the same way, VECTOR columns per lane, by the lanes for which
there are any, and the last few columns, fewer than VECTOR, one per lane.
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
def read(at, LANES: tl.constexpr, VECTOR: tl.constexpr, GROUPS: tl.constexpr, ALIGNED: tl.constexpr, inside=None):
    """GROUPS times VECTOR columns of each lane: words [L] if ALIGNED, a load per group, else columns [L].

    inside: which lanes [L] read, the others get zeros; None: all do.
    """
    columns = ()
    for group in tl.static_range(GROUPS):
        if ALIGNED:
            if inside is None:
                tile = tl.load(at + group * LANES * at.shape[1])
            else:
                tile = tl.load(at + group * LANES * at.shape[1], mask=inside[:, None], other=0)
            columns = columns + unstacked(tile, LANES, at.shape[1])
        else:
            for i in tl.static_range(VECTOR):
                if inside is None:
                    column = tl.load(at + group * LANES * VECTOR + i)
                else:
                    column = tl.load(at + group * LANES * VECTOR + i, mask=inside, other=0.0)
                columns = columns + (column,)  # noqa: RUF005 (Triton knows no starred items)
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
def add(state, x, y, scale):
    """One column [L] of both models into the sums but z and u, the references being high enough; and its weights."""
    t, s = octaves(x, scale, state.m), octaves(y, scale, state.n)
    p, w = tl.exp2(t), tl.exp2(s)
    difference = t - s
    sums = State(
        state.m,
        state.n,
        state.z,
        state.u,
        tl.fma(p, difference, state.a),
        tl.fma(-w, difference, state.b),
        tl.fma(p, t, state.h),
        tl.fma(w, s, state.k),
    )
    return sums, p, w


@triton.jit
def added(state, xs, ys, scale, X: tl.constexpr, Y: tl.constexpr, COUNT: tl.constexpr, PTX: tl.constexpr):
    """COUNT columns of each lane, as `read` gives them, into its state: one rise of the references, then the sums.

    Their weights are added up first: beside a leading column, which weighs 1, small ones are lost in up to 2^-24 each
    time that some are added."""
    x_halves: tl.constexpr = 2 if xs[0].dtype == tl.int32 and X.primitive_bitwidth == 16 else 1
    y_halves: tl.constexpr = 2 if ys[0].dtype == tl.int32 and Y.primitive_bitwidth == 16 else 1
    top = tl.maximum(state.m, highest(xs, X, COUNT // x_halves, x_halves, PTX) * scale)
    teacher_top = tl.maximum(state.n, highest(ys, Y, COUNT // y_halves, y_halves, PTX) * scale)
    state = raised(state, top, teacher_top)
    for i in tl.static_range(COUNT):
        x = widened(xs[i // x_halves], X, i % x_halves)
        y = widened(ys[i // y_halves], Y, i % y_halves)
        state, p, w = add(state, x, y, scale)
        if i == 0:
            z, u = p, w
        else:
            z += p
            u += w
    return State(state.m, state.n, state.z + z, state.u + u, state.a, state.b, state.h, state.k)


@triton.jit
def chosen(inside, one, other):
    """The states of `one` for the lanes that are `inside`, of `other` for the rest."""
    return State(
        tl.where(inside, one.m, other.m),
        tl.where(inside, one.n, other.n),
        tl.where(inside, one.z, other.z),
        tl.where(inside, one.u, other.u),
        tl.where(inside, one.a, other.a),
        tl.where(inside, one.b, other.b),
        tl.where(inside, one.h, other.h),
        tl.where(inside, one.k, other.k),
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
    x_words: tl.constexpr = 2 if ALIGNED and X.primitive_bitwidth == 16 else 1  # columns of what `places` points at
    y_words: tl.constexpr = 2 if ALIGNED and Y.primitive_bitwidth == 16 else 1
    state = nothing(LANES)
    tile: tl.constexpr = LANES * STEP
    tiles = (stop - start) // tile
    x_at = places(row.student + start, LANES, VECTOR, ALIGNED)
    y_at = places(row.teacher + start, LANES, VECTOR, ALIGNED)
    for _ in range(tiles):
        xs = read(x_at, LANES, VECTOR, STEP // VECTOR, ALIGNED)
        ys = read(y_at, LANES, VECTOR, STEP // VECTOR, ALIGNED)
        state = added(state, xs, ys, row.scale, X, Y, STEP, PTX)
        x_at += tile // x_words
        y_at += tile // y_words
    rest = start + tiles * tile
    vectors = (stop - rest) // VECTOR
    lane = tl.arange(0, LANES)
    for at in range(0, vectors, LANES):  # the rest: a vector per lane and step
        if ALIGNED:  # begun anew: pointers to words that outlive their loop go by way of shared memory in Triton 3.6
            x_at = places(row.student + rest + at * VECTOR, LANES, VECTOR, ALIGNED)
            y_at = places(row.teacher + rest + at * VECTOR, LANES, VECTOR, ALIGNED)
        inside = at + lane < vectors
        xs = read(x_at, LANES, VECTOR, 1, ALIGNED, inside)
        ys = read(y_at, LANES, VECTOR, 1, ALIGNED, inside)
        state = chosen(inside, added(state, xs, ys, row.scale, X, Y, VECTOR, PTX), state)
        if not ALIGNED:
            x_at += LANES * VECTOR
            y_at += LANES * VECTOR
    for at in range(rest + vectors * VECTOR, stop, LANES):  # what is less than a vector: a column per lane
        inside = at + lane < stop
        x = tl.load(row.student + at + lane, mask=inside, other=0.0)
        y = tl.load(row.teacher + at + lane, mask=inside, other=0.0)
        state = chosen(inside, added(state, (x,), (y,), row.scale, X, Y, 1, PTX), state)
    return state

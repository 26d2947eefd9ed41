"""The tail of a row, forward: all columns of one model's logits but those that a list names, folded into four numbers.

What the numbers mean stands in `cmdp_fast/tails.py`. The loop is that of `fold.py`, of one model: a row is cut into
segments, one program each, a lane folds columns of its own, and a second small kernel merges the segments.

The list ascends. A program finds the first of its columns in it, and from there on knows how many tiles there are up to
the next one: these the main loop takes, which knows nothing of a list. A tile that holds listed columns is read in the
same way. Each of them sets a bit of the lane whose column it is, and a column whose bit is set counts for nothing. So
no difference is taken, and a tail below 1e-7 of the whole is as exact as any other. What is left of a segment after the
whole tiles is one more tile, in which the columns beyond the end have their bits set too.

A column of -inf weighs nothing here: it stands 1e30 octaves below the reference. A NaN, +inf or an abyss makes a sum
that is not finite, or none, and the segment is folded again in double.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast import tails
from cmdp_fast.arrays import count_rows
from cmdp_fast.kernels import launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.fold import highest, places, read, widened
from cmdp_fast.kernels.shapes import Lanes, constants
from cmdp_fast.kernels.shared import LN2, NOWHERE, PER_NAT, excluded, finite, is_reference, locate, natural, octaves
from cmdp_fast.layout import ListedRows
from cmdp_fast.tails import TailState

FIELDS = tl.constexpr(len(tails.FIELDS))
AT_ONCE = tl.constexpr(128)  # entries of a list that a program looks at in one step
END = tl.constexpr(2**62)  # beyond every column
LAST = tl.constexpr(2**31 - 1)


class Tail(NamedTuple):
    """The sums of csrc/tail.h: in octaves and float32, or in nats and double; ``low`` is a logit."""

    m: Lanes
    z: Lanes
    h: Lanes
    low: Lanes


# --------------------------------------------------------------------------------------------------------------
# The list


@triton.jit
def column_of(ids, place, count, first_column):
    """The column within the tile of one entry of a list; negative for one before it, or for none, LAST at the end."""
    column = tl.load(ids + place, mask=place < count, other=END) - first_column
    return tl.minimum(tl.maximum(column, -1), LAST).to(tl.int32)


@triton.jit
def first_place(ids, count, first_column, start):
    """Where the columns from `start` on begin in a list; `count` if there are none."""
    best = count + tl.zeros([], tl.int32)
    for at in range(0, count, AT_ONCE):
        place = at + tl.arange(0, AT_ONCE)
        id = tl.load(ids + place, mask=place < count, other=-1)
        best = tl.minimum(best, tl.min(tl.where((id >= 0) & (id - first_column >= start), place, count), 0))
    return best


@triton.jit
def marked(
    ids, place, column, count, first_column, first, LANES: tl.constexpr, VECTOR: tl.constexpr, STEP: tl.constexpr
):
    """A bit [L] for each of the STEP columns of a lane, as `fold.read` gives them from `first` on, set if it is listed;
    and the first entry of the list that lies behind them, as a place and a column."""
    group: tl.constexpr = LANES * VECTOR
    lane = tl.arange(0, LANES)
    bits = tl.zeros([LANES], tl.int32)
    while column < first + LANES * STEP:
        if column >= first:
            within = column - first
            bit = within // group * VECTOR + within % VECTOR
            bits |= (lane == within % group // VECTOR).to(tl.int32) << bit
        place += 1
        column = column_of(ids, place, count, first_column)
    return bits, place, column


# --------------------------------------------------------------------------------------------------------------
# The loop


@triton.jit
def add(tail, x, scale, gone):
    """One column [L] into the sums, the reference being high enough. Lanes that are `gone` add nothing; None: none."""
    # A NaN stays one: the sums are to show it.
    t = tl.maximum(octaves(x, scale, tail.m), NOWHERE, propagate_nan=tl.PropagateNan.ALL)
    low = tl.minimum(tail.low, x)
    if gone is not None:
        t, low = tl.where(gone, NOWHERE, t), tl.where(gone, tail.low, low)
    p = tl.exp2(t)
    return Tail(tail.m, tail.z + p, tl.fma(p, t, tail.h), low)


@triton.jit
def top_of(xs, bits, X: tl.constexpr, COUNT: tl.constexpr, HALVES: tl.constexpr, PTX: tl.constexpr):
    """The maximum [L] over the columns of each lane whose bit is not set."""
    if bits is None:
        return highest(xs, X, COUNT // HALVES, HALVES, PTX)
    else:
        best = tl.full(bits.shape, float("-inf"), tl.float32)
        for i in tl.static_range(COUNT):
            x = widened(xs[i // HALVES], X, i % HALVES)
            best = tl.maximum(best, tl.where((bits >> i) & 1 != 0, float("-inf"), x))
        return best


@triton.jit
def added(tail, xs, bits, scale, X: tl.constexpr, COUNT: tl.constexpr, PTX: tl.constexpr):
    """COUNT columns of each lane, as `read` gives them, into its sums, but for those whose bit is set; None: all."""
    halves: tl.constexpr = 2 if xs[0].dtype == tl.int32 and X.primitive_bitwidth == 16 else 1
    top = tl.maximum(tail.m, top_of(xs, bits, X, COUNT, halves, PTX) * scale)
    drop = tail.m - top
    shrink = tl.exp2(drop)
    tail = Tail(top, tail.z * shrink, tl.fma(drop, tail.z, tail.h) * shrink, tail.low)
    for i in tl.static_range(COUNT):
        x = widened(xs[i // halves], X, i % halves)
        if bits is None:
            tail = add(tail, x, scale, None)
        else:
            tail = add(tail, x, scale, (bits >> i) & 1 != 0)
    return tail


@triton.jit
def nothing(LANES: tl.constexpr):
    """The sums [L] of no columns."""
    zeros = tl.zeros([LANES], tl.float32)
    return Tail(zeros + NOWHERE, zeros, zeros, zeros + float("inf"))


@triton.jit
def fold(row, ids, place, rows, first_column, start, stop, settings, ALIGNED: tl.constexpr, PTX: tl.constexpr):
    """The sums [L] of columns [start, stop) of a row but for those listed, one per lane.

    rows: a `shapes.Listed`. place: where those columns begin in the list. settings, ALIGNED, PTX: as `fold.fold`.
    """
    LANES: tl.constexpr = settings.lanes
    VECTOR: tl.constexpr = settings.vector
    STEP: tl.constexpr = settings.step
    X: tl.constexpr = row.dtype.element_ty
    words: tl.constexpr = 2 if ALIGNED and X.primitive_bitwidth == 16 else 1  # columns of what `places` points at
    tile: tl.constexpr = LANES * STEP
    tail = nothing(LANES)
    column = column_of(ids, place, rows.count, first_column)
    tiles = (stop - start) // tile
    done = tl.zeros([], tl.int32)
    while done < tiles:
        clean = tl.minimum(tl.maximum((column - start) // tile, done), tiles)
        at = places(row + start + done * tile, LANES, VECTOR, ALIGNED)
        for _ in range(done, clean):
            xs = read(at, LANES, VECTOR, STEP // VECTOR, ALIGNED)
            tail = added(tail, xs, None, rows.scale, X, STEP, PTX)
            at += tile // words
        if clean < tiles:
            first = start + clean * tile
            xs = read(places(row + first, LANES, VECTOR, ALIGNED), LANES, VECTOR, STEP // VECTOR, ALIGNED)
            bits, place, column = marked(ids, place, column, rows.count, first_column, first, LANES, VECTOR, STEP)
            tail = added(tail, xs, bits, rows.scale, X, STEP, PTX)
        done = clean + 1
    rest = start + tiles * tile
    if rest < stop:
        bits, place, column = marked(ids, place, column, rows.count, first_column, rest, LANES, VECTOR, STEP)
        xs = ()
        for group in tl.static_range(STEP // VECTOR):
            for i in tl.static_range(VECTOR):
                columns = rest + (group * LANES + tl.arange(0, LANES)) * VECTOR + i
                xs = xs + (tl.load(row + columns, mask=columns < stop, other=0.0),)  # noqa: RUF005 (as in fold.py)
                bits |= (columns >= stop).to(tl.int32) << (group * VECTOR + i)
        tail = added(tail, xs, bits, rows.scale, X, STEP, PTX)
    return tail


@triton.jit
def merged(lanes):
    """The sums of all lanes [L] in one, in nats and in double; ``low`` stays a logit."""
    top = tl.max(lanes.m, 0)
    drop = lanes.m - top
    shrink = tl.exp2(drop)
    z = tl.sum(lanes.z * shrink, 0)
    h = tl.sum(tl.fma(drop, lanes.z, lanes.h) * shrink, 0)
    return Tail(top.to(tl.float64) * LN2, z.to(tl.float64), h.to(tl.float64) * LN2, tl.min(lanes.low, 0))


@triton.jit
def fold_carefully(row, ids, place, rows, first_column, start, stop, LANES: tl.constexpr):
    """The sums m, z, h of the same columns in nats and in double, with every special value.

    A column per step, and each row twice: this is rare, and its registers count against the main loop too."""
    lane = tl.arange(0, LANES)
    factor = natural(rows.scale)
    best = tl.full([LANES], float("-inf"), tl.float32)
    z = tl.zeros([LANES], tl.float64)
    h = tl.zeros([LANES], tl.float64)
    m = tl.zeros([], tl.float64)
    for turn in range(2):
        at = place
        column = column_of(ids, at, rows.count, first_column)
        for first in range(start, stop, LANES):
            bits, at, column = marked(ids, at, column, rows.count, first_column, first, LANES, 1, 1)
            x = tl.load(row + first + lane, mask=first + lane < stop, other=float("-inf")).to(tl.float32)
            x = tl.where(bits != 0, float("-inf"), x)
            if turn == 0:
                best = tl.maximum(best, x)
            else:
                t = tl.where(excluded(x), 0.0, x.to(tl.float64) * factor - m)
                p = tl.where(excluded(x), 0.0, tl.exp2((t * PER_NAT).to(tl.float32)))
                z += p
                h += p * t
        top = tl.max(best, 0)
        m = tl.where(finite(top), top, 0.0).to(tl.float64) * factor
    return m, tl.sum(z, 0), tl.sum(h, 0)


@direct
@triton.jit(do_not_specialize=["first_column"])
def fold_kernel(rows, sums, first_column, segments, settings, ALIGNED: tl.constexpr, PTX: tl.constexpr):
    """One program per segment of a row, whose sums go to `sums` [rows, segments, FIELDS].

    rows: a `shapes.Listed`. settings: a `launch.Forward` of constants. ALIGNED, PTX: as `fold.fold`.
    """
    program = tl.program_id(0)
    index, segment = program // segments, program % segments
    if rows.mask is not None:
        if tl.load(rows.mask + index) == 0:
            return
    if ALIGNED:
        row = rows.student + tl.multiple_of(locate(index, rows.rows), settings.vector)
    else:
        row = rows.student + locate(index, rows.rows)
    ids = rows.ids + index.to(tl.int64) * rows.count
    start = segment * settings.segment
    stop = tl.minimum(start + settings.segment, rows.width)
    place = first_place(ids, rows.count, first_column, start)
    tail = merged(fold(row, ids, place, rows, first_column, start, stop, settings, ALIGNED, PTX))
    m, z, h = tail.m, tail.z, tail.h
    if not (is_reference(m * PER_NAT) & (z > 0) & finite(z) & finite(h)):
        m, z, h = fold_carefully(row, ids, place, rows, first_column, start, stop, settings.lanes)
    to = sums + program.to(tl.int64) * FIELDS
    tl.store(to, m)
    tl.store(to + 1, z)
    tl.store(to + 2, h)
    tl.store(to + 3, tail.low.to(tl.float64) * natural(rows.scale))


@triton.jit
def fallen(z, h, rise):
    """Both sums after their reference has risen by so many nats."""
    shrink = tl.exp2(-rise * PER_NAT)
    return z * shrink, (h - rise * z) * shrink


@direct
@triton.jit(do_not_specialize=["first_column"])
def merge_kernel(rows, sums, state, first_column, segments, PARTS: tl.constexpr):
    """One program per row: its segments into its state, in double and in a fixed order, and the logits of the list and
    of the token that this tile holds. The state of a masked row stays as it is.

    rows: a `shapes.Listed`. state: a `TailState`.
    """
    row = tl.program_id(0).to(tl.int64)
    if rows.mask is not None:
        if tl.load(rows.mask + row) == 0:
            return
    part = tl.arange(0, PARTS)
    present = part < segments
    at = sums + (row * segments + part) * FIELDS
    z, h = tl.load(at + 1, mask=present, other=0.0), tl.load(at + 2, mask=present, other=0.0)
    m = tl.where(z == 0, float("-inf"), tl.load(at, mask=present, other=0.0))
    low = tl.min(tl.load(at + 3, mask=present, other=float("inf")), 0)
    to = state.fields + row * FIELDS
    m_old, z_old, h_old, low_old = tl.load(to), tl.load(to + 1), tl.load(to + 2), tl.load(to + 3)
    top = tl.maximum(tl.max(m, 0), m_old)
    z, h = fallen(z, h, tl.where(z == 0, 0.0, top - m))  # without weight there is nothing to scale
    z_old, h_old = fallen(z_old, h_old, tl.where(z_old == 0, 0.0, top - m_old))
    tl.debug_barrier()  # every thread has read the state before one of them writes
    tl.store(to, top)
    tl.store(to + 1, tl.sum(z, 0) + z_old)
    tl.store(to + 2, tl.sum(h, 0) + h_old)
    tl.store(to + 3, tl.minimum(low, low_old))

    student = rows.student + locate(row, rows.rows)
    factor = natural(rows.scale)
    for first in range(0, rows.count, AT_ONCE):
        place = first + tl.arange(0, AT_ONCE)
        id = tl.load(rows.ids + row * rows.count + place, mask=place < rows.count, other=-1)
        column = id - first_column
        here = (id >= 0) & (column >= 0) & (column < rows.width)
        x = tl.load(student + column, mask=here, other=0.0).to(tl.float64) * factor
        tl.store(state.listed + row * rows.count + place, x, mask=here)
    column = tl.load(rows.tokens + row).to(tl.int64) - first_column
    here = (column >= 0) & (column < rows.width)
    tl.store(state.own + row, tl.load(student + column, mask=here, other=0.0).to(tl.float64) * factor, mask=here)


def update_tails(rows: ListedRows, first_column: int, state: TailState) -> None:
    """Folds a tile of logits ``[..., C]``, columns [first_column, first_column + C) of the vocabulary, into the
    states of its rows, in place. Ids and tokens count from the vocabulary's first column; ``width`` is C.

    Two launches.
    """
    count = count_rows(rows.student)
    if count == 0:
        return
    with launch.on(rows.student):
        listed = launch.listed_of(rows)
        settings = launch.forward_settings(rows.width, rows.student.dtype)
        wide_loads = launch.aligned_rows(listed.student, listed.rows, settings.vector)
        read = listed._replace(tokens=None)  # it does not read them: see `token_stats.fold_rows`

        def run(settings: launch.Forward, sums: Tensor) -> None:
            fold_kernel[(count * sums.shape[1],)](
                read,
                sums,
                first_column,
                sums.shape[1],
                constants(settings),
                ALIGNED=wide_loads,
                PTX=launch.speaks_ptx(),
                **launch.compiled_for(settings.warps),
            )

        def room(settings: launch.Forward) -> Tensor:
            shape = (count, launch.segments(rows.width, settings), FIELDS.value)
            return rows.student.new_empty(shape, dtype=torch.float64)

        if launch.AUTOTUNE:
            table, key = launch.forward_choices(settings, rows.width), ("tail", rows.width, rows.student.dtype)
            settings = launch.tuned(table, key, rows.student, lambda choice: partial(run, choice, room(choice)))
        sums = room(settings)
        run(settings, sums)
        segments = sums.shape[1]
        parts = 1 << (segments - 1).bit_length()
        merge_kernel[(count,)](listed, sums, state, first_column, segments, PARTS=parts, **launch.compiled_for(1))

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

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.arrays import count_rows
from cmdp_fast.kernels import finish, launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.finish import finish_rows
from cmdp_fast.kernels.fold import fold
from cmdp_fast.kernels.shapes import Folded, Logits, Results, State, constants
from cmdp_fast.kernels.shared import (
    LN2,
    PER_NAT,
    STATE_FIELDS,
    aligned_row_of,
    excluded,
    finite,
    is_reference,
    merged,
    natural,
    row_of,
    store_state,
)
from cmdp_fast.layout import Pair, empty_statistics


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
def fold_carefully(row, start, stop, LANES: tl.constexpr):
    """As `fold` and `merged`, but in nats and every special value included: differences in double, in which those of
    any two logits are finite and those of equal ones 0; 0 · anything = 0; a or b is +inf where only the student (only
    the teacher) uses a column.

    A column per step: this is rare, and the registers it takes count against the main loop too."""
    columns = tl.arange(0, LANES)
    factor = natural(row.scale)
    m = top_of(row.student, start, stop, LANES).to(tl.float64) * factor
    n = top_of(row.teacher, start, stop, LANES).to(tl.float64) * factor
    z = tl.zeros([LANES], tl.float32)
    u = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float64)
    b = tl.zeros([LANES], tl.float64)
    h = tl.zeros([LANES], tl.float64)
    k = tl.zeros([LANES], tl.float64)
    for at in range(start, stop, LANES):
        inside = at + columns < stop
        x = tl.load(row.student + at + columns, mask=inside, other=float("-inf")).to(tl.float64)
        y = tl.load(row.teacher + at + columns, mask=inside, other=float("-inf")).to(tl.float64)
        no_x, no_y = excluded(x), excluded(y)
        # Equal logits cancel: their products are rounded alike, before they are subtracted.
        t = tl.where(no_x, 0.0, x * factor - m)
        s = tl.where(no_y, 0.0, y * factor - n)
        p = tl.where(no_x, 0.0, tl.exp2((t * PER_NAT).to(tl.float32)))
        w = tl.where(no_y, 0.0, tl.exp2((s * PER_NAT).to(tl.float32)))
        z += p
        u += w
        a += tl.where(no_x, 0.0, tl.where(no_y, float("inf"), p * (t - s)))
        b += tl.where(no_y, 0.0, tl.where(no_x, float("inf"), w * (s - t)))
        h += p * t
        k += w * s
    return State(
        m,
        n,
        tl.sum(z, 0).to(tl.float64),
        tl.sum(u, 0).to(tl.float64),
        tl.sum(a, 0),
        tl.sum(b, 0),
        tl.sum(h, 0),
        tl.sum(k, 0),
    )


@triton.jit
def in_nats(state):
    """A state in octaves and float32, in nats and double."""
    return State(
        state.m.to(tl.float64) * LN2,
        state.n.to(tl.float64) * LN2,
        state.z.to(tl.float64),
        state.u.to(tl.float64),
        state.a.to(tl.float64) * LN2,
        state.b.to(tl.float64) * LN2,
        state.h.to(tl.float64) * LN2,
        state.k.to(tl.float64) * LN2,
    )


@triton.jit
def ordinary(state):
    """Whether a state tells of the logits that it was folded from: none was special, in an abyss or far from 0."""
    sums = finite(state.z) & finite(state.u) & finite(state.a) & finite(state.b) & finite(state.h) & finite(state.k)
    return sums & (state.z > 0) & (state.u > 0) & is_reference(state.m) & is_reference(state.n)


@triton.jit
def fold_segment(row, logits, segment, settings, ALIGNED: tl.constexpr, PTX: tl.constexpr):
    """The state of one segment of a row, in nats and in double, and 1.0 if it was folded carefully, else 0.0."""
    if ALIGNED:
        pair = aligned_row_of(row, logits, settings.vector)
    else:
        pair = row_of(row, logits)
    start = segment * settings.segment
    stop = tl.minimum(start + settings.segment, logits.width)
    lanes = merged(fold(pair, start, stop, settings, ALIGNED, PTX))
    state = in_nats(lanes)
    careful = tl.zeros([], tl.float64)
    if not ordinary(lanes):
        careful += 1
        state = fold_carefully(pair, start, stop, settings.lanes)
    return state, careful


@direct
@triton.jit
def fold_kernel(folded, settings, ALIGNED: tl.constexpr, PTX: tl.constexpr):
    """One program per segment of a row, whose state goes to `folded.partial`.

    folded: a `Folded`. settings: a `launch.Forward` of constants. ALIGNED, PTX: as `fold`.
    """
    program = tl.program_id(0)
    row, segment = program // folded.segments, program % folded.segments
    logits = folded.logits
    if logits.mask is not None:
        if tl.load(logits.mask + row) == 0:
            return
    state, careful = fold_segment(row, logits, segment, settings, ALIGNED, PTX)
    to = folded.partial + program.to(tl.int64) * STATE_FIELDS
    store_state(to, state, None)
    tl.store(to + 8, careful)


@direct
@triton.jit
def finish_kernel(rows, folded, results, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """One program for ROWS of the rows; see `finish_rows`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    finish_rows(row, rows, folded, results, PARTS)


def parts(folded: Folded) -> int:
    """Segments per row, rounded up to a power of two: a tile of that width holds them all."""
    return 1 << (folded.segments - 1).bit_length()


def room_of(pair: Pair, logits: Logits, settings: launch.Forward, fields: int = STATE_FIELDS.value) -> Folded:
    """Room for the partial results of all segments, ``fields`` numbers each."""
    segments = launch.segments(pair.width, settings)
    shape = (count_rows(pair.student), segments, fields)
    return Folded(logits, pair.student.new_empty(shape, dtype=torch.float64), segments)


def fold_rows(pair: Pair, logits: Logits) -> Folded:
    """Launches the one pass over the logits of a pair; ``logits``: the same, as `launch.logits_of` has laid them."""
    rows, dtypes = count_rows(pair.student), (pair.student.dtype, pair.teacher.dtype)
    settings = launch.forward_settings(pair.width, *dtypes)
    wide_loads = launch.aligned(logits, settings.vector)
    # The pass does not read the tokens: where they lie must not have it compiled again.
    read = logits._replace(tokens=None)

    def run(settings: launch.Forward, folded: Folded) -> None:
        fold_kernel[(rows * folded.segments,)](
            folded,
            constants(settings),
            ALIGNED=wide_loads,
            PTX=launch.speaks_ptx(),
            **launch.compiled_for(settings.warps),
        )

    if launch.AUTOTUNE and rows > 0:
        table = launch.forward_choices(settings, pair.width)
        key = ("fold", pair.width, *dtypes)
        settings = launch.tuned(
            table, key, pair.student, lambda choice: partial(run, choice, room_of(pair, read, choice))
        )
    folded = room_of(pair, read, settings)
    if rows > 0:
        run(settings, folded)
    return folded._replace(logits=logits)


def token_stats(pair: Pair) -> tuple[list[Tensor], Tensor]:
    """The six statistics ``[...]`` float32 and the saved scalars ``[..., SAVED]`` float64.

    Without tokens the statistics are left unwritten: only the scalars are wanted.
    """
    rows = count_rows(pair.student)
    statistics, saved = empty_statistics(pair.student)
    if rows == 0:
        return statistics, saved
    with launch.on(pair.student):
        folded = fold_rows(pair, launch.logits_of(pair))
        finish_kernel[(-(-rows // finish.ROWS),)](
            rows,
            folded,
            Results(tuple(statistics), saved),
            ROWS=finish.ROWS,
            PARTS=parts(folded),
            **launch.compiled_for(finish.WARPS),
        )
    return statistics, saved

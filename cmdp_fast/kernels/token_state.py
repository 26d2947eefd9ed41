"""Columns of a tile folded into the states of its rows: in one launch, or in two if the tile is wider than a segment.

The fields of a state are those of `cmdp_fast/states.py`, in nats and in double.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast import states
from cmdp_fast.arrays import count_rows, written
from cmdp_fast.kernels import finish, launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.finish import Merged, kept, merged_parts
from cmdp_fast.kernels.shapes import State, constants
from cmdp_fast.kernels.shared import finite, locate, natural, raised_in_nats, rise_by, store_state
from cmdp_fast.kernels.token_stats import fold_rows, fold_segment, parts
from cmdp_fast.layout import Pair

FIELDS = tl.constexpr(len(states.FIELDS))
M, N, Z, U, A, B, H, K, XA, YA, R_INF, F_INF, EXACT = (tl.constexpr(place) for place in range(len(states.FIELDS)))


@triton.jit
def rise_to(top, teacher_top, m, n, z, u):
    """The `Rise` of a state to higher references: none for a side without weight, whose reference may be -inf."""
    return rise_by(tl.where(z == 0, 0.0, top - m), tl.where(u == 0, 0.0, teacher_top - n))


@triton.jit
def merge_into(to, tile, inside):
    """A tile's `Merged` state into the fields of a row at `to`, or of many rows, where `inside`."""
    part = tile.state
    m, n = tl.where(part.z == 0, float("-inf"), part.m), tl.where(part.u == 0, float("-inf"), part.n)
    m_old, n_old = tl.load(to + M, mask=inside, other=0.0), tl.load(to + N, mask=inside, other=0.0)
    z_old, u_old = tl.load(to + Z, mask=inside, other=0.0), tl.load(to + U, mask=inside, other=0.0)
    top, teacher_top = tl.maximum(m, m_old), tl.maximum(n, n_old)
    rise = rise_to(top, teacher_top, m, n, part.z, part.u)
    rise_old = rise_to(top, teacher_top, m_old, n_old, z_old, u_old)
    # Loaded after the exponentials: held during them, these sums took 154 registers in place of 128.
    a_old, b_old = tl.load(to + A, mask=inside, other=0.0), tl.load(to + B, mask=inside, other=0.0)
    h_old, k_old = tl.load(to + H, mask=inside, other=0.0), tl.load(to + K, mask=inside, other=0.0)
    tl.debug_barrier()  # several threads may hold the same row: all have read it before one of them writes
    z, u, a, b, h, k = raised_in_nats(part, rise)
    old = State(m_old, n_old, z_old, u_old, a_old, b_old, h_old, k_old)
    z_old, u_old, a_old, b_old, h_old, k_old = raised_in_nats(old, rise_old)
    state = State(top, teacher_top, z + z_old, u + u_old, a + a_old, b + b_old, h + h_old, k + k_old)
    store_state(to, state, inside)
    tl.store(to + R_INF, 1.0, mask=inside & (tile.only_student > 0))
    tl.store(to + F_INF, 1.0, mask=inside & (tile.only_teacher > 0))
    tl.store(to + EXACT, 1.0, mask=inside & (tile.careful > 0))


@triton.jit
def note_token(to, row, logits, first_column, inside):
    """The logits of a row's token, or of those of many rows, into its fields if the tile of `first_column` has them."""
    column = tl.load(logits.tokens + row, mask=inside, other=0).to(tl.int64) - first_column
    own = inside & (column >= 0) & (column < logits.width)
    x = tl.load(logits.student + locate(row, logits.student_rows) + column, mask=own, other=0.0)
    y = tl.load(logits.teacher + locate(row, logits.teacher_rows) + column, mask=own, other=0.0)
    tl.store(to + XA, x.to(tl.float64) * natural(logits.scale), mask=own)
    tl.store(to + YA, y.to(tl.float64) * natural(logits.scale), mask=own)


@triton.jit
def alone(state, careful):
    """The `Merged` state of a row that is one segment, as `finish.merged_parts` makes it: a reference that carries no
    weight is 0, infinite sums are left out."""
    m = tl.where((state.z > 0) & finite(state.m), state.m, 0.0)
    n = tl.where((state.u > 0) & finite(state.n), state.n, 0.0)
    infinity = float("inf")
    a, b = tl.where(state.a == infinity, 0.0, state.a), tl.where(state.b == infinity, 0.0, state.b)
    h, k = tl.where(state.h == infinity, 0.0, state.h), tl.where(state.k == infinity, 0.0, state.k)
    only_student, only_teacher = (state.a == infinity).to(tl.int32), (state.b == infinity).to(tl.int32)
    return Merged(State(m, n, state.z, state.u, a, b, h, k), only_student, only_teacher, careful)


@direct
@triton.jit(do_not_specialize=["first_column"])
def tile_kernel(logits, fields, first_column, settings, ALIGNED: tl.constexpr, PTX: tl.constexpr):
    """One program per row of a tile that is one segment wide: folds it, into `fields` [rows, FIELDS]. The state of a
    masked row stays as it is.

    logits: `Logits`. settings: a `launch.Forward` of constants. ALIGNED, PTX: as `fold.fold`.
    """
    row = tl.program_id(0)
    if logits.mask is not None:
        if tl.load(logits.mask + row) == 0:
            return
    state, careful = fold_segment(row, logits, 0, settings, ALIGNED, PTX)
    to = fields + row.to(tl.int64) * FIELDS
    merge_into(to, alone(state, careful), True)
    note_token(to, row.to(tl.int64), logits, first_column, True)


@direct
@triton.jit(do_not_specialize=["first_column"])
def update_kernel(rows, folded, fields, first_column, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """One program for ROWS rows: the `Folded` states of a tile go into `fields` [rows, FIELDS]. The state of a masked
    row stays as it is."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    logits = folded.logits
    inside = kept(row, row < rows, logits.mask)
    to = fields + row * FIELDS
    merge_into(to, merged_parts(folded, row, inside, PARTS), inside)
    note_token(to, row, logits, first_column, inside)


def update_states(pair: Pair, first_column: int, fields: Tensor) -> None:
    """Folds a tile of logits ``[..., C]``, columns [first_column, first_column + C) of the vocabulary, into
    ``fields [rows, 13]``, in place. Tokens count from the beginning of the vocabulary; ``width`` is C.

    One launch if a segment has room for the tile, else two.
    """
    rows = count_rows(pair.student)
    if rows == 0:
        return
    written("fields", fields, torch.float64, rows * len(states.FIELDS), pair.student.get_device())
    with launch.on(pair.student):
        logits = launch.logits_of(pair)
        settings = launch.forward_settings(pair.width, pair.student.dtype, pair.teacher.dtype)
        if launch.segments(pair.width, settings) == 1:
            wide_loads = launch.aligned(logits, settings.vector)

            def run(settings: launch.Forward, fields: Tensor) -> None:
                tile_kernel[(rows,)](
                    logits,
                    fields,
                    first_column,
                    constants(settings),
                    ALIGNED=wide_loads,
                    PTX=launch.speaks_ptx(),
                    **launch.compiled_for(settings.warps),
                )

            if launch.AUTOTUNE:
                choices = launch.forward_choices(settings, pair.width)
                table = [choice for choice in choices if launch.segments(pair.width, choice) == 1]
                key, spare = ("tile", pair.width, pair.student.dtype, pair.teacher.dtype), fields.clone()
                settings = launch.tuned(table, key, pair.student, lambda choice: partial(run, choice, spare))
            run(settings, fields)
            return
        folded = fold_rows(pair, logits)
        update_kernel[(-(-rows // finish.ROWS),)](
            rows,
            folded,
            fields,
            first_column,
            ROWS=finish.ROWS,
            PARTS=parts(folded),
            **launch.compiled_for(finish.WARPS),
        )

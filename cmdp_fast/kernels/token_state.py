"""Columns of a tile folded into the states of its rows: `fold_rows`, and one small kernel that merges.

The fields of a state are those of `cmdp_fast/states.py`, in nats and in double.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast import states
from cmdp_fast.kernels import finish, launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.finish import kept, merged_parts
from cmdp_fast.kernels.shapes import State
from cmdp_fast.kernels.shared import locate, natural, raised_in_nats, rise_by, store_state
from cmdp_fast.kernels.token_stats import fold_rows, parts
from cmdp_fast.layout import Pair

FIELDS = tl.constexpr(len(states.FIELDS))
M, N, Z, U, A, B, H, K, XA, YA, R_INF, F_INF, EXACT = (tl.constexpr(place) for place in range(len(states.FIELDS)))


@triton.jit
def rise_to(top, teacher_top, m, n, z, u):
    """The `Rise` of a state to higher references: none for a side without weight, whose reference may be -inf."""
    return rise_by(tl.where(z == 0, 0.0, top - m), tl.where(u == 0, 0.0, teacher_top - n))


@direct
@triton.jit
def update_kernel(rows, folded, fields, first_column, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """One program for ROWS rows: the `Folded` states of a tile go into `fields` [rows, FIELDS]. The state of a masked
    row stays as it is."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    logits = folded.logits
    inside = kept(row, row < rows, logits.mask)
    tile, only_student, only_teacher, careful = merged_parts(folded, row, inside, PARTS)
    m, n = tl.where(tile.z == 0, float("-inf"), tile.m), tl.where(tile.u == 0, float("-inf"), tile.n)
    to = fields + row * FIELDS
    m_old, n_old = tl.load(to + M, mask=inside, other=0.0), tl.load(to + N, mask=inside, other=0.0)
    z_old, u_old = tl.load(to + Z, mask=inside, other=0.0), tl.load(to + U, mask=inside, other=0.0)
    top, teacher_top = tl.maximum(m, m_old), tl.maximum(n, n_old)
    rise = rise_to(top, teacher_top, m, n, tile.z, tile.u)
    rise_old = rise_to(top, teacher_top, m_old, n_old, z_old, u_old)
    # Loaded after the exponentials: held during them, these sums took 154 registers in place of 128.
    a_old, b_old = tl.load(to + A, mask=inside, other=0.0), tl.load(to + B, mask=inside, other=0.0)
    h_old, k_old = tl.load(to + H, mask=inside, other=0.0), tl.load(to + K, mask=inside, other=0.0)
    tl.debug_barrier()  # several threads may hold the same row: all have read it before one of them writes
    z, u, a, b, h, k = raised_in_nats(tile, rise)
    old = State(m_old, n_old, z_old, u_old, a_old, b_old, h_old, k_old)
    z_old, u_old, a_old, b_old, h_old, k_old = raised_in_nats(old, rise_old)
    state = State(top, teacher_top, z + z_old, u + u_old, a + a_old, b + b_old, h + h_old, k + k_old)
    store_state(to, state, inside)

    column = tl.load(logits.tokens + row, mask=inside, other=0).to(tl.int64) - first_column
    own = inside & (column >= 0) & (column < logits.width)
    x = tl.load(logits.student + locate(row, logits.student_rows) + column, mask=own, other=0.0)
    y = tl.load(logits.teacher + locate(row, logits.teacher_rows) + column, mask=own, other=0.0)
    tl.store(to + XA, x.to(tl.float64) * natural(logits.scale), mask=own)
    tl.store(to + YA, y.to(tl.float64) * natural(logits.scale), mask=own)
    tl.store(to + R_INF, 1.0, mask=inside & (only_student > 0))
    tl.store(to + F_INF, 1.0, mask=inside & (only_teacher > 0))
    tl.store(to + EXACT, 1.0, mask=inside & (careful > 0))


def update_states(pair: Pair, first_column: int, fields: Tensor) -> None:
    """Folds a tile of logits ``[..., C]``, columns [first_column, first_column + C) of the vocabulary, into
    ``fields [rows, 13]``, in place. Tokens count from the beginning of the vocabulary; ``width`` is C."""
    rows = launch.count_rows(pair.student)
    if rows == 0:
        return
    with launch.on(pair.student):
        folded = fold_rows(pair, launch.logits_of(pair))
        update_kernel[(triton.cdiv(rows, finish.ROWS),)](
            rows,
            folded,
            fields,
            first_column,
            ROWS=finish.ROWS,
            PARTS=parts(folded),
            **launch.compiled_for(finish.WARPS),
        )

"""Columns of a tile folded into the states of its rows: `fold_rows`, and one small kernel that merges.

The fields of a state are those of `cmdp_fast/ops/token_state.py`, in nats and in double.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import finish, launch
from cmdp_fast.kernels.finish import merged_parts
from cmdp_fast.kernels.shared import PER_NAT, STATE_FIELDS, locate, natural
from cmdp_fast.kernels.token_stats import fold_rows

FIELDS = tl.constexpr(13)  # m, n, z, u, a, b, h, k, xa, ya, r_inf, f_inf, exact


@triton.jit
def raise_of(reference, weight, top):
    """How far a state's reference has to rise; nothing for a side without weight, whose reference may be -inf."""
    return tl.where(weight == 0, 0.0, top - reference)


@triton.jit
def update_kernel(
    rows,
    student,
    teacher,
    tokens,
    mask,
    partial,
    fields,
    x_strides,
    y_strides,
    width,
    segments,
    scale,
    first_column,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program for ROWS rows. The state of a masked row stays as it is."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if mask is not None:
        inside = inside & (tl.load(mask + row, mask=inside, other=0) != 0)
    part = tl.arange(0, PARTS)[None, :]
    at = partial + (row[:, None] * segments + part) * STATE_FIELDS
    m, n, z, u, a, b, h, k, only_student, only_teacher, careful = merged_parts(at, (part < segments) & inside[:, None])
    m, n = tl.where(z == 0, float("-inf"), m), tl.where(u == 0, float("-inf"), n)

    to = fields + row * FIELDS
    m_old, n_old = tl.load(to, mask=inside, other=0.0), tl.load(to + 1, mask=inside, other=0.0)
    z_old, u_old = tl.load(to + 2, mask=inside, other=0.0), tl.load(to + 3, mask=inside, other=0.0)
    top, teacher_top = tl.maximum(m, m_old), tl.maximum(n, n_old)
    x_rise, y_rise = raise_of(m, z, top), raise_of(n, u, teacher_top)
    x_rise_old, y_rise_old = raise_of(m_old, z_old, top), raise_of(n_old, u_old, teacher_top)
    x_shrink, y_shrink = tl.exp2(-x_rise * PER_NAT), tl.exp2(-y_rise * PER_NAT)
    x_shrink_old, y_shrink_old = tl.exp2(-x_rise_old * PER_NAT), tl.exp2(-y_rise_old * PER_NAT)
    a_old, b_old = tl.load(to + 4, mask=inside, other=0.0), tl.load(to + 5, mask=inside, other=0.0)
    h_old, k_old = tl.load(to + 6, mask=inside, other=0.0), tl.load(to + 7, mask=inside, other=0.0)
    apart, apart_old = x_rise - y_rise, x_rise_old - y_rise_old
    tl.debug_barrier()  # several threads may hold the same row: all have read it before one of them writes
    tl.store(to, top, mask=inside)
    tl.store(to + 1, teacher_top, mask=inside)
    tl.store(to + 2, z * x_shrink + z_old * x_shrink_old, mask=inside)
    tl.store(to + 3, u * y_shrink + u_old * y_shrink_old, mask=inside)
    tl.store(to + 4, (a - apart * z) * x_shrink + (a_old - apart_old * z_old) * x_shrink_old, mask=inside)
    tl.store(to + 5, (b + apart * u) * y_shrink + (b_old + apart_old * u_old) * y_shrink_old, mask=inside)
    tl.store(to + 6, (h - x_rise * z) * x_shrink + (h_old - x_rise_old * z_old) * x_shrink_old, mask=inside)
    tl.store(to + 7, (k - y_rise * u) * y_shrink + (k_old - y_rise_old * u_old) * y_shrink_old, mask=inside)

    column = tl.load(tokens + row, mask=inside, other=0).to(tl.int64) - first_column
    own = inside & (column >= 0) & (column < width)
    x = tl.load(student + locate(row, x_strides) + column, mask=own, other=0.0)
    y = tl.load(teacher + locate(row, y_strides) + column, mask=own, other=0.0)
    tl.store(to + 8, x.to(tl.float64) * natural(scale), mask=own)
    tl.store(to + 9, y.to(tl.float64) * natural(scale), mask=own)
    tl.store(to + 10, 1.0, mask=inside & (only_student > 0))
    tl.store(to + 11, 1.0, mask=inside & (only_teacher > 0))
    tl.store(to + 12, 1.0, mask=inside & (careful > 0))


def update_states(
    fields: Tensor,
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    first_column: int,
    temperature: float,
) -> None:
    """Folds columns [first_column, first_column + C) of logits ``[..., C]`` into ``fields [rows, 13]``, in place."""
    rows, width = launch.count_rows(student), student.shape[-1]
    if rows == 0:
        return
    keep = launch.flags(mask)
    with launch.on(student):
        folded = fold_rows(student, teacher, keep, temperature, width)
        update_kernel[(triton.cdiv(rows, finish.ROWS),)](
            rows,
            folded.student.tensor,
            folded.teacher.tensor,
            tokens.contiguous(),
            keep,
            folded.partial,
            fields,
            *folded.shape,
            first_column,
            ROWS=finish.ROWS,
            PARTS=folded.parts,
            **launch.compiled_for(finish.WARPS),
        )

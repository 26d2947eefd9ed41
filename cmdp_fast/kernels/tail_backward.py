"""The tail of a row, backward: one expression per column in one pass, then the listed columns as they are given.

Of a column outside of the list dx = p (constant + slope log p), with p the student's distribution within the tail. With
t = L x - M, where M is the normaliser in octaves rounded to float32 and r the rest that rounding left, p = 2^t 2^-r and

    dx = 2^t (c0 + c1 t),     c0 = 2^-r (constant - slope r ln 2),     c1 = 2^-r slope ln 2.

A program writes this to all of its columns, listed or not, and then writes over those that are: it looks at every entry
of the list, which is short. The token's own column is done apart, in double. A row whose normaliser or coefficients are
so large that float32 may overflow on the way is done in double.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.arrays import count_rows, settled_gradient
from cmdp_fast.kernels import launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.shapes import Lanes, Rows, constants
from cmdp_fast.kernels.shared import LN2, PER_NAT, locate, natural, octaves, taken, zero
from cmdp_fast.kernels.tail import AT_ONCE
from cmdp_fast.kernels.token_stats_backward import MODEST, Target, split
from cmdp_fast.layout import ListedRows, TailGradient


class Slopes(NamedTuple):
    """The constants of a row, float32: see the top of this file."""

    m: Lanes  # M
    constant: Lanes  # c0
    along_t: Lanes  # c1


@triton.jit
def any_listed(listed, row, count):
    """Whether the gradient of a listed column of a row is not 0."""
    found = tl.zeros([], tl.int32)
    for first in range(0, count, AT_ONCE):
        place = first + tl.arange(0, AT_ONCE)
        given = tl.load(listed + row * count + place, mask=place < count, other=0.0)
        found = tl.maximum(found, tl.max((given != 0).to(tl.int32), 0))
    return found


@triton.jit
def careful_gradient(x, row, gradient, scale):
    """dx of some columns in double, of a tail that has weight."""
    log_p = (x.to(tl.float64) * natural(scale) - tl.load(gradient.reference + row)) - tl.load(gradient.log_mass + row)
    p = tl.exp2(log_p * PER_NAT)
    value = p * (tl.load(gradient.constant + row) + tl.load(gradient.slope + row) * log_p)
    return tl.where(p == 0, 0.0, value)


@triton.jit
def tile_gradient(student, columns, inside, slopes, scale):
    """dx of some columns of the tail."""
    t = octaves(taken(student, columns, inside), scale, slopes.m)
    p = tl.exp2(t)
    factor = tl.fma(t, tl.zeros_like(t) + slopes.along_t, tl.zeros_like(t) + slopes.constant)
    return p * tl.where(p == 0, 0.0, factor)  # of -inf the factor is infinite or NaN


@triton.jit
def write_listed(to_row, rows, listed, row, first_column, start, stop):
    """What is given of the listed columns in [start, stop)."""
    for first in range(0, rows.count, AT_ONCE):
        place = first + tl.arange(0, AT_ONCE)
        inside = place < rows.count
        id = tl.load(rows.ids + row * rows.count + place, mask=inside, other=-1)
        column = id - first_column
        here = (id >= 0) & (column >= start) & (column < stop)
        value = tl.load(listed + row * rows.count + place, mask=here, other=0.0)
        tl.store(to_row + column, value.to(tl.float32).to(to_row.dtype.element_ty), mask=here)


@direct
@triton.jit(do_not_specialize=["first_column"])
def backward_kernel(rows, gradient, target, first_column, settings):
    """One program per `span` columns of a row, which it does a `tile` at a time. `target.out` may be the logits: a
    column is read, then written.

    rows: a `shapes.Listed`, whole or a tile of the vocabulary that begins at `first_column`. gradient: a
    `TailGradient`. target: a `Target`. settings: a `launch.Columns` of constants.
    """
    TILE: tl.constexpr = settings.tile
    CAREFUL: tl.constexpr = settings.careful
    program = tl.program_id(0)
    row, block = (program // target.blocks).to(tl.int64), program % target.blocks
    width, vocab = target.width, rows.width
    start = block * settings.span
    stop = tl.minimum(start + settings.span, width)
    counted = tl.minimum(stop, vocab)
    to_row = target.out + locate(row, target.rows)
    dtype = to_row.dtype.element_ty
    tile = tl.arange(0, TILE)
    if rows.mask is not None:
        if tl.load(rows.mask + row) == 0:
            zero(to_row, start, stop, TILE)
            return
    constant, slope = tl.load(gradient.constant + row), tl.load(gradient.slope + row)
    share = tl.load(gradient.own + row)
    reference, log_mass = tl.load(gradient.reference + row), tl.load(gradient.log_mass + row)
    flows = (constant != 0) | (slope != 0) | (share != 0)
    if not flows:
        if any_listed(gradient.listed, row, rows.count) == 0:
            zero(to_row, start, stop, TILE)
            return
    student = rows.student + locate(row, rows.rows)
    token = tl.load(rows.tokens + row).to(tl.int64) - first_column
    own_here = (start <= token) & (token < counted)
    own = tl.zeros([], tl.float32)
    if own_here:  # apart and in double, and read before a neighbour writes over it
        value = careful_gradient(tl.load(student + token), row, gradient, rows.scale)
        own += (tl.where(log_mass == float("-inf"), 0.0, value) + share).to(tl.float32)
        tl.debug_barrier()

    m, rest = split(reference, log_mass)
    weight = tl.exp2(-rest)
    c0, c1 = weight * (constant - slope * LN2 * rest), weight * slope * LN2
    largest = tl.maximum(tl.abs(c0), tl.abs(c1))
    if log_mass == float("-inf"):
        zero(to_row, start, stop, TILE)
    elif tl.maximum(largest, tl.abs(m)) >= MODEST:  # so large a normaliser leaves rests of whole octaves
        # Few columns at a time: this is rare, and the registers it takes count against the other way too.
        for first in range(start, stop, CAREFUL):
            columns = first + tl.arange(0, CAREFUL)
            inside = columns < vocab
            x = tl.load(student + columns, mask=inside, other=0.0)
            value = tl.where(inside, careful_gradient(x, row, gradient, rows.scale), 0.0)
            tl.store(to_row + columns, value.to(tl.float32).to(dtype), mask=columns < width)
    else:
        slopes = Slopes(m, c0.to(tl.float32), c1.to(tl.float32))
        whole = start + tl.maximum(counted - start, 0) // TILE * TILE
        for first in range(start, whole, TILE):
            columns = first + tile
            value = tile_gradient(student, columns, None, slopes, rows.scale)
            tl.store(to_row + columns, value.to(dtype))
        for first in range(whole, stop, TILE):
            columns = first + tile
            inside = columns < vocab
            value = tl.where(inside, tile_gradient(student, columns, inside, slopes, rows.scale), 0.0)
            tl.store(to_row + columns, value.to(dtype), mask=columns < width)
    tl.debug_barrier()  # what follows are other threads' columns
    if own_here:
        tl.store(to_row + token, own.to(dtype))
        tl.debug_barrier()
    write_listed(to_row, rows, gradient.listed, row, first_column, start, counted)


def tail_backward(rows: ListedRows, gradient: TailGradient, out: Tensor, first_column: int = 0) -> None:
    """Writes the gradient of the student's logits into ``out`` ``[..., V]``, which may be the logits themselves.

    They may be a tile of the vocabulary that begins at ``first_column``. Columns from ``rows.width`` on get 0.
    """
    count, width = count_rows(rows.student), rows.student.shape[-1]
    if count == 0:
        return
    out_rows = launch.writable_rows(out)
    with launch.on(rows.student):
        listed = launch.listed_of(rows)
        numbers = settled_gradient(gradient, rows)

        def run(settings: launch.Columns, out: Tensor, out_rows: Rows, count: int) -> None:
            blocks = -(-width // settings.span)
            backward_kernel[(count * blocks,)](
                listed,
                numbers,
                Target(out, out_rows, width, blocks),
                first_column,
                constants(settings),
                **launch.compiled_for(settings.warps),
            )

        settings = launch.column_settings(width)
        wide = launch.aligned_rows(listed.student, listed.rows, launch.KNOWN)
        wide = wide and launch.aligned_rows(out, out_rows, launch.KNOWN)
        if not wide:
            settings = launch.halved(settings)
        if launch.AUTOTUNE:
            key = ("tail_backward", width, rows.student.dtype, out.dtype, wide)
            scratch, table = launch.scratch_for(out, out_rows, count), launch.column_choices(settings)
            settings = launch.tuned(table, key, rows.student, lambda choice: partial(run, choice, *scratch))
        run(settings, out, out_rows, count)

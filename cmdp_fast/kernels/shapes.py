"""Values that kernels are given, and hand on, under one name each. The host fills them with tensors, which kernels see
as pointers, and with numbers; those of `cmdp_fast/layout.py` that hold nothing but such are given as they are.

Of a tuple's members Triton makes its own choices: a float arrives as float32, an integer is specialised on its value,
None and a `tl.constexpr` are known when the kernel is compiled. An argument that must be a double, or must not be
specialised, therefore stands alone. No field may be called `type` or `values`: Triton's own tuples have those.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import triton.language as tl

Pointer = Any  # a tensor on the host
Lanes = Any  # the numbers that one program holds: one per lane, per row or per token
Settings = TypeVar("Settings", bound=tuple)


class Rows(NamedTuple):
    """Where rows begin, over at most two axes: row i at -(i // inner * outer_stride + i % inner * stride).

    The strides are negated because none may be 1, as that of a vocabulary of one column would be: to Triton 3.6 an
    integer of 1 in a tuple within a tuple is None.
    """

    inner: int  # 2 or more
    stride: int  # negated, in elements
    outer_stride: int  # likewise


class Logits(NamedTuple):
    """A `cmdp_fast.layout.Pair` as kernels read it.

    Pointers come before the numbers: where they take turns, the backward pass takes 56 registers in place of 48.
    """

    student: Pointer  # [rows, V]
    teacher: Pointer  # [rows, V']
    tokens: Pointer | None  # [rows]
    mask: Pointer | None  # [rows] bytes
    student_rows: Rows
    teacher_rows: Rows
    width: int  # columns that count
    scale: float  # log2(e)/temperature


class Listed(NamedTuple):
    """A `cmdp_fast.layout.ListedRows` as kernels read it."""

    student: Pointer  # [rows, V]
    ids: Pointer  # [rows, count] int64
    tokens: Pointer | None  # [rows]
    mask: Pointer | None  # [rows] bytes
    rows: Rows
    count: int  # columns that are listed
    width: int  # columns that count
    scale: float  # log2(e)/temperature


class Row(NamedTuple):
    """One row of both models: pointers to the first column, and the factor of a logit."""

    student: Pointer
    teacher: Pointer
    scale: float


class Folded(NamedTuple):
    """Partial states of all rows, and all that is needed to finish them."""

    logits: Logits
    partial: Pointer  # [rows, segments, STATE_FIELDS] float64
    segments: int


class Results(NamedTuple):
    """Where a finished row goes."""

    statistics: tuple[Pointer, ...]  # six, [rows] each; not written if there are no tokens
    saved: Pointer  # [rows, SAVED] float64


class State(NamedTuple):
    """The sums of csrc/token_state.h over some columns: in octaves and float32, or in nats and double."""

    m: Lanes
    n: Lanes
    z: Lanes
    u: Lanes
    a: Lanes
    b: Lanes
    h: Lanes
    k: Lanes


class SavedRow(NamedTuple):
    """The numbers of a finished row that the backward passes need, in nats and in double: `cmdp_fast.layout.SAVED`."""

    m: Lanes  # the references
    n: Lanes
    log_z: Lanes
    log_u: Lanes
    entropy: Lanes
    reverse_kl: Lanes
    careful: Lanes  # 1 if the row has to be done carefully


@functools.lru_cache(maxsize=None, typed=True)  # by type too: other settings may have the same numbers
def constants(settings: Settings) -> Settings:
    """The same settings, each of them known when a kernel is compiled."""
    return type(settings)(*map(tl.constexpr, settings))

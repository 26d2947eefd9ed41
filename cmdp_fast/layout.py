"""What a backend is given: a pair of logits and the rules of a budget as values, and how tensors lie in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast import storage
from cmdp_fast.reference import BudgetTrace, CostName, KindName, TokenStats

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
AXES = 8  # leading axes of rows that lie scattered: Matrix::kMaxDims in csrc/logits.h
SAVED = 7  # numbers per row that the backward pass needs: SavedRow in csrc/logits.h


class Pair(NamedTuple):
    """Rows of logits of both models. Nothing of it is checked any more."""

    student: Tensor  # [..., V], the last axis contiguous
    teacher: Tensor  # [..., V'], likewise
    tokens: Tensor | None  # [...] integers: indices into the whole vocabulary
    mask: Tensor | None  # [...] bool: False leaves the row out
    temperature: float
    width: int  # columns that count


class Upstream(NamedTuple):
    """The gradients that arrive at the differentiable statistics, ``[...]`` each; None for one that does not count."""

    logprob: Tensor | None
    entropy: Tensor | None
    reverse_kl: Tensor | None
    forward_kl: Tensor | None


class Mixture(NamedTuple):
    """Which mixture divergence: c_teacher KL(w‖M) + c_student KL(p‖M) with M = (1-b) p + b w."""

    b: float
    c_teacher: float
    c_student: float


class ListedRows(NamedTuple):
    """Rows of a student's logits of which a teacher has listed some columns. Nothing of it is checked any more."""

    student: Tensor  # [..., V], the last axis contiguous
    ids: (
        Tensor  # [..., k] int64, contiguous: columns of the whole vocabulary, ascending, each once; -1 (anywhere): none
    )
    tokens: Tensor  # [...] integers: indices into the whole vocabulary
    mask: Tensor | None  # [...] bool: False leaves the row out
    temperature: float
    width: int  # columns that count


class TailGradient(NamedTuple):
    """What the gradient of a student's logits is made of, float64 and contiguous.

    Of a column v outside the list it is p_T(v) (constant + slope log p_T(v)), with log p_T(v) = x(v) - reference -
    log_mass, and ``own`` more if v is the token; that of a listed column is given. All is already divided by the
    temperature.
    """

    reference: Tensor  # [rows], as in `tails.Tail`
    log_mass: Tensor  # [rows]
    constant: Tensor  # [rows]
    slope: Tensor  # [rows]
    own: Tensor  # [rows]
    listed: Tensor  # [rows, k]; with the token's part where it is listed


class BudgetRule(NamedTuple):
    """How an account is kept: BudgetRule in csrc/budget.h."""

    gamma: float  # discount of the cost
    mean: bool  # the prefix mean, in place of the sum
    inclusive: bool  # a spent budget is a violation


class RewardRule(NamedTuple):
    """What is paid: RewardRule in csrc/budget.h."""

    kind: KindName
    at_crossing: bool
    penalty: float
    discrepancy_weight: float
    coefficient: float
    barrier_slope: float


class TokenTrace(NamedTuple):
    """The fields of a `BudgetTrace` that a modified reward looks at, contiguous and in the dtype of the cost."""

    cumulative: Tensor
    remaining: Tensor
    violated: Tensor  # bool
    excess: Tensor


class Account(NamedTuple):
    """What a scan reads: costs ``[B, T]`` or packed ``[N]``, contiguous."""

    cost: Tensor  # float32 or float64
    mask: Tensor | None  # bool, like the cost
    offsets: Tensor  # [B+1] int64: where each sequence begins in the flattened cost


class Rewarding(NamedTuple):
    """A reward that is to be modified, and where the modified one is written; both in the dtype of the cost."""

    rule: RewardRule
    task_reward: Tensor
    reward: Tensor


class Settlement(NamedTuple):
    """The budget of a pass that does everything in one call. Tokens are ``[B, T]``, or ``[N]`` with cu_seqlens."""

    cost: CostName  # one of the backend's COSTS
    cu_seqlens: Tensor | None  # [B+1]
    budget: Tensor | float  # a number or [B]
    per_token: bool
    rule: BudgetRule
    trace: BudgetTrace  # room for it, contiguous; in any backend
    rewarding: Rewarding
    # Of tensors on a CPU, where values can be looked at; they have been.
    offsets: Tensor | None = None  # [B+1] int64: where sequences begin; None if they are the rows of [B, T]
    limits: Tensor | float | None = None  # [B] float64: what each may spend, or the number that all may


def address(t: Tensor | None) -> int:
    """Where the numbers of an array are; 0 stands for none. One that has lost its memory is an error: a mask, for one,
    would be taken for none at all."""
    if t is None:
        return 0
    check_memory(t)
    return t.data_ptr()


def check_memory(t: Tensor) -> None:
    """Raises ValueError for a tensor whose storage has shrunk or was released: what follows it would be read."""
    if storage.lost(t):
        raise ValueError(f"a tensor of shape {tuple(t.shape)} {storage.LOST}")


def flat(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A small per-token tensor as a contiguous array; keep a reference to it while the kernel runs."""
    return t if t is None else in_array(t, dtype)


def in_array(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself if it is a contiguous array of a dtype, else a copy."""
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()  # `to` costs as much as an addition even so


def row_axes(t: Tensor) -> list[tuple[int, int]]:
    """Size and stride of the leading axes of ``[..., V]``, neighbouring axes merged where memory allows."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def addressable(t: Tensor) -> bool:
    """Whether the GPU kernels can address a tensor's rows where they lie, and so write to them."""
    return len(row_axes(t)) <= 2


def matrix_of(t: Tensor) -> tuple[int, str, list[int], list[int], int]:
    """The rows ``[..., V]`` of a tensor: address, dtype, leading sizes and strides, width (make_matrix in
    csrc/arguments.h). Raises ValueError where `in_rows` would copy it."""
    width, dtype = t.shape[-1], DTYPE_NAMES[t.dtype]
    count = t.numel()
    if count > width > 0 and t.is_contiguous():  # one axis
        return t.data_ptr(), dtype, [count // width], [width], width
    if count > 0 and width > 1 and t.stride(-1) != 1:
        raise ValueError(f"the last axis of a matrix must be contiguous, got {list(t.shape)} with strides {t.stride()}")
    axes = row_axes(t)
    return t.data_ptr(), dtype, [size for size, _ in axes], [stride for _, stride in axes], width


def empty_statistics(student: Tensor) -> tuple[list[Tensor], Tensor]:
    """Room for what the GPU kernels make of ``student [..., V]``: the six statistics and the saved scalars."""
    shape = student.shape[:-1]
    statistics = alike(student.new_empty(shape, dtype=torch.float32), len(TokenStats._fields))
    return statistics, student.new_empty((*shape, SAVED), dtype=torch.float64)


def alike(first: Tensor, count: int, zero: bool = False) -> list[Tensor]:
    """Room for ``count`` tensors, the first and others like it.

    A small tensor that is like another is made in less than half the time of one from a shape and a dtype.
    """
    make = torch.zeros_like if zero else torch.empty_like
    return [first, *(make(first) for _ in range(count - 1))]


def unit_stride(t: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous and the kernels can follow the others, else a copy."""
    if t.dim() > AXES + 1 and len(row_axes(t)) > AXES:
        return t.contiguous()
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def can_overwrite(t: Tensor, other: Tensor) -> bool:
    """Whether rows of ``t`` may be overwritten one by one while ``other`` is still read.

    Not if rows of ``t`` share memory, as after `expand` or `unfold`, nor if ``other`` lies in the same storage in
    another layout: a row could then be overwritten before it has been read. The same rows are fine.
    """
    extent = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent += (size - 1) * stride
    shared = t.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    same = t.data_ptr() == other.data_ptr() and t.stride() == other.stride() and t.dtype == other.dtype
    return not shared or same

"""What stands between a tensor and its address: a backend's kernels read and write nothing that has not come by here.

The public operations check their arguments, but operators are called by graphs, too: torch.export guards no strides,
make_fx guards nothing at all, and what torch knows to be 0 has no memory until it is expanded. So each function of a
backend has its tensors settled first. A layout is made, where it is not as the kernels need it; everything else is an
error. No value is looked at, nothing waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmdp_fast.layout import (
    DTYPE_NAMES,
    Account,
    ListedRows,
    Pair,
    Rewarding,
    Settlement,
    TailGradient,
    TokenTrace,
    Upstream,
    in_array,
    unit_stride,
)


def array(name: str, t: Tensor, dtype: torch.dtype | None, count: int, device: int) -> Tensor:
    """A small tensor as a contiguous array of ``count`` numbers; keep a reference to it while the kernel runs.

    ``dtype``: what it is converted to, if to anything; ``device``: as `Tensor.get_device` gives it. Raises ValueError
    for another number of numbers, another device, and memory that is not aligned.
    """
    if t.numel() != count or t.get_device() != device:
        where = "" if t.get_device() == device else f" on {_device(device)}"
        raise ValueError(f"{name} must have {count} numbers{where}, got {list(t.shape)} on {t.device}")
    t = t.contiguous() if dtype is None else in_array(t, dtype)
    if t.data_ptr() % t.itemsize:
        raise ValueError(_askew(name, t))
    return t


def written(name: str, t: Tensor, dtype: torch.dtype, count: int, device: int) -> Tensor:
    """The tensor itself, which a kernel writes to. Raises ValueError if it is no such `array`."""
    if t.dtype != dtype or not t.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous and {DTYPE_NAMES[dtype]}, got {t.dtype} of shape {list(t.shape)} with strides "
            f"{t.stride()}"
        )
    return array(name, t, None, count, device)


def optional(name: str, t: Tensor | None, dtype: torch.dtype | None, count: int, device: int) -> Tensor | None:
    """As `array`, of a tensor that need not be given."""
    return None if t is None else array(name, t, dtype, count, device)


def in_rows(name: str, t: Tensor) -> Tensor:
    """A matrix ``[..., V]`` as `matrix_of` can take it: itself, or a copy. Raises as `array`."""
    if t.dtype not in DTYPE_NAMES:
        raise TypeError(f"{name} must be {', '.join(DTYPE_NAMES.values())}, got {t.dtype}")
    if not t.is_contiguous():
        t = unit_stride(t)
    if t.data_ptr() % t.itemsize:
        raise ValueError(_askew(name, t))
    return t


def settled(pair: Pair, index: torch.dtype | None = torch.int64) -> Pair:
    """A pair whose tensors have addresses: rows, and arrays of a number for each of them. Raises as `array`.

    ``index``: the dtype of its tokens; None leaves it.
    """
    student, teacher = in_rows("the student's logits", pair.student), in_rows("the teacher's logits", pair.teacher)
    shape, device, width = student.shape, student.get_device(), pair.width
    alike = teacher.shape == shape or (count_rows(teacher) == count_rows(student) and width <= teacher.shape[-1])
    if not alike or teacher.get_device() != device or not 0 < width <= shape[-1]:
        raise ValueError(
            f"the logits must be of the same rows, on one device and at least {width} wide, got "
            f"{list(student.shape)} on {student.device} and {list(teacher.shape)} on {teacher.device}"
        )
    rows = student.numel() // shape[-1]
    tokens = optional("tokens", pair.tokens, index, rows, device)
    mask = optional("mask", pair.mask, torch.bool, rows, device)
    return Pair(student, teacher, tokens, mask, pair.temperature, width)


def settled_rows(rows: ListedRows, index: torch.dtype | None = torch.int64) -> ListedRows:
    """As `settled`, of rows with listed columns."""
    student, listed = in_rows("the student's logits", rows.student), rows.ids.shape[-1]
    count, device = count_rows(student), student.get_device()
    if not 0 < rows.width <= student.shape[-1]:
        raise ValueError(f"the student's logits must be at least {rows.width} wide, got {list(student.shape)}")
    return rows._replace(
        student=student,
        ids=array("the ids", rows.ids, torch.int64, count * listed, device),
        tokens=array("tokens", rows.tokens, index, count, device),
        mask=optional("mask", rows.mask, torch.bool, count, device),
    )


def settled_gradient(gradient: TailGradient, rows: ListedRows) -> TailGradient:
    """As `settled`, of what belongs to such rows."""
    student, listed = rows.student, rows.ids.shape[-1]
    numbers = (1, 1, 1, 1, 1, listed)  # of each row
    pairs = zip(gradient, numbers, strict=True)
    return TailGradient(*(of_rows("a gradient", t, torch.float64, student, each) for t, each in pairs))


def settled_account(account: Account) -> Account:
    """As `settled`, of an account. Raises TypeError for costs that are neither float32 nor float64."""
    cost, mask, offsets = account
    if cost.dtype != torch.float32 and cost.dtype != torch.float64:
        raise TypeError(f"cost must be float32 or float64, got {cost.dtype}")
    count, device = cost.numel(), cost.get_device()
    return Account(
        array("cost", cost, None, count, device),
        optional("mask", mask, torch.bool, count, device),
        array("cu_seqlens", offsets, torch.int64, offsets.shape[0], device),
    )


def settled_trace(trace: TokenTrace, cost: Tensor) -> TokenTrace:
    """As `settled`, of the trace of costs that are settled."""
    dtype, count, device = cost.dtype, cost.numel(), cost.get_device()
    return TokenTrace(
        array("trace.cumulative", trace.cumulative, dtype, count, device),
        array("trace.remaining", trace.remaining, dtype, count, device),
        array("trace.violated", trace.violated, torch.bool, count, device),
        array("trace.excess", trace.excess, dtype, count, device),
    )


def settled_rewarding(rewarding: Rewarding, cost: Tensor) -> Rewarding:
    """As `settled`, of the rewards of such costs."""
    dtype, count, device = cost.dtype, cost.numel(), cost.get_device()
    task_reward = array("task_reward", rewarding.task_reward, dtype, count, device)
    return Rewarding(rewarding.rule, task_reward, written("the reward", rewarding.reward, dtype, count, device))


def settled_packing(settlement: Settlement, rows: Tensor) -> tuple[Tensor | None, Tensor | float]:
    """As `settled`, of where the sequences of some rows begin and of what they may spend, on a GPU."""
    offsets, budget, device = settlement.cu_seqlens, settlement.budget, rows.get_device()
    sequences = settlement.trace.first_violation.shape[0]
    if offsets is not None:
        dtype = torch.int32 if offsets.dtype == torch.int32 else torch.int64
        offsets = array("cu_seqlens", offsets, dtype, sequences + 1, device)
    if isinstance(budget, Tensor):
        budget = array("budget", budget, None, sequences if budget.dim() else 1, device)
    return offsets, budget


def of_rows(name: str, t: Tensor, dtype: torch.dtype | None, rows: Tensor, numbers: int = 1) -> Tensor:
    """An `array` of so many numbers for each row of a matrix ``[..., V]``."""
    return array(name, t, dtype, count_rows(rows) * numbers, rows.get_device())


def settled_upstream(upstream: Upstream, dtype: torch.dtype | None, rows: Tensor) -> Upstream:
    """As `settled`, of the gradients that arrive at the statistics of the rows of a matrix."""
    count, device = count_rows(rows), rows.get_device()
    return Upstream(*(optional("a gradient", g, dtype, count, device) for g in upstream))


def count_rows(t: Tensor) -> int:
    """How many rows ``[..., V]`` has."""
    return math.prod(t.shape[:-1])


def _askew(name: str, t: Tensor) -> str:
    return (
        f"{name}, {t.dtype} of shape {list(t.shape)}, must lie in memory at a multiple of {t.itemsize} bytes and does "
        "not; pass a copy, made with .clone()"
    )


def _device(index: int) -> str:
    return "the CPU" if index < 0 else f"cuda:{index}"

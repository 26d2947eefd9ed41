"""Completions as a scan takes them: the layout of per-token tensors, where sequences begin, and what each may spend."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from cmdp_fast import checks
from cmdp_fast.constraint import Constraint
from cmdp_fast.ops.onlookers import transformed


def check_layout(name: str, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Checks the layout of a per-token tensor and returns the number of sequences."""
    checks.mask(mask, value, value.shape, name)
    if cu_seqlens is None:
        if value.dim() != 2:
            raise ValueError(
                f"{name} must be [B, T], or [N] packed with cu_seqlens; got {list(value.shape)} without cu_seqlens"
            )
        return value.shape[0]
    checks.tensor("cu_seqlens", cu_seqlens)
    if value.dim() != 1:
        raise ValueError(f"{name} must be packed, [N], when cu_seqlens is given; got {list(value.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise TypeError(f"cu_seqlens must be int32 or int64 of shape [B+1], got {checks.describe(cu_seqlens)}")
    checks.same_device("cu_seqlens", cu_seqlens, name, value)
    return cu_seqlens.shape[0] - 1


def check_cost(cost: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Checks the cost of tokens and returns `sequence_offsets`."""
    checks.tensor("cost", cost)
    if not cost.dtype.is_floating_point:
        raise TypeError(f"cost must be floating point, got {checks.describe(cost)}")
    check_layout("cost", cost, mask, cu_seqlens)
    return sequence_offsets(cost, cu_seqlens)


def check_completions(
    tokens: Tensor, task_reward: Tensor, constraint: Constraint, mask: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Checks the tensors that have an entry per token, and the budget."""
    checks.tensor("tokens", tokens)
    sequences = check_layout("tokens", tokens, mask, cu_seqlens)
    check_like("task_reward", task_reward, "tokens", tokens)
    check_budget(constraint.budget, tokens, sequences)


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    checks.tensor(name, value)
    if value.dtype.is_complex:
        raise TypeError(f"{name} must be real, got {checks.describe(value)}")
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {list(other.shape)}, got {list(value.shape)}")
    checks.same_device(name, value, other_name, other)


def check_budget(budget: float | Tensor, like: Tensor, sequences: int) -> None:
    """Checks that a budget per sequence fits; `Constraint` has checked a number."""
    if isinstance(budget, Tensor):
        checks.tensor("budget", budget)
        # By numbers: a graph of any number of sequences finds no shape in a tuple of shapes.
        if budget.dim() > 1 or (budget.dim() == 1 and budget.shape[0] != sequences):
            raise ValueError(
                f"budget must be a number or have shape [{sequences}] (sequences), got {list(budget.shape)}"
            )
        checks.same_device("budget", budget, "the tokens", like)


def sequence_offsets(value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where each sequence begins in a per-token tensor, flattened: ``[B+1]`` int64."""
    if cu_seqlens is None:
        count, width = value.shape
        if torch.compiler.is_compiling() or width == 0:  # a graph would be made for one width alone
            return torch.arange(count + 1, device=value.device) * width
        return torch.arange(0, (count + 1) * width, width, device=value.device)
    return cu_seqlens.to(torch.int64).contiguous()


def sequence_limits(
    budget: float | Tensor, per_token: bool, like: Tensor, mask: Tensor | None, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """The budget of every sequence, ``[B]`` float64, as given rounded to the dtype of the costs: a float32 cost of 0.3
    has to be within a budget of 0.3, and two of them, whose sum is not rounded, within twice that."""
    count = offsets.shape[0] - 1
    if not (per_token or isinstance(budget, Tensor) or torch.compiler.is_compiling()):
        return torch.full((count,), rounded(budget, dtype), dtype=torch.float64, device=like.device)
    check_budget(budget, like, count)
    if isinstance(budget, Tensor):
        limits = budget.detach().to(torch.float64).expand(count)
    else:
        limits = (torch.ones((), dtype=torch.float64, device=like.device) * budget).expand(count)  # see `in_tensor`
    limits = limits.to(dtype).to(torch.float64)
    if per_token:
        counted = torch.ones_like(like, dtype=torch.float64) if mask is None else mask.to(torch.float64)
        running = torch.nn.functional.pad(counted.flatten().cumsum(0), (1, 0))
        within = offsets.clamp(0, like.numel())  # nobody has looked at them yet: on a GPU nobody will
        tokens = running[within[1:]] - running[within[:-1]]
        limits = torch.where(tokens > 0, limits * tokens, 0.0)
    return limits.contiguous()


def rounded(number: float, dtype: torch.dtype) -> float:
    """A number as a float32 or float64 tensor holds it, without the tensor, which costs ten times as much."""
    return ctypes.c_float(number).value if dtype == torch.float32 else float(number)


def _to_be_seen(t: Tensor) -> bool:
    """Whether values may be looked at: on the CPU, where it does not stall a device, and where there is one of each.

    In a graph and in a transform of torch.func that is inside of an operator.
    """
    if t.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(t, FakeTensor):
        return False
    return not transformed()


def check_offsets(offsets: Tensor, like: Tensor) -> None:
    """Checks where the packed sequences of ``like`` begin, on the CPU only."""
    if not _to_be_seen(like):
        return
    # A list: a tensor operation per comparison costs more than all the sequences of a batch.
    starts = offsets.tolist()
    if starts[0] != 0 or starts[-1] != like.numel() or starts != sorted(starts):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {like.numel()}, got {starts[:8]}"
            + ("..." if len(starts) > 8 else "")
        )


def check_values(offsets: Tensor, limits: Tensor, like: Tensor) -> None:
    """Checks what only values tell, on the CPU only: there it does not stall a device."""
    if not _to_be_seen(like):
        return
    check_offsets(offsets, like)
    for i, amount in enumerate(limits.tolist()):
        if not amount >= 0:  # NaN is not
            raise ValueError(f"budget[{i}] = {amount}; every budget must be at least 0")

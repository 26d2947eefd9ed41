"""The CUDA C++ kernels (csrc/cuda): plain functions of tensors that know neither autograd nor checks of arguments.

The same functions as those of `cmdp_fast.kernels`, for what has a kernel there: `token_stats` and its backward pass,
`constrained_pass` (the whole method in one launch), `trace_budgets`, `modify_rewards`. Importing this module raises
ImportError where they were not built. A launch takes the current stream of the tensors' device, allocates its results
from PyTorch's own memory and waits for nothing. What a kernel does and why it is exact stands beside it in csrc/cuda.

No speed has been measured on a GPU, and nothing here has run on one. Values have been checked by the whole test suite
on the host: `CMDP_FAST_CUDA_HOST=1 pytest -m cuda` compiles the kernels' own source with g++ against tests/cuda_host,
which runs a grid thread by thread, blocks and threads in random orders, with barriers, shuffles and atomics that wait
for one another as on a GPU. A wrong formula, a wrong index, a missing barrier, a result that depends on an order and a
barrier that not all threads reach show there. What does not:

- the memory model. Every write is seen at once and in order; of fences only the protocol of the counters is checked,
  that an atomic has a fence before and after it. A race within one warp shows only between two waits of a thread;
- what the hardware makes of addresses: alignment is checked for 64 and 128 bits at a time, accesses outside of a
  tensor are found only where they change a result;
- what stands behind `#ifdef __CUDACC__`: inline PTX, and so the precision of ex2.approx (2 units in the last place, of
  which the host's exp2f makes half a one), its flush of subnormal numbers and the rounding of packed conversions; the
  multiplications and additions that nvcc fuses and g++ does not; the launch itself, its limits and its stream;
- registers, occupancy, bank conflicts, divergence, caches: everything that is speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cmdp_fast._cuda as _cuda
from cmdp_fast.layout import address, addressable, empty_statistics, flat, matrix_of

DEVICE: str = _cuda.DEVICE  # "cuda"; "cpu" where tests have compiled the kernels for the host
COSTS = ("reverse_kl", "forward_kl", "k1", "nll")  # those that the one launch scans; each is a difference of statistics

BudgetRule = tuple[float, bool, bool]  # gamma, mean, inclusive
RewardRule = tuple[str, bool, float, float, float, float]  # kind, at_crossing and the amounts: RewardRule in budget.h


def token_stats(
    student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, vocab: int
) -> tuple[list[Tensor], Tensor]:
    """The six statistics ``[...]`` float32 and the saved scalars ``[..., SAVED]`` float64. One launch."""
    statistics, saved = empty_statistics(student)
    index, keep = flat(tokens, torch.int64), flat(mask, torch.bool)
    student, teacher = _in_reach(student), _in_reach(teacher)
    with torch.cuda.device_of(student):
        partial, arrived = _scratch(saved, vocab)
        _cuda.token_stats(
            _matrix(student),
            _matrix(teacher),
            address(index),
            address(keep),
            vocab,
            temperature,
            [address(s) for s in statistics],
            address(saved),
            address(partial),
            address(arrived),
            _stream(student),
        )
    return statistics, saved


def token_stats_backward(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    upstream: tuple[Tensor | None, ...],
    temperature: float,
    vocab: int,
    out: Tensor,
    first_column: int = 0,
) -> None:
    """Writes the gradient of the student's logits to ``out``, which may be the logits themselves. One launch.

    Columns from ``vocab`` on get 0. ``first_column``: nonzero for a tile of wider rows, of which ``saved`` tells.
    """
    index, keep = flat(tokens, torch.int64), flat(mask, torch.bool)
    flowing = [flat(g, torch.float32) for g in upstream]
    student, teacher, scalars = _in_reach(student), _in_reach(teacher), saved.contiguous()
    target = out if addressable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(student):
        _cuda.token_stats_backward(
            _matrix(student),
            _matrix(teacher),
            address(index),
            address(keep),
            vocab,
            temperature,
            [address(g) for g in flowing],
            address(scalars),
            _matrix(target),
            first_column,
            _stream(student),
        )
    if target is not out:
        out.copy_(target)


def constrained_pass(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    task_reward: Tensor,
    cu_seqlens: Tensor | None,
    budget: Tensor | float,
    temperature: float,
    vocab: int,
    cost: str,
    per_token: bool,
    budget_rule: BudgetRule,
    reward_rule: RewardRule,
    trace: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    reward: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Statistics ``[...]`` and saved scalars ``[..., SAVED]``; trace and reward are written where they are given.

    Tokens are ``[B, T]``, or ``[N]`` with ``cu_seqlens [B+1]``; ``cost`` is one of `COSTS`. One launch.
    """
    statistics, saved = empty_statistics(student, packed=cu_seqlens is not None)
    index, keep, task_reward = flat(tokens, torch.int64), flat(mask, torch.bool), _numbers(task_reward)
    student, teacher = _in_reach(student), _in_reach(teacher)
    sequences = trace[3].shape[0]
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    if isinstance(budget, Tensor):
        budget = budget if budget.dtype in (torch.float32, torch.float64) else budget.to(torch.float64)
        stride = budget.stride(0) if budget.dim() else 0
        limits = (address(budget), budget.dtype == torch.float64, stride, 0.0, per_token)
    else:
        limits = (0, False, 0, budget, per_token)
    with torch.cuda.device_of(student):
        partial, arrived = _scratch(saved, vocab, sequences + 1)
        _cuda.constrained_reward(
            _matrix(student),
            _matrix(teacher),
            address(index),
            address(keep),
            vocab,
            temperature,
            [address(s) for s in statistics],
            address(saved),
            address(partial),
            address(arrived),
            cost,
            _layout(offsets, sequences, tokens),
            limits,
            budget_rule,
            reward_rule,
            [address(t) for t in trace],
            address(task_reward),
            address(reward),
            _stream(student),
        )
    return statistics, saved


def trace_budgets(
    cost: Tensor,
    mask: Tensor | None,
    offsets: Tensor,
    limits: Tensor,
    budget: BudgetRule,
    trace: tuple[Tensor, ...],
    rule: RewardRule | None = None,
    task_reward: Tensor | None = None,
    reward: Tensor | None = None,
) -> None:
    """Writes the trace (cumulative, remaining, violated, first_violation, excess), and the reward if there is one."""
    with torch.cuda.device_of(cost):
        _cuda.budget_trace(
            address(cost),
            cost.dtype == torch.float64,
            address(mask),
            _layout(offsets, offsets.shape[0] - 1, cost),
            address(limits),
            budget,
            [address(t) for t in trace],
            rule,
            address(task_reward),
            address(reward),
            _stream(cost),
        )


def modify_rewards(
    task_reward: Tensor,
    cost: Tensor,
    trace: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None,
    offsets: Tensor,
    rule: RewardRule,
    reward: Tensor,
) -> None:
    """Writes the modified reward of every token; ``trace``: cumulative, remaining, violated, excess."""
    cumulative, remaining, violated, excess = trace
    with torch.cuda.device_of(cost):
        _cuda.modified_reward(
            address(cost),
            cost.dtype == torch.float64,
            address(mask),
            _layout(offsets, offsets.shape[0] - 1, cost),
            [address(t) for t in (cumulative, remaining, violated, None, excess)],
            rule,
            address(task_reward),
            address(reward),
            _stream(cost),
        )


# --------------------------------------------------------------------------------------------------------------
# Tensors as the module takes them


def _in_reach(t: Tensor) -> Tensor:
    """The tensor itself if its rows have at most two strides, else a copy."""
    return t if addressable(t) else t.contiguous()


def _matrix(t: Tensor) -> _cuda.Matrix:
    return _cuda.Matrix(*matrix_of(t))


def _numbers(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _layout(offsets: Tensor | None, sequences: int, tokens: Tensor) -> tuple[int, bool, int, int, int]:
    """Offsets, whether they are int64, and how many sequences of which width there are, of how many tokens."""
    width = tokens.shape[-1] if offsets is None else 0
    wide = offsets is not None and offsets.dtype == torch.int64
    return address(offsets), wide, sequences, width, tokens.numel()


# Counters by device and stream: zeros, which a kernel leaves as it found them. They outlive a call, so that nothing is
# launched to clear them.
_counters: dict[tuple[torch.device, int], Tensor] = {}


def _scratch(saved: Tensor, vocab: int, sequences: int = 0) -> tuple[Tensor, Tensor]:
    """Room for the states of all segments, and counters: one a row and ``sequences`` more (Scratch in launch.h)."""
    rows = saved[..., 0].numel()
    partial = saved.new_empty(rows * _cuda.segments(vocab) * _cuda.PARTIAL)
    count = rows + sequences
    if saved.is_cuda and torch.cuda.is_current_stream_capturing():
        # A graph may be replayed beside other work of this stream's: its counters are its own, cleared at each replay.
        return partial, torch.zeros(count, dtype=torch.int32, device=saved.device)
    key = saved.device, _stream(saved)
    if key not in _counters or _counters[key].numel() < count:
        _counters[key] = torch.zeros(max(4096, 2 * count), dtype=torch.int32, device=saved.device)
    return partial, _counters[key]

"""The CUDA C++ kernels (csrc/cuda): plain functions of tensors that know neither autograd nor checks of arguments.

The same functions as those of `cmdp_fast.kernels`, for what has a kernel there: `token_stats` and its backward pass,
`update_tails` and its backward pass, `constrained_pass` (the whole method in one launch), `trace_budgets`,
`modify_rewards`. Importing this module raises
ImportError where they were not built. A launch takes the current stream of the tensors' device, allocates its results
from PyTorch's own memory and waits for nothing. What a kernel does and why it is exact stands beside it in csrc/cuda.

No speed has been measured on a GPU, and nothing here has run on one. Values have been checked by the whole test suite
on the host: `CMDP_FAST_CUDA_HOST=1 pytest -m cuda` compiles their source with g++ against tests/csrc/cuda_host,
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

Whether it stays. It serves five operations, and is the second choice of each (`PREFERRED_ON_GPU` in ops/backends.py).
The first run of benchmarks/gpu.py on a GPU decides. The change that commits its results does one of these:

- kept and preferred, `PREFERRED_ON_GPU = "cuda"`: the phase `logits` shows it ahead in most of its points, and the
  geometric mean of cuda's time over triton's is at most 0.95. There is one choice for all operations, because
  constrained_reward promises the bits of the other three;
- kept as an offer: ahead in a point, but not so in all. The comment of `PREFERRED_ON_GPU` then gives the measured
  figures in place of the predicted ones, and this docstring the operations and rows where ``backend="cuda"`` pays;
- kept as a stand-in: ahead nowhere, but it serves a user whom Triton does not. The checks of the phase `prove` pass
  with it in a process where Triton cannot compile (no C compiler at run time), or with a build of PyTorch for CUDA that
  has no Triton (Windows). This docstring then says which;
- deleted else: csrc/cuda, this module, `_cuda.pyi` and its lines in ops/backends.py, setup.py and csrc/CMakeLists.txt,
  benchmarks/static_cuda.py, tests/csrc/cuda_host, the mark ``cuda``, and a line in the changelog.

A point is an operation of these, forward or backward, at one of the measured numbers of rows (64 to 8192). Ahead is
a device time (a graph's replay, without Python) at least 5 % below triton's by the medians, beyond the spread of both,
in bfloat16 or float32, while the other dtype is not 5 % behind at the same point.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cmdp_fast._cuda as _cuda
from cmdp_fast.arrays import (
    array,
    of_rows,
    settled,
    settled_account,
    settled_gradient,
    settled_packing,
    settled_rewarding,
    settled_rows,
    settled_trace,
    settled_upstream,
)
from cmdp_fast.layout import (
    Account,
    BudgetRule,
    ListedRows,
    Pair,
    Rewarding,
    Settlement,
    TailGradient,
    TokenTrace,
    Upstream,
    address,
    addressable,
    empty_statistics,
    matrix_of,
)
from cmdp_fast.reference import BudgetTrace
from cmdp_fast.tails import TailState

DEVICE: str = _cuda.DEVICE  # "cuda"; "cpu" where tests have compiled the kernels for the host
COSTS = ("reverse_kl", "forward_kl", "k1", "nll")  # those that the one launch scans; each is a difference of statistics


def token_stats(pair: Pair) -> tuple[list[Tensor], Tensor]:
    """The six statistics ``[...]`` float32 and the saved scalars ``[..., SAVED]`` float64. One launch."""
    pair = settled(pair)
    statistics, saved = empty_statistics(pair.student)
    student, teacher = _in_reach(pair.student), _in_reach(pair.teacher)
    with torch.cuda.device_of(student):
        partial, arrived = _scratch(saved[..., 0], _cuda.segments(pair.width) * _cuda.PARTIAL)
        _cuda.token_stats(
            _matrix(student),
            _matrix(teacher),
            address(pair.tokens),
            address(pair.mask),
            pair.width,
            pair.temperature,
            [address(s) for s in statistics],
            address(saved),
            address(partial),
            address(arrived),
            _stream(student),
        )
    return statistics, saved


def token_stats_backward(pair: Pair, saved: Tensor, upstream: Upstream, out: Tensor, first_column: int = 0) -> None:
    """Writes the gradient of the student's logits to ``out``, which may be the logits themselves. One launch.

    Columns beyond the width get 0. ``first_column``: nonzero for a tile of wider rows, which ``saved`` tells of.
    """
    pair = settled(pair)
    upstream = settled_upstream(upstream, torch.float32, pair.student)
    scalars = of_rows("the saved scalars", saved, torch.float64, pair.student, _cuda.SAVED)
    student, teacher = _in_reach(pair.student), _in_reach(pair.teacher)
    target = out if addressable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(student):
        _cuda.token_stats_backward(
            _matrix(student),
            _matrix(teacher),
            address(pair.tokens),
            address(pair.mask),
            pair.width,
            pair.temperature,
            [address(g) for g in upstream],
            address(scalars),
            _matrix(target),
            first_column,
            _stream(student),
        )
    if target is not out:
        out.copy_(target)


def update_tails(rows: ListedRows, first_column: int, state: TailState) -> None:
    """Folds columns [first_column, first_column + width) of the rows into their states, in place. One launch."""
    rows = settled_rows(rows)
    student = _in_reach(rows.student)
    with torch.cuda.device_of(student):
        segments = _cuda.tail_segments(rows.width)
        partial, arrived = _scratch(state.own, segments * _cuda.TAIL_FIELDS)
        _cuda.update_tails(
            _matrix(student),
            address(rows.ids),
            rows.ids.shape[-1],
            address(rows.tokens),
            address(rows.mask),
            rows.width,
            rows.temperature,
            first_column,
            [address(t) for t in state],
            address(partial),
            address(arrived),
            _stream(student),
        )


def tail_backward(rows: ListedRows, gradient: TailGradient, out: Tensor, first_column: int = 0) -> None:
    """Writes the gradient of the student's logits to ``out``, which may be the logits; columns beyond the width get 0,
    and so do masked rows and those of which ``gradient`` is all 0. One launch."""
    rows = settled_rows(rows)
    gradient = settled_gradient(gradient, rows)
    student = _in_reach(rows.student)
    target = out if addressable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(student):
        _cuda.tail_backward(
            _matrix(student),
            address(rows.ids),
            rows.ids.shape[-1],
            address(rows.tokens),
            address(rows.mask),
            rows.width,
            rows.temperature,
            first_column,
            [address(t) for t in gradient],
            _matrix(target),
            _stream(student),
        )
    if target is not out:
        out.copy_(target)


def constrained_pass(pair: Pair, settlement: Settlement) -> tuple[list[Tensor], Tensor]:
    """Statistics ``[...]`` and saved scalars ``[..., SAVED]``; trace and reward are written where they are given.

    Tokens are ``[B, T]``, or ``[N]`` with ``cu_seqlens [B+1]``; the cost is one of `COSTS`. One launch.
    """
    sequences = settlement.trace.first_violation.shape[0]
    if sequences == 0:  # rows that no sequence holds have statistics none the less
        return token_stats(pair)
    pair = settled(pair)
    assert pair.tokens is not None
    statistics, saved = empty_statistics(pair.student)
    rewarding = settled_rewarding(settlement.rewarding, statistics[0])
    student, teacher = _in_reach(pair.student), _in_reach(pair.teacher)
    offsets, budget = settled_packing(settlement, student)
    if isinstance(budget, Tensor):
        budget = budget if budget.dtype in (torch.float32, torch.float64) else budget.to(torch.float64)
        limits = (address(budget), budget.dtype == torch.float64, 1 if budget.dim() else 0, 0.0, settlement.per_token)
    else:
        limits = (0, False, 0, budget, settlement.per_token)
    with torch.cuda.device_of(student):
        partial, arrived = _scratch(saved[..., 0], _cuda.segments(pair.width) * _cuda.PARTIAL, sequences + 1)
        _cuda.constrained_reward(
            _matrix(student),
            _matrix(teacher),
            address(pair.tokens),
            address(pair.mask),
            pair.width,
            pair.temperature,
            [address(s) for s in statistics],
            address(saved),
            address(partial),
            address(arrived),
            settlement.cost,
            _layout(offsets, sequences, pair.tokens),
            limits,
            settlement.rule,
            rewarding.rule,
            [address(t) for t in settlement.trace],
            address(rewarding.task_reward),
            address(rewarding.reward),
            _stream(student),
        )
    return statistics, saved


def trace_budgets(
    account: Account, limits: Tensor, rule: BudgetRule, trace: BudgetTrace, rewarding: Rewarding | None = None
) -> None:
    """Writes the trace of costs against the limits ``[B]`` float64, and the modified reward if there is one."""
    account = settled_account(account)
    cost = account.cost
    limits = array("budget", limits, torch.float64, account.offsets.shape[0] - 1, cost.get_device())
    paid, task, result = (None, None, None) if rewarding is None else settled_rewarding(rewarding, cost)
    with torch.cuda.device_of(cost):
        _cuda.budget_trace(
            address(cost),
            cost.dtype == torch.float64,
            address(account.mask),
            _layout(account.offsets, account.offsets.shape[0] - 1, cost),
            address(limits),
            rule,
            [address(t) for t in trace],
            paid,
            address(task),
            address(result),
            _stream(cost),
        )


def modify_rewards(account: Account, trace: TokenTrace, rewarding: Rewarding) -> None:
    """Writes the modified reward of every token."""
    account = settled_account(account)
    cost = account.cost
    trace, rewarding = settled_trace(trace, cost), settled_rewarding(rewarding, cost)
    first_violation = None  # is not looked at
    fields = (trace.cumulative, trace.remaining, trace.violated, first_violation, trace.excess)
    with torch.cuda.device_of(cost):
        _cuda.modified_reward(
            address(cost),
            cost.dtype == torch.float64,
            address(account.mask),
            _layout(account.offsets, account.offsets.shape[0] - 1, cost),
            [address(t) for t in fields],
            rewarding.rule,
            address(rewarding.task_reward),
            address(rewarding.reward),
            _stream(cost),
        )


# --------------------------------------------------------------------------------------------------------------
# Tensors as the module takes them


def _in_reach(t: Tensor) -> Tensor:
    """The tensor itself if its rows have at most two strides, else a copy."""
    return t if addressable(t) else t.contiguous()


def _matrix(t: Tensor) -> _cuda.Matrix:
    return _cuda.Matrix(*matrix_of(t))


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


def _scratch(rows: Tensor, numbers: int, sequences: int = 0) -> tuple[Tensor, Tensor]:
    """Room for so many float64 numbers of each row, and counters: one per row and ``sequences`` more (Scratch in
    launch.h). ``rows``: a float64 tensor with an element for each."""
    partial = rows.new_empty(rows.numel() * numbers)
    count = rows.numel() + sequences
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        # A graph may be replayed beside other work of this stream's: its counters are its own, cleared at each replay.
        return partial, torch.zeros(count, dtype=torch.int32, device=rows.device)
    key = rows.device, _stream(rows)
    if key not in _counters or _counters[key].numel() < count:
        _counters[key] = torch.zeros(max(4096, 2 * count), dtype=torch.int32, device=rows.device)
    return partial, _counters[key]

"""The native kernels (csrc/cpu): plain functions of tensors that know neither autograd nor checks of arguments.

Tensors are handed over as addresses, sizes and strides; the module `cmdp_fast._C` knows no PyTorch. It uses as many
threads as PyTorch does, in a forked process too. Importing this file never fails: where the module cannot be used,
`native` is None, `PROBLEM` says why and `CURE` what to do about it, if something can be done.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from cmdp_fast import installation, native_module
from cmdp_fast.arrays import (
    array,
    count_rows,
    of_rows,
    settled,
    settled_account,
    settled_gradient,
    settled_rewarding,
    settled_rows,
    settled_trace,
    settled_upstream,
    written,
)
from cmdp_fast.layout import (
    SAVED,
    Account,
    BudgetRule,
    ListedRows,
    Mixture,
    Pair,
    Rewarding,
    Settlement,
    TailGradient,
    TokenTrace,
    Upstream,
    address,
    alike,
    check_memory,
    matrix_of,
)
from cmdp_fast.reference import BudgetTrace, TokenStats, compute_dtype, token_cost
from cmdp_fast.tails import TailState

native, PROBLEM, CURE = native_module.load()

COSTS: tuple[str, ...] = ("reverse_kl", "forward_kl", "k1", "k3", "nll")  # all that follow from the statistics
FORKED = (
    "this process was forked after cmdp_fast had used several threads: its kernels start threads anew, but operations "
    "of PyTorch may wait for ever on threads of the parent; call torch.set_num_threads(1) here, or start processes "
    "with 'spawn' or 'forkserver'"
)
_untold = False  # whether FORKED is true and has not been said
HUGE = 8 * 2**20  # bytes from which on fresh memory asks for huge pages, of 2 MiB where there are any


def _forked() -> None:
    global _untold
    _untold = native.forked_late()


if native is not None and hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def in_huge_pages(t: Tensor) -> Tensor:
    """The tensor itself, just allocated and about to be written from end to end.

    On a CPU the first touch of a large one costs more in page faults than the writing does, unless its pages are huge;
    most Linux systems give those on request. Small tensors come from memory that is used again, and need nothing.
    """
    if native is not None and t.device.type == "cpu" and t.nbytes >= HUGE:
        native.advise_huge_pages(t.data_ptr(), t.nbytes)
    return t


def token_stats(pair: Pair) -> tuple[list[Tensor], Tensor]:
    """The six statistics ``[...]``, float32 or float64, and the saved scalars ``[..., SAVED]`` float64."""
    pair = settled(pair)
    statistics, saved = _room(pair)
    _write_statistics(pair, statistics, saved)
    return statistics, saved


def _room(pair: Pair) -> tuple[list[Tensor], Tensor]:
    shape, dtype = pair.student.shape[:-1], compute_dtype(pair.student, pair.teacher)
    statistics = alike(torch.empty(shape, dtype=dtype), len(TokenStats._fields))
    return statistics, torch.empty((*shape, SAVED), dtype=torch.float64)


def _write_statistics(pair: Pair, statistics: list[Tensor], saved: Tensor) -> None:
    native.token_stats(
        matrix(pair.student),
        matrix(pair.teacher),
        address(pair.tokens),
        address(pair.mask),
        pair.width,
        pair.temperature,
        [s.data_ptr() for s in statistics],
        statistics[0].dtype == torch.float64,
        address(saved),
        _threads(),
    )


def token_stats_backward(pair: Pair, saved: Tensor, upstream: Upstream, out: Tensor, first_column: int = 0) -> None:
    """Writes the gradient of the student's logits to ``out``, which may be the logits; columns beyond the width get 0.

    ``first_column``: nonzero for a tile of wider rows, which ``saved`` tells of.
    """
    pair = settled(pair)
    upstream = settled_upstream(upstream, torch.float64, pair.student)
    saved = of_rows("the saved scalars", saved, torch.float64, pair.student, SAVED)
    native.token_stats_backward(
        matrix(pair.student),
        matrix(pair.teacher),
        address(pair.tokens),
        address(pair.mask),
        pair.width,
        pair.temperature,
        [address(g) for g in upstream],
        address(saved),
        matrix(out),
        _threads(),
        first_column,
    )


def constrained_pass(pair: Pair, settlement: Settlement) -> tuple[list[Tensor], Tensor]:
    """Statistics ``[...]`` and saved scalars ``[..., SAVED]``; trace and reward are written where they are given."""
    pair = settled(pair)
    offsets, limits, trace, device = settlement.offsets, settlement.limits, settlement.trace, pair.student.get_device()
    sequences = trace.first_violation.shape[0]
    if offsets is not None:
        offsets = array("cu_seqlens", offsets, torch.int64, sequences + 1, device)
    if isinstance(limits, Tensor):
        limits = array("budget", limits, torch.float64, sequences, device)
    statistics, saved = _room(pair)
    rule, task_reward, reward = settled_rewarding(settlement.rewarding, statistics[0])
    # The scan's arguments are put together before the logits are read, which leave nothing else in the cache.
    budget = (
        reward.dtype == torch.float64,
        address(pair.mask),
        address(offsets),
        sequences,
        reward.numel(),
        address(limits) if isinstance(limits, Tensor) else limits,
        settlement.rule,
        [t.data_ptr() for t in trace],
        rule,
        address(task_reward),
        address(reward),
        _threads(),
    )
    _write_statistics(pair, statistics, saved)
    cost = token_cost(TokenStats(*statistics), settlement.cost)
    native.budget_trace(address(cost), *budget)
    return statistics, saved


def update_states(pair: Pair, first_column: int, fields: Tensor) -> None:
    """Folds columns [first_column, first_column + width) into ``fields [rows, 13]``, in place."""
    pair = settled(pair)
    count, device = count_rows(pair.student) * native.STATE, pair.student.get_device()
    native.update_states(
        matrix(pair.student[..., : pair.width]),
        matrix(pair.teacher[..., : pair.width]),
        address(pair.tokens),
        first_column,
        pair.temperature,
        address(written("fields", fields, torch.float64, count, device)),
        _threads(),
        address(pair.mask),
    )


def mixture(pair: Pair, weights: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence ``[...]``, the saved scalars, and a mean per row that the backward pass needs, both float64.

    Two passes over the logits: the mixture's logarithm needs both normalisers.
    """
    pair = settled(pair)
    shape, dtype = pair.student.shape[:-1], compute_dtype(pair.student, pair.teacher)
    saved = torch.empty((*shape, SAVED), dtype=torch.float64)
    value, mean = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    matrices = matrix(pair.student), matrix(pair.teacher)
    no_tokens, no_statistics = 0, [0] * len(TokenStats._fields)
    rows = (address(pair.mask), pair.width, pair.temperature)
    native.token_stats(*matrices, no_tokens, *rows, no_statistics, True, address(saved), _threads())
    native.mixture(*matrices, *rows, *weights, address(saved), address(value), address(mean), _threads())
    return value.to(dtype), saved, mean


def mixture_backward(pair: Pair, saved: Tensor, mean: Tensor, upstream: Tensor, weights: Mixture, out: Tensor) -> None:
    """Writes the gradient of the student's logits to ``out``; columns beyond the width get 0."""
    pair = settled(pair)
    saved = of_rows("the saved scalars", saved, torch.float64, pair.student, SAVED)
    mean = of_rows("the saved mean", mean, torch.float64, pair.student)
    gradient = of_rows("a gradient", upstream, torch.float64, pair.student)
    native.mixture_backward(
        matrix(pair.student),
        matrix(pair.teacher),
        address(pair.mask),
        pair.width,
        pair.temperature,
        *weights,
        address(saved),
        address(mean),
        address(gradient),
        matrix(out),
        _threads(),
    )


def update_tails(rows: ListedRows, first_column: int, state: TailState) -> None:
    """Folds columns [first_column, first_column + width) of the rows into their states, in place."""
    rows = settled_rows(rows)
    native.update_tails(
        matrix(rows.student),
        address(rows.ids),
        rows.ids.shape[-1],
        address(rows.tokens),
        address(rows.mask),
        rows.width,
        rows.temperature,
        first_column,
        [address(t) for t in state],
        _threads(),
    )


def tail_backward(rows: ListedRows, gradient: TailGradient, out: Tensor, first_column: int = 0) -> None:
    """Writes the gradient of the student's logits to ``out``, which may be the logits; columns beyond the width get 0,
    and so do masked rows and those of which ``gradient`` is all 0."""
    rows = settled_rows(rows)
    gradient = settled_gradient(gradient, rows)
    native.tail_backward(
        matrix(rows.student),
        address(rows.ids),
        rows.ids.shape[-1],
        address(rows.tokens),
        address(rows.mask),
        rows.width,
        rows.temperature,
        first_column,
        [address(t) for t in gradient],
        matrix(out),
        _threads(),
    )


def trace_budgets(
    account: Account, limits: Tensor, rule: BudgetRule, trace: BudgetTrace, rewarding: Rewarding | None = None
) -> None:
    """Writes the trace of costs against the limits ``[B]`` float64, and the modified reward if there is one."""
    account = settled_account(account)
    limits = array("budget", limits, torch.float64, account.offsets.shape[0] - 1, account.cost.get_device())
    paid, task, result = (None, None, None) if rewarding is None else settled_rewarding(rewarding, account.cost)
    native.budget_trace(
        *_costs(account),
        address(limits),
        rule,
        [t.data_ptr() for t in trace],
        paid,
        address(task),
        address(result),
        _threads(),
    )


def modify_rewards(account: Account, trace: TokenTrace, rewarding: Rewarding) -> None:
    """Writes the modified reward of every token."""
    account = settled_account(account)
    trace, rewarding = settled_trace(trace, account.cost), settled_rewarding(rewarding, account.cost)
    native.modified_reward(
        address(rewarding.task_reward),
        *_costs(account),
        [address(t) for t in trace],
        rewarding.rule,
        address(rewarding.reward),
    )


def _costs(account: Account) -> tuple[int, bool, int, int, int, int]:
    """The account as the module takes it: costs and whether they are float64, mask, offsets, numbers of sequences and
    tokens."""
    cost, mask, offsets = account
    wide = cost.dtype == torch.float64
    return address(cost), wide, address(mask), address(offsets), offsets.shape[0] - 1, cost.numel()


def _threads() -> int:
    global _untold
    threads = torch.get_num_threads()
    if _untold and threads > 1:
        _untold = False
        warnings.warn(FORKED, stacklevel=installation.level_outside())
    return threads


def matrix(t: Tensor) -> Any:
    """The rows ``[..., V]`` of a tensor as the kernels see them."""
    check_memory(t)
    return native.Matrix(*matrix_of(t))

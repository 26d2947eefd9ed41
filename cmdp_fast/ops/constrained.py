"""The whole method in one call: token statistics, the budget's account and the modified reward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from cmdp_fast import checks
from cmdp_fast.constraint import Constraint, ConstraintSettings, constraint_of
from cmdp_fast.layout import Account, BudgetRule, Pair, Rewarding, RewardRule, Settlement, flat
from cmdp_fast.ops import backends
from cmdp_fast.ops.budget import Settled, empty_outcome, settle
from cmdp_fast.ops.cost import token_cost
from cmdp_fast.ops.divergence import divergence
from cmdp_fast.ops.operator import operator
from cmdp_fast.ops.sequences import check_completions, check_values, rounded, sequence_limits, sequence_offsets
from cmdp_fast.ops.statistics import DIFFERENTIABLE, Kept, Scored, gradient_of_logits, room_of, scored
from cmdp_fast.ops.token_stats import kernel_memory, token_stats
from cmdp_fast.reference import BudgetTrace, ConstrainedReward, CostName, compute_dtype


def constrained_reward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    task_reward: Tensor,
    budget: float | Tensor | None = None,
    *,
    constraint: Constraint | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    backend: backends.BackendName | None = None,
    **settings: Unpack[ConstraintSettings],
) -> ConstrainedReward:
    """Statistics, budget and modified reward of a batch of completions: one pass over the logits, one small scan.

    The same values, bitwise, as `token_stats`, `budget_trace` and `modified_reward` called in turn.

    Args:
        student_logits, teacher_logits: ``[B, T, V]``, or ``[N, V]`` packed with ``cu_seqlens``.
        tokens, task_reward, mask: ``[B, T]`` or ``[N]``.
        budget: d >= 0 in the units of the cost, a number or ``[B]``.
        constraint: a `Constraint`, in place of the budget and of the keywords from ``cost`` to ``per_token``.
        cost: ``reverse_kl`` (default), ``forward_kl``, ``jsd`` (with ``beta``; this one takes further passes over the
            logits), ``k1``, ``k3``, ``nll``; in nats.
        cost_clamp: bounds the size of a token's cost, as `token_cost`; the account is then a launch of its own.
        kind, penalty, penalty_at, discrepancy_weight, coefficient, barrier_slope: as `modified_reward`. For
            ``worst_case`` the cost is ``nll`` and the reduction ``mean`` unless they are given, and nothing else is
            accepted.
        gamma, reduction, edge, per_token: as `budget_trace` (``reduction`` None: ``sum``).
        temperature, vocab_size, inplace_backward, backend: as `token_stats`.

    Returns:
        `ConstrainedReward(stats, trace, reward)`. ``stats`` is differentiable as in `token_stats`; trace and reward
        are not.

    Warns:
        UserWarning: ``saute`` with a cost that does not depend on the action: its penalty then has no direct
        gradient, and a student may stay where it crossed the budget.

    Raises:
        TypeError, ValueError: as the three operations, before any of them runs.

    Source: after arXiv 2509.22921; the discrepancy term Phi is this project's definition (`modified_reward`).
    """
    held = constraint_of("constrained_reward", constraint, settings, budget=budget)
    held.warn_of_a_penalty_without_gradient(stacklevel=2)
    vocab = checks.logits(student_logits, teacher_logits, vocab_size)
    check_completions(tokens, task_reward, held, mask, cu_seqlens)
    checks.tokens(tokens, student_logits)
    checks.positive("temperature", temperature)
    checks.flag("inplace_backward", inplace_backward)
    operation = "divergence" if held.cost == "jsd" else "constrained_reward"
    computed = compute_dtype(student_logits, teacher_logits)
    chosen = backends.choose_for_logits(backend, student_logits, computed, operation)

    if held.cost_clamp is None and backends.scans(chosen, held.cost):
        student, teacher, inplace = kernel_memory(student_logits, teacher_logits, inplace_backward, chosen)
        pair = Pair(student, teacher, tokens, mask, float(temperature), vocab)
        limit = held.budget
        amounts = _Amounts(limit.detach(), 0.0) if isinstance(limit, Tensor) else _Amounts(None, float(limit))
        spending = _Spending(held.cost, held.per_token, held.budget_rule, held.reward_rule)
        made = _constrained_pass(_Given(pair, task_reward.detach(), cu_seqlens, amounts, spending, inplace, chosen))
        return ConstrainedReward(made.scored.stats, made.trace, made.reward)

    offsets = sequence_offsets(tokens, cu_seqlens)
    limits = sequence_limits(held.budget, held.per_token, tokens, mask, offsets, computed)
    check_values(offsets, limits, tokens)
    stats = token_stats(
        student_logits,
        teacher_logits,
        tokens,
        mask=mask,
        temperature=temperature,
        vocab_size=vocab_size,
        inplace_backward=inplace_backward,
        backend=chosen,
    )
    if held.cost == "jsd":
        paid = divergence(
            student_logits.detach(),
            teacher_logits,
            beta=held.beta,
            mask=mask,
            temperature=temperature,
            vocab_size=vocab_size,
            backend=chosen,
        )
    else:
        paid = token_cost(stats, held.cost, clamp=held.cost_clamp)
    account = Account(paid, flat(mask, torch.bool), offsets)
    return ConstrainedReward(stats, *settle(held, account, limits, task_reward, chosen))


# --------------------------------------------------------------------------------------------------------------
# The operator behind the native kernels of every device: everything in one call


class _Amounts(NamedTuple):
    """A budget as an operator takes it: a tensor, or else a number."""

    tensor: Tensor | None
    number: float


class _Spending(NamedTuple):
    cost: CostName
    per_token: bool
    budget_rule: BudgetRule
    reward_rule: RewardRule


class _Given(NamedTuple):
    pair: Pair
    task_reward: Tensor
    cu_seqlens: Tensor | None
    budget: _Amounts
    spending: _Spending
    inplace: bool
    backend: str


class _Made(NamedTuple):
    scored: Scored
    trace: BudgetTrace
    reward: Tensor


@operator("constrained_pass")
def _constrained_pass(given: _Given) -> _Made:
    pair, cu_seqlens, spending = given.pair, given.cu_seqlens, given.spending
    assert pair.tokens is not None
    budget = given.budget.number if given.budget.tensor is None else given.budget.tensor
    dtype = compute_dtype(pair.student, pair.teacher)
    offsets, limits = None, None
    if pair.tokens.device.type == "cpu":
        offsets, limits = _checked_budget(given, dtype)
        checks.token_range(pair.tokens, pair.mask, pair.width)
    trace, reward = _room(pair.tokens, cu_seqlens, dtype)
    settlement = Settlement(
        spending.cost,
        cu_seqlens,
        budget,
        spending.per_token,
        spending.budget_rule,
        trace,
        Rewarding(spending.reward_rule, given.task_reward, reward),
        offsets,
        limits,
    )
    return _Made(scored(*backends.get(given.backend).constrained_pass(pair, settlement)), trace, reward)


def _checked_budget(given: _Given, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | float]:
    """Offsets and limits, as a `Settlement` has them. Looks at values."""
    tokens, amounts, per_token = given.pair.tokens, given.budget, given.spending.per_token
    assert tokens is not None
    if amounts.tensor is None and given.cu_seqlens is None and not per_token:
        return None, rounded(amounts.number, dtype)  # nothing that could be wrong
    offsets = sequence_offsets(tokens, given.cu_seqlens)
    budget = amounts.number if amounts.tensor is None else amounts.tensor
    limits = sequence_limits(budget, per_token, tokens, given.pair.mask, offsets, dtype)
    check_values(offsets, limits, tokens)
    return offsets, limits


def _room(tokens: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Settled:
    return empty_outcome(tokens, dtype, tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)


@_constrained_pass.shapes
def _(given: _Given) -> _Made:
    assert given.pair.tokens is not None
    made = room_of(given.pair)
    return _Made(made, *_room(given.pair.tokens, given.cu_seqlens, made.stats.logprob.dtype))


_constrained_pass.gradient(
    of=[f"scored_{name}" for name in DIFFERENTIABLE],
    keep=lambda given, made: Kept(given.pair, made.scored.saved, given.inplace, given.backend),
    operation="constrained_reward",
    instead="constrained_reward(backend='torch')",
)(gradient_of_logits)

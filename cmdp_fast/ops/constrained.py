"""The whole method in one call: token statistics, the budget's account and the modified reward."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from cmdp_fast import reference
from cmdp_fast.ops import backends, checks
from cmdp_fast.ops.budget import (
    check_budget_rule,
    check_like,
    check_reward_rule,
    check_sequences,
    check_values,
    constrained_scan,
    sequence_limits,
)
from cmdp_fast.ops.divergence import check_kind, divergence
from cmdp_fast.ops.native import flat
from cmdp_fast.ops.token_stats import token_stats
from cmdp_fast.reference import COSTS, DIFFERENTIABLE_COSTS, BudgetTrace, ConstrainedReward, TokenStats, compute_dtype


def token_cost(stats: TokenStats, kind: str = "reverse_kl") -> Tensor:
    """The cost c_t of every token, from its statistics.

    ``reverse_kl`` and ``forward_kl`` depend on the policy and are differentiable; ``k1`` = rho, ``k3`` = exp(-rho) - 1
    + rho with rho = logprob - teacher_logprob, and ``nll`` = -teacher_logprob depend on the action and are
    detached. (As a detached cost k1 is an unbiased estimate of the reverse KL and k3 is a biased one.)

    Args: stats: `TokenStats`. kind: one of the names above (``jsd`` needs the logits: `divergence`).
    Returns: a tensor like the statistics, in nats. Raises: ValueError for another kind.
    """
    checks.choice("kind", kind, tuple(c for c in COSTS if c != "jsd"))
    return reference.token_cost(stats, kind)


def constrained_reward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    task_reward: Tensor,
    budget: float | Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cost: str | None = None,
    kind: str = "cmdp",
    penalty: float = 1.0,
    penalty_at: str | None = None,
    discrepancy_weight: float = 1.0,
    coefficient: float | None = None,
    barrier_slope: float = 10.0,
    gamma: float = 1.0,
    reduction: str | None = None,
    edge: str = "strict",
    per_token: bool = False,
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> ConstrainedReward:
    """Statistics, budget and modified reward of a batch of completions: one pass over the logits, one small scan.

    The same values, bitwise, as `token_stats`, `budget_trace` and `modified_reward` called in turn.

    Args:
        student_logits, teacher_logits: ``[B, T, V]``, or ``[N, V]`` packed with ``cu_seqlens``.
        tokens, task_reward, mask: ``[B, T]`` or ``[N]``.
        budget: d >= 0, a number or ``[B]``. cost: ``reverse_kl`` (default), ``forward_kl``, ``jsd`` (with ``beta``;
            this one takes further passes over the logits), ``k1``, ``k3``, ``nll``.
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
    worst_case = kind == "worst_case"
    cost = cost or ("nll" if worst_case else "reverse_kl")
    reduction = reduction or ("mean" if worst_case else "sum")
    checks.choice("cost", cost, COSTS)
    if cost == "jsd":
        check_kind(cost, beta)
    if worst_case and (cost, reduction) != ("nll", "mean"):
        raise ValueError(
            f"kind='worst_case' is defined for cost='nll' and reduction='mean', got {cost!r} and {reduction!r}"
        )
    budget_rule = check_budget_rule(gamma, reduction, edge)
    reward_rule = check_reward_rule(kind, penalty, penalty_at, discrepancy_weight, coefficient, barrier_slope)
    checks.logits(student_logits, teacher_logits, vocab_size)
    checks.tensor("tokens", tokens)
    offsets = check_sequences("tokens", tokens, mask, cu_seqlens)
    check_like("task_reward", task_reward, "tokens", tokens)
    limits = sequence_limits(budget, tokens, mask, offsets, per_token, compute_dtype(student_logits, teacher_logits))
    check_values(offsets, limits, tokens)
    chosen = backends.choose(backend, student_logits)
    if kind == "saute" and cost in DIFFERENTIABLE_COSTS and not torch.compiler.is_compiling():
        warnings.warn(
            f"kind='saute' with cost={cost!r}: the cost does not depend on the action, so the penalty has no direct "
            "gradient and a student may stay over budget; use kind='cmdp' or 'hinge', or cost='k1'",
            stacklevel=2,
        )

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
    if cost == "jsd":
        paid = divergence(
            student_logits.detach(),
            teacher_logits,
            beta=beta,
            mask=mask,
            temperature=temperature,
            vocab_size=vocab_size,
            backend=chosen,
        )
    else:
        paid = token_cost(stats, cost).detach()
    if chosen == "torch":
        trace = reference.budget_trace(
            paid, limits, gamma=gamma, reduction=reduction, edge=edge, mask=mask, cu_seqlens=cu_seqlens
        )
        reward = reference.modified_reward(
            task_reward,
            paid,
            trace,
            kind=kind,
            penalty=penalty,
            penalty_at=penalty_at,
            discrepancy_weight=discrepancy_weight,
            coefficient=coefficient,
            barrier_slope=barrier_slope,
            mask=mask,
            cu_seqlens=cu_seqlens,
        )
        return ConstrainedReward(stats, trace, reward)
    given = task_reward.detach().to(paid.dtype).contiguous()
    *lines, reward = constrained_scan(
        given, paid.contiguous(), flat(mask, torch.bool), offsets, limits, *budget_rule, *reward_rule
    )
    return ConstrainedReward(stats, BudgetTrace(*lines), reward)

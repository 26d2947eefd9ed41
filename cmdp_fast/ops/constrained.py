"""The whole method in one call: token statistics, the budget's account and the modified reward."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from cmdp_fast import reference
from cmdp_fast.ops import backends, checks
from cmdp_fast.ops.budget import (
    check_budget,
    check_budget_rule,
    check_layout,
    check_like,
    check_reward_rule,
    check_values,
    constrained_scan,
    empty_trace,
    sequence_limits,
    sequence_offsets,
)
from cmdp_fast.ops.divergence import check_kind, divergence
from cmdp_fast.ops.native import SAVED, flat
from cmdp_fast.ops.token_stats import (
    kernel_memory,
    save_for_gradient,
    statistics_gradient,
    token_stats,
)
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
    vocab = checks.logits(student_logits, teacher_logits, vocab_size)
    checks.tensor("tokens", tokens)
    sequences = check_layout("tokens", tokens, mask, cu_seqlens)
    check_like("task_reward", task_reward, "tokens", tokens)
    check_budget(budget, tokens, sequences)
    checks.tokens(tokens, student_logits)
    checks.positive("temperature", temperature)
    chosen = backends.choose_for_logits(backend, student_logits, teacher_logits)
    if kind == "saute" and cost in DIFFERENTIABLE_COSTS and not torch.compiler.is_compiling():
        warnings.warn(
            f"kind='saute' with cost={cost!r}: the cost does not depend on the action, so the penalty has no direct "
            "gradient and a student may stay over budget; use kind='cmdp' or 'hinge', or cost='k1'",
            stacklevel=2,
        )

    if chosen == "triton" and cost in backends.kernels.COSTS:
        student, teacher, inplace = kernel_memory(student_logits, teacher_logits, inplace_backward, chosen)
        outputs = _constrained_pass(
            student,
            teacher,
            tokens,
            mask,
            task_reward.detach(),
            cu_seqlens,
            budget.detach() if isinstance(budget, Tensor) else None,
            0.0 if isinstance(budget, Tensor) else float(budget),
            float(temperature),
            vocab,
            inplace,
            cost,
            per_token,
            *budget_rule,
            *reward_rule,
        )
        return ConstrainedReward(TokenStats(*outputs[:6]), BudgetTrace(*outputs[7:12]), outputs[12])

    offsets = sequence_offsets(tokens, cu_seqlens)
    limits = sequence_limits(budget, tokens, mask, offsets, per_token, compute_dtype(student_logits, teacher_logits))
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
        given, paid.contiguous(), flat(mask, torch.bool), offsets, limits, *budget_rule, *reward_rule, chosen
    )
    return ConstrainedReward(stats, BudgetTrace(*lines), reward)


# --------------------------------------------------------------------------------------------------------------
# The operator behind the GPU kernels: everything in two launches


@torch.library.custom_op("cmdp_fast::constrained_pass", mutates_args=())
def _constrained_pass(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    task_reward: Tensor,
    cu_seqlens: Tensor | None,
    budgets: Tensor | None,
    budget: float,
    temperature: float,
    vocab_size: int,
    inplace_backward: bool,
    cost: str,
    per_token: bool,
    gamma: float,
    mean: bool,
    inclusive: bool,
    kind: str,
    at_crossing: bool,
    penalty: float,
    discrepancy_weight: float,
    coefficient: float,
    barrier_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = budget if budgets is None else budgets
    if tokens.device.type == "cpu":
        checks.token_range(tokens, mask, vocab_size)
        offsets = sequence_offsets(tokens, cu_seqlens)
        check_values(offsets, sequence_limits(given, tokens, mask, offsets, per_token, torch.float32), tokens)
    *trace, reward = _empty_outcome(student, tokens, cu_seqlens)
    statistics, saved = backends.kernels.constrained_pass(
        student,
        teacher,
        tokens,
        mask,
        task_reward,
        cu_seqlens,
        given,
        temperature,
        vocab_size,
        cost,
        per_token,
        (gamma, mean, inclusive),
        (kind, at_crossing, penalty, discrepancy_weight, coefficient, barrier_slope),
        tuple(trace),
        reward,
    )
    return (*statistics, saved, *trace, reward)


def _empty_outcome(student: Tensor, tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    reward = student.new_empty(tokens.shape, dtype=torch.float32)
    sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (*empty_trace(reward, sequences), reward)


@_constrained_pass.register_fake
def _(student, teacher, tokens, mask, task_reward, cu_seqlens, *args):
    statistics = [student.new_empty(tokens.shape, dtype=torch.float32) for _ in range(6)]
    saved = student.new_empty((*tokens.shape, SAVED), dtype=torch.float64)
    return (*statistics, saved, *_empty_outcome(student, tokens, cu_seqlens))


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, tokens, mask, _, _, _, _, temperature, vocab_size, inplace, *_ = inputs
    _, teacher_logprob, _, teacher_entropy, _, _, saved, *rest = output
    ctx.mark_non_differentiable(teacher_logprob, teacher_entropy, saved, *rest)
    save_for_gradient(ctx, student, teacher, tokens, mask, saved, inplace, temperature, vocab_size, "triton")


def _backward(ctx, grad_logprob, _teacher_logprob, grad_entropy, _teacher_entropy, grad_reverse, grad_forward, *_):
    return (statistics_gradient(ctx, grad_logprob, grad_entropy, grad_reverse, grad_forward), *(None,) * 21)


_constrained_pass.register_autograd(_backward, setup_context=_setup_context)

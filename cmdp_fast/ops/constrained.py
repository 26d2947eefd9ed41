"""The whole method in one call: token statistics, the budget's account and the modified reward."""

from __future__ import annotations

import torch
from torch import Tensor

from cmdp_fast import checks
from cmdp_fast.layout import SAVED
from cmdp_fast.ops import backends
from cmdp_fast.ops.budget import check_values, empty_trace, room, sequence_limits, sequence_offsets
from cmdp_fast.ops.divergence import check_kind, divergence
from cmdp_fast.ops.terms import check_completions, check_terms, token_cost
from cmdp_fast.ops.token_stats import kernel_memory, save_for_gradient, statistics_gradient, token_stats
from cmdp_fast.reference import BudgetTrace, ConstrainedReward, TokenStats, compute_dtype


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
        budget: d >= 0 in the units of the cost, a number or ``[B]``.
        cost: ``reverse_kl`` (default), ``forward_kl``, ``jsd`` (with ``beta``; this one takes further passes over the
            logits), ``k1``, ``k3``, ``nll``; in nats.
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
    amounts = (penalty, penalty_at, discrepancy_weight, coefficient, barrier_slope)
    terms = check_terms(cost, kind, *amounts, gamma, reduction, edge)
    if terms.cost == "jsd":
        check_kind("jsd", beta)
    vocab = checks.logits(student_logits, teacher_logits, vocab_size)
    check_completions(tokens, task_reward, budget, mask, cu_seqlens)
    checks.tokens(tokens, student_logits)
    checks.positive("temperature", temperature)
    operation = "divergence" if terms.cost == "jsd" else "constrained_reward"
    computed = compute_dtype(student_logits, teacher_logits)
    chosen = backends.choose_for_logits(backend, student_logits, computed, operation)

    if chosen in backends.GPU and terms.cost in backends.GPU[chosen].COSTS:
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
            terms.cost,
            per_token,
            *terms.budget_rule,
            *terms.reward_rule,
            chosen,
        )
        return ConstrainedReward(TokenStats(*outputs[:6]), BudgetTrace(*outputs[7:12]), outputs[12])

    offsets = sequence_offsets(tokens, cu_seqlens)
    limits = sequence_limits(budget, tokens, mask, offsets, per_token, computed)
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
    if terms.cost == "jsd":
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
        paid = token_cost(stats, terms.cost).detach()
    trace, reward = terms.settle(paid, task_reward, limits, offsets, mask, cu_seqlens, chosen)
    return ConstrainedReward(stats, trace, reward)


# --------------------------------------------------------------------------------------------------------------
# The operator behind the GPU kernels: everything in two launches (triton) or one (cuda)


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = budget if budgets is None else budgets
    if tokens.device.type == "cpu":
        checks.token_range(tokens, mask, vocab_size)
        offsets = sequence_offsets(tokens, cu_seqlens)
        check_values(offsets, sequence_limits(given, tokens, mask, offsets, per_token, torch.float32), tokens)
    *trace, reward = _empty_outcome(student, tokens, cu_seqlens)
    statistics, saved = backends.GPU[backend].constrained_pass(
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
    reward = room(tokens, torch.float32)
    sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (*empty_trace(reward, sequences), reward)


@_constrained_pass.register_fake
def _(student, teacher, tokens, mask, task_reward, cu_seqlens, *args):
    statistics = [student.new_empty(tokens.shape, dtype=torch.float32) for _ in range(6)]
    saved = student.new_empty((*tokens.shape, SAVED), dtype=torch.float64)
    return (*statistics, saved, *_empty_outcome(student, tokens, cu_seqlens))


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, tokens, mask, _, _, _, _, temperature, vocab_size, inplace, *_, backend = inputs
    _, teacher_logprob, _, teacher_entropy, _, _, saved, *rest = output
    ctx.mark_non_differentiable(teacher_logprob, teacher_entropy, saved, *rest)
    save_for_gradient(ctx, student, teacher, tokens, mask, saved, inplace, temperature, vocab_size, backend)


def _backward(ctx, grad_logprob, _teacher_logprob, grad_entropy, _teacher_entropy, grad_reverse, grad_forward, *_):
    return (statistics_gradient(ctx, grad_logprob, grad_entropy, grad_reverse, grad_forward), *(None,) * 22)


_constrained_pass.register_autograd(_backward, setup_context=_setup_context)

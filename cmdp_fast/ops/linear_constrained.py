"""The whole method from hidden states and heads: no logits, statistics by the tile, one small scan."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from cmdp_fast import checks
from cmdp_fast.ops import backends
from cmdp_fast.ops.budget import check_values, sequence_limits, sequence_offsets
from cmdp_fast.ops.linear import linear_token_stats
from cmdp_fast.ops.terms import check_completions, check_terms, token_cost
from cmdp_fast.reference import COSTS, ConstrainedReward, compute_dtype

FROM_STATISTICS = tuple(cost for cost in COSTS if cost != "jsd")


def linear_constrained_reward(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    tokens: Tensor,
    task_reward: Tensor,
    budget: float | Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    vocab_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    first_column: int = 0,
    reduce_hidden_grad: bool = True,
    saved: str = "recompute",
    backend: str | None = None,
) -> ConstrainedReward:
    """`constrained_reward` from hidden states and language-model heads, without the logits.

    Args:
        student_hidden, teacher_hidden: ``[B, T, H]``, or ``[N, H]`` packed with ``cu_seqlens``.
        tokens, task_reward, mask: ``[B, T]`` or ``[N]``.
        budget: d >= 0 in the units of the cost, a number or ``[B]``.
        cost: as `constrained_reward`, but for ``jsd``, which takes a second pass over the logits.
        student_weight, teacher_weight: ``[V, H]``, the heads.
        student_bias, teacher_bias: ``[V]``.
        student_softcap, teacher_softcap, student_scale, teacher_scale, temperature, vocab_size: as
            `linear_token_stats`.
        process_group, first_column, reduce_hidden_grad, saved, backend: as `linear_token_stats`.
        Everything else: as `constrained_reward`.

    Returns:
        `ConstrainedReward(stats, trace, reward)`. ``stats`` is differentiable as in `linear_token_stats`; trace and
        reward are not.

    Warns:
        UserWarning: as `constrained_reward`.

    Raises:
        TypeError, ValueError: as `constrained_reward` and `linear_token_stats`, before any work is done.

    Source: after arXiv 2509.22921; the discrepancy term Phi is this project's definition (`modified_reward`).
    """
    amounts = (penalty, penalty_at, discrepancy_weight, coefficient, barrier_slope)
    terms = check_terms(cost, kind, *amounts, gamma, reduction, edge, costs=FROM_STATISTICS)
    check_completions(tokens, task_reward, budget, mask, cu_seqlens)
    models = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    for name, value in zip(
        ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"), models, strict=True
    ):
        checks.tensor(name, value)
    offsets = sequence_offsets(tokens, cu_seqlens)
    limits = sequence_limits(budget, tokens, mask, offsets, per_token, compute_dtype(*models))
    check_values(offsets, limits, tokens)
    stats = linear_token_stats(
        *models,
        tokens,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        mask=mask,
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        vocab_size=vocab_size,
        process_group=process_group,
        first_column=first_column,
        reduce_hidden_grad=reduce_hidden_grad,
        saved=saved,
        backend=backend,
    )
    paid = token_cost(stats, terms.cost).detach()
    chosen = backends.choose(backend, tokens, "budget_trace")
    trace, reward = terms.settle(paid, task_reward, limits, offsets, mask, cu_seqlens, chosen)
    return ConstrainedReward(stats, trace, reward)

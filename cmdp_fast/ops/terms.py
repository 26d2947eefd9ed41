"""What a completion is held to: the cost of its tokens, its budget, and the reward that comes of them."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast import checks, reference
from cmdp_fast.layout import flat
from cmdp_fast.ops.budget import (
    check_budget,
    check_budget_rule,
    check_layout,
    check_like,
    check_reward_rule,
    constrained_scan,
)
from cmdp_fast.reference import COSTS, DIFFERENTIABLE_COSTS, BudgetTrace, TokenStats


def token_cost(stats: TokenStats, kind: str = "reverse_kl") -> Tensor:
    """The cost c_t of every token, from its statistics.

    ``reverse_kl`` and ``forward_kl`` depend on the policy and are differentiable; ``k1`` = rho, ``k3`` = exp(-rho) - 1
    + rho with rho = logprob - teacher_logprob, and ``nll`` = -teacher_logprob depend on the action and are
    detached. (As a detached cost k1 is an unbiased estimate of the reverse KL and k3 is a biased one.)

    Args:
        stats: `TokenStats` of tensors ``[...]``.
        kind: one of the names above (``jsd`` needs the logits: `divergence`).

    Returns:
        ``[...]`` in nats, in the dtype of the statistics.

    Raises:
        ValueError: another kind.

    Source: the estimators k1 and k3 are those of Schulman 2020, "Approximating KL divergence".
    """
    checks.choice("kind", kind, tuple(c for c in COSTS if c != "jsd"))
    return reference.token_cost(stats, kind)


class Terms(NamedTuple):
    """The arguments of `constrained_reward` that say what is paid and what it does, with their defaults filled in."""

    cost: str
    kind: str
    penalty: float
    penalty_at: str | None
    discrepancy_weight: float
    coefficient: float | None
    barrier_slope: float
    gamma: float
    reduction: str
    edge: str

    @property
    def budget_rule(self) -> tuple[float, bool, bool]:
        return check_budget_rule(self.gamma, self.reduction, self.edge)

    @property
    def reward_rule(self) -> tuple[str, bool, float, float, float, float]:
        return check_reward_rule(
            self.kind,
            self.penalty,
            self.penalty_at,
            self.discrepancy_weight,
            self.coefficient,
            self.barrier_slope,
        )

    def settle(
        self,
        paid: Tensor,
        task_reward: Tensor,
        limits: Tensor,
        offsets: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        backend: str,
    ) -> tuple[BudgetTrace, Tensor]:
        """The budget's trace and the modified reward of tokens that cost ``paid``, which is detached."""
        if backend == "torch":
            trace = reference.budget_trace(
                paid,
                limits,
                gamma=self.gamma,
                reduction=self.reduction,
                edge=self.edge,
                mask=mask,
                cu_seqlens=cu_seqlens,
            )
            reward = reference.modified_reward(
                task_reward,
                paid,
                trace,
                kind=self.kind,
                penalty=self.penalty,
                penalty_at=self.penalty_at,
                discrepancy_weight=self.discrepancy_weight,
                coefficient=self.coefficient,
                barrier_slope=self.barrier_slope,
                mask=mask,
                cu_seqlens=cu_seqlens,
            )
            return trace, reward
        *lines, reward = constrained_scan(
            task_reward.detach().to(paid.dtype).contiguous(),
            paid.contiguous(),
            flat(mask, torch.bool),
            offsets,
            limits,
            *self.budget_rule,
            *self.reward_rule,
            backend,
        )
        return BudgetTrace(*lines), reward


def check_terms(
    cost: str | None,
    kind: str,
    penalty: float,
    penalty_at: str | None,
    discrepancy_weight: float,
    coefficient: float | None,
    barrier_slope: float,
    gamma: float,
    reduction: str | None,
    edge: str,
    costs: tuple[str, ...] = COSTS,
) -> Terms:
    """Checks them, and warns of a penalty that has no direct gradient."""
    worst_case = kind == "worst_case"
    cost = cost or ("nll" if worst_case else "reverse_kl")
    reduction = reduction or ("mean" if worst_case else "sum")
    checks.choice("cost", cost, costs)
    if worst_case and (cost, reduction) != ("nll", "mean"):
        raise ValueError(
            f"kind='worst_case' is defined for cost='nll' and reduction='mean', got {cost!r} and {reduction!r}"
        )
    amounts = (penalty, penalty_at, discrepancy_weight, coefficient, barrier_slope)
    terms = Terms(cost, kind, *amounts, gamma, reduction, edge)
    _ = terms.budget_rule, terms.reward_rule  # raise if something is wrong
    if kind == "saute" and cost in DIFFERENTIABLE_COSTS and not torch.compiler.is_compiling():
        warnings.warn(
            f"kind='saute' with cost={cost!r}: the cost does not depend on the action, so the penalty has no direct "
            "gradient and a student may stay over budget; use kind='cmdp' or 'hinge', or cost='k1'",
            stacklevel=3,
        )
    return terms


def check_completions(
    tokens: Tensor, task_reward: Tensor, budget: float | Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Checks what there is of each token, and the budget."""
    checks.tensor("tokens", tokens)
    sequences = check_layout("tokens", tokens, mask, cu_seqlens)
    check_like("task_reward", task_reward, "tokens", tokens)
    check_budget(budget, tokens, sequences)

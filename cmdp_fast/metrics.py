"""What every trainer reports of completions under a budget, in nats: one definition of each name.

The account of the budget is that of the constraint's cost. Beside it stand, for any cost, the exact divergence from
the teacher and its estimates from the sampled tokens alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast import objective
from cmdp_fast.field_docs import documented
from cmdp_fast.ops.cost import token_cost
from cmdp_fast.reference import BudgetTrace, CostName, TokenStats

OF_A_BUDGET = ("constraint_satisfaction", "never_violated", "mean_excess", "first_violation", "budget")
"""Metrics that mean nothing where no budget is."""


@documented
class Divergences(NamedTuple):
    """The divergence of each completion from the teacher, [B] in nats, summed over its tokens."""

    kl: Tensor
    """The reverse KL of the whole distributions, [B]."""
    k1: Tensor
    """The log-ratio of the sampled tokens, [B]."""
    k3: Tensor
    """Schulman's estimator k3 from the sampled tokens, [B]."""


def divergences(stats: TokenStats, mask: Tensor) -> Divergences:
    """The sums over the real tokens of ``stats`` [B, T]."""
    kinds: tuple[CostName, ...] = ("reverse_kl", "k1", "k3")
    return Divergences(*(torch.where(mask, token_cost(stats, kind).detach(), 0.0).sum(1) for kind in kinds))


def budget_metrics(
    cost: Tensor,
    trace: BudgetTrace,
    divergence: Divergences,
    *,
    mask: Tensor,
    budget: float | Tensor,
    modified: Tensor | None = None,
    correct: Tensor | None = None,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """`objective.constraint_metrics` of costs [B, T] and their account, and the following, all scalar tensors:

    ``modified_reward``, the mean of the returns ``modified`` [B] where there are any; ``budget``, a number or the mean
    of [B]; ``cumulative_kl``, the mean of the exact divergence per completion; ``cumulative_k1`` and ``cumulative_k3``,
    the means of its estimates; ``cumulative_kl_cvar``, the mean of the worst tenth of the exact one. A completion
    without a token counts in none of them. ``weight`` [B] is that of `objective.estimate_weight`, where another sampler
    than the policy has drawn the completions.
    """
    metrics = objective.constraint_metrics(cost, trace, mask=mask, correct=correct, weight=weight)
    real = mask.any(1)
    weight = None if weight is None else weight[real]
    if modified is not None:
        metrics["modified_reward"] = objective.weighted_mean(modified[real], weight)
    limit = torch.as_tensor(budget, dtype=torch.float32, device=mask.device)
    kl, k1, k3 = (estimate[real] for estimate in divergence)
    return metrics | {
        "budget": limit[real].mean() if limit.dim() else limit,
        "cumulative_kl": objective.weighted_mean(kl, weight),
        "cumulative_k1": objective.weighted_mean(k1, weight),
        "cumulative_k3": objective.weighted_mean(k3, weight),
        "cumulative_kl_cvar": objective.cvar(kl, weight=weight),
    }


def frac_reward_zero_std(reward: Tensor, group: int) -> Tensor:
    """The share of groups whose rewards are all equal, so that they teach nothing by comparison: TRL's name. ``reward``
    [B], groups of so many in a row; NaN, a completion without a reward, counts in none. A scalar tensor."""
    groups = reward.reshape(-1, group)
    highest = torch.where(groups.isnan(), -torch.inf, groups).amax(1)
    lowest = torch.where(groups.isnan(), torch.inf, groups).amin(1)
    return (highest <= lowest).float().mean()


def as_numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as floats, with one wait for the device that most of them are on."""
    device = next(iter(values.values())).device
    here = torch.stack([value.detach().float().to(device) for value in values.values()])
    return dict(zip(values, here.tolist(), strict=True))

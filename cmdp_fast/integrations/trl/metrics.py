"""What is logged beside TRL's metrics: the names and numbers of `cmdp-fast train`, of all processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import objective
from cmdp_fast.trainer.experience import as_numbers, gathered_rows

_OF_A_BUDGET = ("constraint_satisfaction", "mean_excess", "first_violation")


def constraint_metrics(
    accelerator: Any,
    stats: cf.TokenStats,
    cost: Tensor,
    mask: Tensor,
    *,
    trace: cf.BudgetTrace | None = None,
    budget: float | None = None,
    reward: Tensor | None = None,
) -> dict[str, float]:
    """``cmdp/...`` by name, in nats: of the cost's account, and of the exact divergence whatever the cost is.

    ``trace`` and ``budget`` where there is a budget, ``reward`` the modified reward where there is one. Every process
    must call this with as many completions.
    """

    def whole(value: Tensor) -> Tensor:
        return gathered_rows(value.detach(), accelerator)

    if trace is None:
        trace = cf.budget_trace(cost.detach(), math.inf, mask=mask)
    everywhere = whole(mask)
    trace = cf.BudgetTrace(*(whole(column) for column in trace))
    found = objective.constraint_metrics(whole(cost), trace, mask=everywhere)
    if budget is None:
        found = {name: value for name, value in found.items() if name not in _OF_A_BUDGET}
    elif math.isfinite(budget):
        found["budget"] = torch.tensor(budget)
    if reward is not None:
        found["modified_reward"] = whole(reward.sum(1)).mean()
    for name, kind in (("cumulative_kl", "reverse_kl"), ("cumulative_k1", "k1"), ("cumulative_k3", "k3")):
        total = whole(torch.where(mask, cf.token_cost(stats, kind), 0.0).sum(1))
        found[name] = total.mean()
        if kind == "reverse_kl":
            found["cumulative_kl_cvar"] = objective.cvar(total)
    return {f"cmdp/{name}": value for name, value in as_numbers(found).items()}

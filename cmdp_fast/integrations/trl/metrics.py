"""The metrics beside TRL's: names and numbers as `cmdp-fast train` logs them, of all processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import batches
from cmdp_fast.metrics import OF_A_BUDGET, as_numbers, budget_metrics, divergences

from .sampler import Drawn

if TYPE_CHECKING:
    from accelerate import Accelerator


def constraint_metrics(
    accelerator: Accelerator,
    stats: cf.TokenStats,
    cost: Tensor,
    mask: Tensor,
    *,
    trace: cf.BudgetTrace | None = None,
    budget: float | None = None,
    reward: Tensor | None = None,
    drawn: Drawn | None = None,
) -> dict[str, float]:
    """``cmdp/...`` by name, in nats (`metrics.budget_metrics`): of the account of the costs [B, T], and of the exact
    divergence for any cost.

    ``trace`` and ``budget`` where there is a budget, ``reward`` [B, T] the modified reward where there is one,
    ``drawn`` where another sampler than the policy has drawn the completions: they are then weighed. Every process must
    call this with as many completions. Without a budget the metrics of one are left out, and ``budget`` where it is
    infinite. Nothing where no completion of any process has a token: TRL takes the mean of what is logged.
    """
    if trace is None:
        trace = cf.budget_trace(cost.detach(), math.inf, mask=mask)
    modified = None if reward is None else reward.detach().sum(1)
    ratio = None if drawn is None else drawn.log_ratio
    here = (cost.detach(), trace, divergences(stats, mask), mask, modified, ratio)
    cost, trace, divergence, everywhere, modified, ratio = batches.gathered(here, accelerator)
    if not everywhere.any():
        return {}
    limit = math.inf if budget is None else budget
    weight, of_sampler = None, {}
    if drawn is not None and ratio is not None:
        drawn = drawn._replace(log_ratio=ratio)
        weight, of_sampler = drawn.weight(everywhere), as_numbers(drawn.metrics(everywhere))
    figures = budget_metrics(cost, trace, divergence, mask=everywhere, budget=limit, modified=modified, weight=weight)
    left_out = OF_A_BUDGET if budget is None else () if math.isfinite(budget) else ("budget",)
    named = {f"cmdp/{name}": value for name, value in as_numbers(figures).items() if name not in left_out}
    return named | of_sampler

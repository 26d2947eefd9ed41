"""What bounds of the costs prove of a budget: that it is met, that it is exceeded, or neither."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from cmdp_fast import checks
from cmdp_fast.constraint import AccountSettings, Constraint
from cmdp_fast.field_docs import documented
from cmdp_fast.ops import backends
from cmdp_fast.ops.budget import budget_trace


@documented
class BudgetVerdict(NamedTuple):
    """What is proven of each sequence, bool ``[B]`` each. Where neither is True, nothing is; both never are."""

    certified: Tensor
    """Whether a sequence is proven to be within the budget at every token; bool ``[B]``."""
    refuted: Tensor
    """Whether a sequence is proven to be in violation from some token on; bool ``[B]``."""


def budget_verdict(
    lower: Tensor,
    upper: Tensor,
    budget: float | Tensor | None = None,
    *,
    constraint: Constraint | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: backends.BackendName | None = None,
    **settings: Unpack[AccountSettings],
) -> BudgetVerdict:
    """Whether a sequence keeps its budget, where its costs are known between bounds only, as `topk_stats` gives them.

    Every C_t, a sum or a mean with weights that are not negative, lies between that of the lower costs and that of the
    upper ones. So a sequence is certified where `budget_trace` of the upper costs has no violation, and refuted where
    that of the lower costs has one. ``edge``, ``gamma``, ``reduction`` and ``per_token`` count as they do there.

    Args:
        lower, upper: bounds of the cost, ``[B, T]``, or ``[N]`` packed with ``cu_seqlens``; in nats for a KL, such as
            ``stats.forward_kl`` and ``stats.forward_kl_upper``. Detached. A NaN proves nothing: it counts as a lower
            bound of 0 and an upper one of infinity. So the cost must not be negative.
        budget, constraint, mask, cu_seqlens, backend, gamma, reduction, edge, per_token: as `budget_trace`.

    Returns:
        `BudgetVerdict` of bool tensors ``[B]``. A sequence without a token that counts is certified.

    Raises:
        TypeError, ValueError: as `budget_trace`; bounds of different shapes.
    """
    for name, value in (("lower", lower), ("upper", upper)):
        checks.tensor(name, value)
    if lower.shape != upper.shape:
        raise ValueError(f"lower and upper must have one shape, got {list(lower.shape)} and {list(upper.shape)}")

    def violated(cost: Tensor) -> Tensor:
        trace = budget_trace(
            cost, budget, constraint=constraint, mask=mask, cu_seqlens=cu_seqlens, backend=backend, **settings
        )
        width = cost.shape[-1] if cu_seqlens is None else (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        return trace.first_violation < width

    return BudgetVerdict(~violated(upper), violated(lower.masked_fill(torch.isnan(lower), 0.0)))

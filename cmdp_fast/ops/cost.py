"""The cost of a token, from its statistics."""

from __future__ import annotations

from torch import Tensor

from cmdp_fast import checks, reference
from cmdp_fast.compiling import varies
from cmdp_fast.constraint import check_clamp
from cmdp_fast.reference import COSTS, DIFFERENTIABLE_COSTS, CostName, TokenStats

FROM_STATISTICS = tuple(cost for cost in COSTS if cost != "jsd")  # which takes further passes over the logits


def token_cost(stats: TokenStats, kind: CostName = "reverse_kl", *, clamp: float | None = None) -> Tensor:
    """The cost c_t of every token, from its statistics.

    ``reverse_kl`` and ``forward_kl`` depend on the policy and are differentiable; ``k1`` = rho, ``k3`` = exp(-rho) - 1
    + rho with rho = logprob - teacher_logprob, and ``nll`` = -teacher_logprob depend on the action and are
    detached. (As a detached cost k1 is an unbiased estimate of the reverse KL and k3 is a biased one.)

    k3 grows as the *ratio* of the teacher's probability to the student's: a token that the student gave 1e-13 of the
    teacher's probability costs 1e13 nats, more than any budget and any reward. k1 of the same token is -30.

    Args:
        stats: `TokenStats` of tensors ``[...]``.
        kind: one of the names above (``jsd``: `divergence`, `linear_divergence`).
        clamp: c > 0 in nats puts every cost into [-c, c]; for ``k1``, ``k3`` and ``nll``. The estimate is then biased.
            None, the default: as it is.

    Returns:
        ``[...]`` in nats, in the dtype of the statistics, in memory of its own. A token that the student alone excludes
        has a k1 of -inf and a k3 of +inf; one that both models exclude has NaN.

    Raises:
        ValueError: another kind, or a clamp that is not positive or would take the gradient of a cost that has one.
        TypeError: a clamp that is no number.

    Source: the estimators k1 and k3 are those of Schulman 2020, "Approximating KL divergence".
    """
    checks.choice("kind", kind, FROM_STATISTICS)
    check_clamp("clamp", clamp, kind)
    if kind in DIFFERENTIABLE_COSTS:
        return reference.token_cost(stats, kind).clone()
    if clamp is None or not varies(clamp):
        return reference.token_cost(stats, kind, clamp)
    cost = reference.token_cost(stats, kind)
    bound = cost.new_ones(()) * clamp  # see `compiling.in_tensor`
    return cost.clamp(-bound, bound)

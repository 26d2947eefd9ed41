"""From modified rewards to a loss: returns, coefficients, the clipped surrogate with its direct term, and metrics.

The advantages between them stand in `cmdp_fast.advantage`, the weights of completions that another sampler has drawn in
`cmdp_fast.sampler_correction`; their names are offered here too.

Pure functions of small tensors. B sequences of up to T tokens are padded to [B, T] with a boolean ``mask`` (None: all
tokens are real); a masked token contributes nothing, its entries are never used (they may be NaN) and come back as 0.
Costs, rewards and budgets are in nats; floating dtypes are kept (returns and advantages of half precision are computed
in float32). Only `ppo_loss` is differentiable; everything else is detached. All raise ValueError for shapes and
TypeError for masks that do not fit.

The modified reward depends on the policy twice, through the sampled actions and through the costs c_t, so the gradient
of the objective E[sum_t R_t] is the sum of two terms (v_t, whether the budget has been exceeded, is held fixed):

    score term    E[ sum_t grad log pi(a_t|s_t) A_t ]    A_t = `score_coefficient` less a baseline
    direct term  -E[ sum_t k_t grad c_t ]                k_t = `direct_coefficient`

    kind                direct coefficient k_t (cost a plain sum)
    hinge, cmdp         discrepancy_weight at *every* token of a sequence that ends over budget; and lambda, if any
    lagrangian, pid     lambda at every token
    barrier             kappa / (d - C_L) up to L, the last token before the crossing; then barrier_slope
    saute, worst_case   0

Dropping either is a common mistake: folding the divergence into the reward alone loses the direct term, adding it to
the loss alone loses the long-term part of the score term, the effect of an action on later costs. Costs that depend on
the sampled action (k1, k3, nll) are detached: no direct term, and the immediate cost belongs to the score term.

The constrained view is that of arXiv 2509.22921; the form of the discrepancy term, and so k_t, is this project's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmdp_fast.advantage import GroupAdvantage as GroupAdvantage
from cmdp_fast.advantage import gae as gae
from cmdp_fast.advantage import grpo as grpo
from cmdp_fast.advantage import position_rloo as position_rloo
from cmdp_fast.advantage import rloo as rloo
from cmdp_fast.advantage import whiten as whiten
from cmdp_fast.constraint import Constraint, checked
from cmdp_fast.padded import as_given, discounted, following, kept_tokens, last_kept, suffix_scan, wide
from cmdp_fast.pid import PIDController as PIDController
from cmdp_fast.reference import BudgetTrace, compute_dtype
from cmdp_fast.sampler_correction import estimate_weight as estimate_weight
from cmdp_fast.sampler_correction import sampler_log_ratio as sampler_log_ratio
from cmdp_fast.sampler_correction import sampler_metrics as sampler_metrics
from cmdp_fast.sampler_correction import sampler_weight as sampler_weight
from cmdp_fast.sampler_correction import weighted_mean as weighted_mean

# --------------------------------------------------------------------------------------------------------------
# Returns and the two coefficients of the gradient


def task_part(task_reward: Tensor, trace: BudgetTrace, constraint: Constraint, *, mask: Tensor | None = None) -> Tensor:
    """The part of the modified reward that is the task's own, r^task_t [B, T], in memory of its own.

    (1 - v_t) r_t for ``cmdp, saute, worst_case``; r_t for ``hinge, lagrangian, pid``; for ``barrier`` r_t while budget
    remains at this and all earlier real tokens, else 0. Raises TypeError for anything but a `Constraint`, ValueError
    for shapes that differ.
    """
    keep = kept_tokens(task_reward, mask, remaining=trace.remaining, violated=trace.violated)
    kept = checked(constraint).is_a.task_reward
    if kept == "feasible":
        keep = keep & ~trace.violated
    elif kept == "inside":
        keep = keep & _inside(trace, keep)
    return torch.where(keep, task_reward.detach(), 0.0)


def _inside(trace: BudgetTrace, keep: Tensor) -> Tensor:
    return ((trace.remaining > 0) | ~keep).long().cumprod(1) > 0


def returns_to_go(reward: Tensor, *, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma G_{t+1} [B, T], in the dtype of ``reward``; a masked token does not discount. G_1 is S."""
    keep = kept_tokens(reward, mask)
    return as_given(reward, torch.where(keep, _returns(reward, keep, gamma), 0.0))


def _returns(reward: Tensor, keep: Tensor, gamma: float) -> Tensor:
    """Returns in which a masked token carries the return of the next real one; float32 at least."""
    reward = wide(torch.where(keep, reward.detach(), 0.0))
    return suffix_scan(reward, torch.where(keep, reward.new_tensor(gamma), 1.0))


def score_coefficient(
    reward: Tensor,
    task_part: Tensor,
    constraint: Constraint,
    *,
    mask: Tensor | None = None,
    gamma: float = 1.0,
) -> Tensor:
    """The coefficient of grad log pi(a_t|s_t) before a baseline is subtracted, [B, T].

    ``reward`` is the modified reward, ``task_part`` its part r^task from the function of that name. With costs that
    depend on the sampled action (k1, k3, nll) it is the return G_t. Otherwise (reverse_kl, forward_kl, jsd) cost,
    penalty and violation at t follow from the state alone, and it is r^task_t + gamma G_{t+1}. What is left out only
    adds variance: its expectation against the score is zero, so the return S of the whole sequence may stand in without
    a bias, as in `grpo` and `rloo`. ``gamma`` is the discount of the *reward* (``constraint.gamma`` is the cost's);
    below 1 it gives the usual discounted policy gradient, which is the gradient of no objective; the module's two terms
    are exact for gamma = 1. Raises TypeError for anything but a `Constraint`, ValueError for shapes that differ.
    """
    keep = kept_tokens(reward, mask, task_part=task_part)
    returns = _returns(reward, keep, gamma)
    later = discounted(gamma, following(returns))
    value = returns if checked(constraint).action_dependent else task_part.detach() + later
    return as_given(reward, torch.where(keep, value, 0.0))


def direct_coefficient(trace: BudgetTrace, constraint: Constraint, *, mask: Tensor | None = None) -> Tensor:
    """The weights k_t >= 0 [B, T] of the direct term, -sum_t k_t grad c_t; all detached.

    ``trace`` is the account that was kept under this constraint. With gamma its discount of the cost, its coefficient
    lambda (lagrangian, pid) or kappa (barrier), and w_i = dC_t/dc_i, which is gamma^{i-1} for the sum and 1/t for the
    prefix mean:

    ``hinge, cmdp``: the excess telescopes to (C_T - d)+, so k_i = discrepancy_weight w_i 1[C_T > d] at t = T: all
    tokens of the sequence, those before the crossing included. For a sum of non-negative costs 1[C_T > d] is v_T. A
    prefix mean can cross and come back: v_T is absorbing and stays 1, but (m_T - d)+ and its gradient are 0. The
    indicator used is therefore "v_T and C_T >= d"; the equality is for ``edge="saute"``, where it violates. With a
    coefficient lambda it comes on top, undiscounted, at every token of every sequence.

    ``barrier``: the logarithms telescope to kappa log(1 - C_L/d), L the last token before the crossing, so
    k_i = kappa w_i / (d - C_L) up to L, with w_i taken at t = L, and barrier_slope from the crossing on.

    ``lagrangian, pid``: lambda at every token, undiscounted. ``saute, worst_case``: 0, their penalty is piecewise
    constant; with an action-independent cost only the score term of later penalties acts. 0 throughout for a cost that
    depends on the action (k1, k3, nll), which has no gradient. Raises TypeError for anything but a `Constraint`.
    """
    direct = checked(constraint).is_a.direct
    remaining = trace.remaining.detach()
    keep = kept_tokens(remaining, mask)
    inside = _inside(trace, keep) & keep

    def account_weight(counted: Tensor) -> Tensor:
        """dC/dc_i of the account after the counted tokens, for those."""
        if constraint.reduction == "mean":
            return counted / counted.sum(1, keepdim=True).to(remaining.dtype)
        return torch.pow(constraint.gamma, (keep.long().cumsum(1) - 1).to(remaining.dtype))

    if constraint.action_dependent or direct is None:
        return torch.zeros_like(remaining)
    if direct == "discrepancy":
        over = last_kept(trace.violated, keep) & ~(last_kept(remaining, keep) > 0)  # not "<= 0": NaN is over budget
        weight = torch.where(over, constraint.discrepancy_weight * account_weight(keep), 0.0) + constraint.price
    elif direct == "barrier":
        slack = last_kept(remaining, inside)
        weight = torch.where(inside, constraint.price * account_weight(inside) / slack, constraint.barrier_slope)
    else:
        weight = torch.full_like(remaining, constraint.price)
    return torch.where(keep, weight, 0.0)


# --------------------------------------------------------------------------------------------------------------
# The surrogate


def ppo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cost: Tensor | None = None,
    direct: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate plus the direct term: a scalar loss to minimise, and detached scalar metrics.

        loss = (1/N) sum over tokens of [ -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + k c ]

    rho = exp(logprob - old_logprob). All tensors are [B, T]; ``logprob`` and ``cost`` are differentiable, the rest is
    detached. Ratio and clip act on the score term alone: the cost is a function of the state and of the current policy
    and is not reweighted by the sampled action. At rho = 1 the gradient is minus that of the objective. If the
    advantages were divided by a number, ``direct`` (k) must have been divided by the same one. A token whose clip
    takes effect, or whose advantage is 0, has no gradient however large its ratio is. With a negative advantage nothing
    bounds a large ratio: where rho overflows (log-ratios above 88.7 in float32) so does the loss.

    N, the ``normalizer``, divides both terms, so it does not change what the discrepancy weight means against the task
    reward. Default: the number of sequences with a real token, since the objective is a sum over the trajectory and a
    mean over trajectories (the number of tokens would weigh a sequence by the lengths of its neighbours). Minibatches
    that are accumulated into one step have to share one N.

    Metrics, means over real tokens: ``clip_ratio/low_mean``, ``clip_ratio/high_mean`` (rho beyond the edge on the side
    where the clip takes effect), ``clip_ratio/region_mean`` (either), ``approx_kl`` (mean of rho - 1 - log rho, nats);
    and ``loss/score``, ``loss/direct``, the two terms of the loss.

    Raises ValueError for shapes that differ, for ``cost`` without ``direct`` or the reverse, and for a cost that cannot
    pass a gradient although logprob can: the direct term would be lost. Leave both out for action-dependent costs.

    Source: the clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347, equation 7); the direct term as in the
    head of this module.
    """
    keep = kept_tokens(logprob, mask, old_logprob=old_logprob, advantage=advantage)
    if (cost is None) != (direct is None):
        given, absent = ("direct", "cost") if cost is None else ("cost", "direct")
        raise ValueError(f"{given} was given without {absent}; the direct term needs both")
    tokens = keep.sum().clamp(min=1)
    if normalizer is None:
        normalizer = keep.any(1).sum().clamp(min=1)

    log_ratio = torch.where(keep, logprob - old_logprob.detach(), 0.0)
    ratio = log_ratio.detach().exp()
    score = torch.where(keep, advantage.detach(), 0.0)
    low = (ratio < 1.0 - clip_low) & (score < 0)
    high = (ratio > 1.0 + clip_high) & (score > 0)
    # min(rho A, clip(rho) A) is rho A but where the clip takes effect: there it is a constant. A ratio that is not part
    # of the loss is not part of its gradient either: exp overflows from 88.7 on, and inf * 0 is NaN.
    weighed = ~(low | high) & (score != 0)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    factor = torch.where(weighed, torch.where(weighed, log_ratio, 0.0).exp(), clipped)
    surrogate = torch.where(score != 0, factor, 0.0) * score  # clipped is infinite where clip_high and the ratio are
    score_loss = -surrogate.sum() / normalizer

    direct_loss = torch.zeros_like(score_loss)
    if cost is not None and direct is not None:
        kept_tokens(logprob, None, cost=cost, direct=direct)
        if torch.is_grad_enabled() and logprob.requires_grad and not cost.requires_grad:
            raise ValueError("cost has no gradient, so the direct term would be lost; expected a differentiable cost")
        weight = torch.where(keep, direct.detach(), 0.0)
        # 0 * inf: a cost that is infinite where its weight is 0 is not part of the objective
        direct_loss = torch.where(weight != 0, weight * cost, 0.0).sum() / normalizer

    with torch.no_grad():
        metrics = {
            "clip_ratio/low_mean": low.sum().to(compute_dtype(logprob)) / tokens,
            "clip_ratio/high_mean": high.sum().to(compute_dtype(logprob)) / tokens,
            "clip_ratio/region_mean": (low | high).sum().to(compute_dtype(logprob)) / tokens,
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum() / tokens,
            "loss/score": score_loss.detach(),
            "loss/direct": direct_loss.detach(),
        }
    return score_loss + direct_loss, metrics


# --------------------------------------------------------------------------------------------------------------
# Metrics


def cvar(values: Tensor, alpha: float = 0.1, *, weight: Tensor | None = None) -> Tensor:
    """The mean of the largest ``alpha`` of some values [B], a scalar: their conditional value at risk.

    With a ``weight`` [B], of the values that have the share ``alpha`` of it. A fraction of a value counts as that
    fraction. Raises ValueError for alpha outside (0, 1].

    Source: Rockafellar and Uryasev 2000.
    """
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha={alpha}, expected a fraction in (0, 1]")
    worst, order = values.sort(descending=True)
    each = torch.ones_like(values) if weight is None else weight.to(values.dtype)[order]
    size = alpha * each.sum()
    share = torch.minimum(size - (each.cumsum(0) - each), each)
    return torch.where(share > 0, worst * share, 0.0).sum() / size


def constraint_metrics(
    cost: Tensor,
    trace: BudgetTrace,
    *,
    mask: Tensor | None = None,
    correct: Tensor | None = None,
    mean_budget: float | Tensor | None = None,
    alpha: float = 0.1,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a run reports about its constraint, as scalar tensors on the device of ``cost`` [B, T].

    A sequence without a real token counts nowhere, as in `ppo_loss`; where none has one, all metrics are NaN. C_T is
    the account of ``trace`` (which knows its budget d) at the last real token of a sequence:
    ``constraint_satisfaction`` mean 1[C_T <= d]; ``never_violated`` mean 1[no token violates]; ``mean_excess`` mean
    (C_T - d)+; ``mean_cumulative`` mean C_T; ``cvar`` the mean of the worst ``alpha`` of the C_T (see `cvar`);
    ``mean_token_cost`` and ``max_token_cost`` over real tokens; ``first_violation`` mean of t/T, the share of a
    sequence's tokens before its first violation, 1 where there is none.
    With ``correct`` [B] (bool or 0/1): ``accuracy`` and ``correct_and_feasible``. With ``mean_budget`` (a number or
    [B]): ``prefix_satisfaction``, mean 1[max_t m_t <= mean_budget] of the prefix means m_t of ``cost``.

    With ``weight`` [B], of `estimate_weight`, all but ``max_token_cost`` are estimates of what completions of the
    policy would show, from those that another sampler has drawn; ``mean_token_cost`` is the ratio of two of them.

    A violation is absorbing, so a sequence loses the task's reward (``cmdp``, ``saute``) where it violates once. With
    costs that may be negative (k1) or a prefix mean it may still end within its budget: satisfied, but violated.

    With a cost of ``reverse_kl`` these are exact per-sequence divergences, not estimates from the sampled tokens.
    Raises ValueError for shapes that differ, no tokens at all, or alpha outside (0, 1].
    """
    keep = kept_tokens(cost, mask, cumulative=trace.cumulative)
    if cost.numel() == 0:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: expected at least one token")
    real = keep.any(1)
    cost, keep = torch.where(keep, cost.detach(), 0.0)[real], keep[real]
    length, weight = keep.sum(1), None if weight is None else weight[real]
    total, remaining = (last_kept(amount[real], keep)[:, 0] for amount in (trace.cumulative, trace.remaining))
    feasible, violated = remaining >= 0, trace.violated[real] & keep

    def mean(values: Tensor) -> Tensor:
        return weighted_mean(values.to(total.dtype), weight)

    metrics = {
        "constraint_satisfaction": mean(feasible),
        "never_violated": 1.0 - mean(violated.any(1)),
        "mean_excess": mean((-remaining).clamp(min=0.0)),
        "mean_cumulative": mean(total),
        "cvar": cvar(total, alpha, weight=weight),
        "mean_token_cost": mean(cost.to(total.dtype).sum(1)) / mean(length),
        "max_token_cost": cost.masked_fill(~keep, -torch.inf).amax() if len(cost) else cost.new_tensor(torch.nan),
        "first_violation": 1.0 - mean(violated.sum(1).to(total.dtype) / length),
    }
    if correct is not None:
        right = correct[real]
        metrics["accuracy"] = mean(right)
        metrics["correct_and_feasible"] = mean(right * feasible)
    if mean_budget is not None:
        # As an account is kept: summed in float64, the budget rounded as the costs are. Costs of 0.1 keep to 0.1.
        prefix = cost.double().cumsum(1) / keep.long().cumsum(1).clamp(min=1)
        limit = torch.as_tensor(mean_budget, dtype=torch.float64, device=cost.device).to(compute_dtype(cost)).double()
        limit = limit.expand(len(real))[real, None]
        metrics["prefix_satisfaction"] = mean((prefix <= limit).all(1))
    return metrics

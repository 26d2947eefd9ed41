"""The budget's account of a sequence, and the reward it modifies. Native: csrc/budget.h, csrc/cpu/scan.h.

Nothing here is differentiable: violations are indicators, and the part of the objective's gradient that flows through
the cost is the direct term of `cmdp_fast.objective`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from cmdp_fast import checks
from cmdp_fast.constraint import AccountSettings, Constraint, RewardSettings, constraint_of
from cmdp_fast.layout import Account, BudgetRule, Rewarding, RewardRule, TokenTrace, alike, flat, in_array
from cmdp_fast.ops import backends
from cmdp_fast.ops.operator import operator
from cmdp_fast.ops.sequences import check_cost, check_like, check_offsets, check_values, sequence_limits
from cmdp_fast.reference import BudgetTrace, compute_dtype


def budget_trace(
    cost: Tensor,
    budget: float | Tensor | None = None,
    *,
    constraint: Constraint | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: backends.BackendName | None = None,
    **settings: Unpack[AccountSettings],
) -> BudgetTrace:
    """Cumulative cost C_t = sum_{i<=t} gamma^(i-1) c_i of each sequence against its budget d.

    A violation is absorbing: ``violated`` is True from the first token with C_t > d on, that token included. The
    excess Phi_t = (C_t - d)+ - (C_{t-1} - d)+ is what token t adds to the overrun. i counts unmasked tokens; a masked
    token costs nothing and reports the account as it stands (float64 costs on Triton: but for rounding). A NaN in the
    cost counts as a violation from there on. An infinite budget is none: nothing else violates it with either edge, and
    all of it remains, even where the cost is infinite.

    With gamma < 1 the budget bounds the *discounted* sum as it stands, so it is worth less than the same number without
    a discount: T tokens of cost d/T spend d (1 - gamma^T) / (T (1 - gamma)). The public codes of Sauté RL take their
    budget for an undiscounted one and scale it down to that; `discounted_budget` does.

    Args:
        cost: ``[B, T]``, or ``[N]`` packed with ``cu_seqlens``; any floating dtype, in nats for a KL. Detached.
        budget: d >= 0 (nats for a KL): one number, or a tensor ``[B]`` with one number per sequence.
        constraint: a `Constraint`, in place of the budget and of the keywords that follow it here.
        mask: bool like ``cost``, False = the token does not count (padding, prompt).
        cu_seqlens: ``[B+1]`` integers, 0 = first, N = last, not decreasing: where each packed sequence begins.
        gamma: discount of the cost, in (0, 1]; 1 for a plain sum. Not with ``reduction="mean"``.
        reduction: ``sum`` (also None), or ``mean``: the prefix mean m_t = (1/t) sum_{i<=t} c_i takes the place of C_t.
        edge: ``strict``: C_t = d is feasible; ``saute``: a spent budget (C_t >= d) is a violation, as in Sauté RL.
        per_token: the budget of a sequence is d times its number of unmasked tokens.
        backend: None chooses (``cpu`` for CPU tensors, ``triton`` or ``cuda`` on a GPU, else ``torch``); a name forces
            it.

    Returns:
        `BudgetTrace`: ``cumulative, remaining, excess`` float32 (float64 for float64 cost) and ``violated`` bool,
        shaped like ``cost``; ``first_violation`` int64 ``[B]``, 0-based within the padded row or packed sequence,
        the width of the row (length of the sequence) if there is none. Sums are kept in float64.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices, offsets or settings that do not fit; a negative or NaN budget.
            The values of tensors (``cu_seqlens``, ``budget``) are checked on the CPU only: looking would stall a GPU.
            There a token that no packed sequence holds gets 0 throughout.

    Source: Sauté RL (Sootla et al. 2022) without its state; the excess is this project's discrepancy term.
    """
    held = constraint_of("budget_trace", constraint, settings, AccountSettings.__annotations__, budget=budget)
    offsets = check_cost(cost, mask, cu_seqlens)
    dtype = compute_dtype(cost)
    limits = sequence_limits(held.budget, held.per_token, cost, mask, offsets, dtype)
    chosen = backends.choose(backend, cost, "budget_trace")
    account = Account(in_array(cost.detach(), dtype), flat(mask, torch.bool), offsets)
    return _budget_trace(_Given(account, limits, held.budget_rule, chosen))


def discounted_budget(budget: float | Tensor, gamma: float, horizon: int) -> float | Tensor:
    """What a discounted sum of costs may come to where an undiscounted one may come to ``budget``.

        d (1 - gamma^T) / (T (1 - gamma)),    T = horizon

    A sequence of T equal costs then spends the same share of either; costs that come early weigh more, those that come
    late less.

    Args:
        budget: d >= 0 in the units of the cost (nats for a KL): a number, or a tensor ``[B]``.
        gamma: the discount of the cost, in (0, 1]; 1 changes nothing.
        horizon: the largest number of tokens T >= 1 of a sequence, whatever its own length is.

    Under ``torch.compile`` each gamma and horizon makes a graph of its own; call it outside where they change.

    Returns:
        A number, or a tensor ``[B]``: the ``budget`` of `budget_trace` and `Constraint` beside the same ``gamma``.

    Raises:
        TypeError, ValueError: values outside these ranges; those of a tensor are checked where it is used.

    Source: the code of Sauté RL (Sootla et al. 2022, huawei-noah/HEBO) and OmniSafe's ``SauteAdapter``, where the
    horizon is ``max_ep_len``.
    """
    checks.machine_integer("horizon", horizon)
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1 token, got {horizon}")
    Constraint(budget=budget, gamma=gamma)  # which checks both
    # (1 - gamma^T) / (1 - gamma) without the cancellation of a gamma close to 1
    share = 1.0 if gamma == 1 else math.expm1(horizon * math.log(gamma)) / (gamma - 1) / horizon
    return budget * share


def modified_reward(
    task_reward: Tensor,
    cost: Tensor,
    trace: BudgetTrace,
    *,
    constraint: Constraint | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: backends.BackendName | None = None,
    **settings: Unpack[RewardSettings],
) -> Tensor:
    """The modified reward of every token: the task's reward, changed by what the budget's trace says.

    With v_t = ``violated``, e_t = 1 at the crossing token (the first violation), Phi_t = ``excess``, n = ``penalty``:

    | kind           | modified reward                               | note                                      |
    | -------------- | --------------------------------------------- | ----------------------------------------- |
    | ``cmdp``       | (1-v_t) r_t - e_t n - beta Phi_t - lambda c_t | the method; the penalty is paid once      |
    | ``hinge``      | r_t - beta Phi_t - lambda c_t                 | exact penalty, reward kept                |
    | ``saute``      | (1-v_t) r_t - v_t n                           | Sauté RL without its state                |
    | ``lagrangian`` | r_t - lambda c_t                              | soft relaxation, lambda fixed             |
    | ``pid``        | r_t - lambda c_t                              | lambda from `cmdp_fast.pid.PIDController` |
    | ``barrier``    | r_t + kappa [log(1-C_t/d) - log(1-C_{t-1}/d)] | while C_t < d; from then on -slope c_t    |
    | ``worst_case`` | as ``saute``                                  | for cost ``nll`` and the prefix mean      |

    The ``barrier`` takes d from the trace's first line, as ``remaining + cumulative``, which are rounded: where a cost
    below 0 (``k1``) comes first and is 10^k times as large as d, the first reward is off by kappa 10^(k-7) (float32).

    Args:
        task_reward: r_t, shaped like ``cost``, usually 0 except at the last token.
        cost, trace: as given to and returned by `budget_trace`.
        constraint: a `Constraint`, in place of the six keywords that follow; its budget is not looked at.
        kind: one of the names above.
        penalty: n >= 0.
        penalty_at: ``crossing`` pays it once, ``every`` at each violating token. Default: crossing for ``cmdp``, every
            for ``saute`` and ``worst_case``. Paid at every violating token, the penalty makes a student that starts
            over budget stop early to pay less.
        discrepancy_weight: beta >= 0, for ``cmdp`` and ``hinge``.
        coefficient: lambda (``lagrangian``, ``pid``) or kappa (``barrier``), >= 0; needed there. For ``cmdp`` and
            ``hinge`` a price of every unit of cost beside the budget; 0, as in the paper, if it is left out. Refused
            for the other kinds.
        barrier_slope: the price of a unit of cost once the barrier is crossed.
        mask, cu_seqlens, backend: as in `budget_trace`. Masked tokens have reward 0, and what
            stands for them in ``task_reward``, ``cost`` and ``trace`` is not looked at.

    Returns:
        A float32 tensor (float64 for float64 cost) shaped like ``cost``; not differentiable.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or settings that do not fit.

    Source: after arXiv 2509.22921. The paper's own symbols for its discrepancy term were not available; Phi is this
    project's definition. Stooke et al. 2020 for ``pid``; arXiv 2610.00332 for ``worst_case``.
    """
    held = constraint_of("modified_reward", constraint, settings, RewardSettings.__annotations__)
    offsets = check_cost(cost, mask, cu_seqlens)
    check_like("task_reward", task_reward, "cost", cost)
    if not isinstance(trace, BudgetTrace):
        raise TypeError(f"trace must be the BudgetTrace that budget_trace returned, got {type(trace).__name__}")
    if checks.tensor("trace.violated", trace.violated).dtype != torch.bool:
        raise TypeError(f"trace.violated must be bool, got {checks.describe(trace.violated)}")
    for name, field in zip(BudgetTrace._fields, trace, strict=True):  # torch 2.8 traces no _asdict
        if name != "first_violation":
            check_like(f"trace.{name}", field, "cost", cost)
    chosen = backends.choose(backend, cost, "modified_reward")
    dtype = compute_dtype(cost)
    task, paid, cumulative, remaining, excess = (
        in_array(t.detach(), dtype) for t in (task_reward, cost, trace.cumulative, trace.remaining, trace.excess)
    )
    spent = TokenTrace(cumulative, remaining, trace.violated.contiguous(), excess)
    account = Account(paid, flat(mask, torch.bool), offsets)
    return _modified_reward(_Rewarded(account, spent, task, held.reward_rule, chosen))


def settle(
    constraint: Constraint, account: Account, limits: Tensor, task_reward: Tensor, backend: str
) -> tuple[BudgetTrace, Tensor]:
    """The budget's trace and the modified reward of tokens, in one scan; bitwise what the two operations give in turn.

    Nothing is differentiable; the cost may lie in any memory.
    """
    cost = account.cost.detach().contiguous()
    task = in_array(task_reward.detach(), cost.dtype)
    rules = constraint.budget_rule, constraint.reward_rule
    made = _constrained_scan(_Scan(Account(cost, account.mask, account.offsets), task, limits, *rules, backend))
    return made.trace, made.reward


# --------------------------------------------------------------------------------------------------------------
# The operators that torch sees


def room(like: Tensor, dtype: torch.dtype, count: int | None = None) -> Tensor:
    """Room for a number per token of ``like [B, T]`` or packed ``[N]``, or for ``count`` numbers, that a scan writes.

    On a GPU the offsets of packed sequences are not checked: a token of no sequence is 0, not leftover memory.
    """
    make = like.new_empty if like.dim() == 2 else like.new_zeros
    return make(like.shape if count is None else count, dtype=dtype)


def empty_outcome(like: Tensor, dtype: torch.dtype, sequences: int) -> Settled:
    """Room for a trace and a reward per token of ``like [B, T]`` or packed ``[N]``."""
    reward, *amounts = alike(room(like, dtype), 4, zero=like.dim() != 2)
    return Settled(_trace(amounts, sequences), reward)


def _empty_trace(account: Account) -> BudgetTrace:
    cost = account.cost
    amounts = alike(room(cost, cost.dtype), 3, zero=cost.dim() != 2)
    return _trace(amounts, account.offsets.shape[0] - 1)


def _trace(amounts: list[Tensor], sequences: int) -> BudgetTrace:
    cumulative, remaining, excess = amounts
    violated, first_violation = room(cumulative, torch.bool), room(cumulative, torch.int64, sequences)
    return BudgetTrace(cumulative, remaining, violated, first_violation, excess)


class _Given(NamedTuple):
    account: Account
    limits: Tensor
    rule: BudgetRule
    backend: str


@operator("budget_trace")
def _budget_trace(given: _Given) -> BudgetTrace:
    check_values(given.account.offsets, given.limits, given.account.cost)
    trace = _empty_trace(given.account)
    backends.get(given.backend).trace_budgets(given.account, given.limits, given.rule, trace)
    return trace


@_budget_trace.shapes
def _(given: _Given) -> BudgetTrace:
    return _empty_trace(given.account)


class _Scan(NamedTuple):
    account: Account
    task_reward: Tensor
    limits: Tensor
    budget_rule: BudgetRule
    reward_rule: RewardRule
    backend: str


class Settled(NamedTuple):
    """What a scan writes."""

    trace: BudgetTrace
    reward: Tensor


@operator("constrained_scan")
def _constrained_scan(given: _Scan) -> Settled:
    check_values(given.account.offsets, given.limits, given.account.cost)
    made = _empty_settled(given)
    rewarding = Rewarding(given.reward_rule, given.task_reward, made.reward)
    backends.get(given.backend).trace_budgets(given.account, given.limits, given.budget_rule, made.trace, rewarding)
    return made


def _empty_settled(given: _Scan) -> Settled:
    cost, _, offsets = given.account
    return empty_outcome(cost, cost.dtype, offsets.shape[0] - 1)


_constrained_scan.shapes(_empty_settled)


class _Rewarded(NamedTuple):
    account: Account
    trace: TokenTrace
    task_reward: Tensor
    rule: RewardRule
    backend: str


@operator("modified_reward")
def _modified_reward(given: _Rewarded) -> Tensor:
    check_offsets(given.account.offsets, given.account.cost)
    reward = _empty_reward(given)
    rewarding = Rewarding(given.rule, given.task_reward, reward)
    backends.get(given.backend).modify_rewards(given.account, given.trace, rewarding)
    return reward


def _empty_reward(given: _Rewarded) -> Tensor:
    return room(given.account.cost, given.account.cost.dtype)


_modified_reward.shapes(_empty_reward)

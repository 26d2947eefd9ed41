"""The budget's account of a sequence, and the reward it modifies. Native: csrc/budget.h, csrc/cpu/scan.h.

Nothing here is differentiable: violations are indicators, and the part of the objective's gradient that flows through
the cost is the direct term of `cmdp_fast.objective`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from cmdp_fast import checks, reference
from cmdp_fast.layout import address, flat
from cmdp_fast.ops import backends
from cmdp_fast.reference import REWARDS, BudgetTrace, compute_dtype

PENALIZED = ("cmdp", "saute", "worst_case")  # the kinds that a penalty_at concerns
WITH_COEFFICIENT = ("lagrangian", "pid", "barrier")


def budget_trace(
    cost: Tensor,
    budget: float | Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    reduction: str = "sum",
    edge: str = "strict",
    per_token: bool = False,
    backend: str | None = None,
) -> BudgetTrace:
    """Cumulative cost C_t = sum_{i<=t} gamma^(i-1) c_i of each sequence against its budget d.

    A violation is absorbing: ``violated`` is True from the first token with C_t > d on, that token included. The
    excess Phi_t = (C_t - d)+ - (C_{t-1} - d)+ is what token t adds to the overrun. i counts unmasked tokens; a masked
    token costs nothing and reports the account as it stands. A NaN in the cost counts as a violation from there on.

    Args:
        cost: ``[B, T]``, or ``[N]`` packed with ``cu_seqlens``; any floating dtype, in nats for a KL. Detached.
        budget: d >= 0 (nats for a KL): one number, or a tensor ``[B]`` with one number a sequence.
        mask: bool like ``cost``, False = the token does not count (padding, prompt).
        cu_seqlens: ``[B+1]`` integers, 0 = first, N = last, not decreasing: where each packed sequence begins.
        gamma: discount of the cost, in (0, 1]; 1 for a plain sum. Not with ``reduction="mean"``.
        reduction: ``sum``, or ``mean``: the prefix mean m_t = (1/t) sum_{i<=t} c_i takes the place of C_t.
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
    offsets = check_cost(cost, mask, cu_seqlens)
    rule = check_budget_rule(gamma, reduction, edge)
    limits = sequence_limits(budget, cost, mask, offsets, per_token, compute_dtype(cost))
    chosen = backends.choose(backend, cost, "budget_trace")
    if chosen == "torch":
        check_values(offsets, limits, cost)
        return reference.budget_trace(
            cost, limits, mask=mask, cu_seqlens=cu_seqlens, gamma=gamma, reduction=reduction, edge=edge
        )
    cost = cost.detach().to(compute_dtype(cost)).contiguous()
    return BudgetTrace(*_budget_trace(cost, flat(mask, torch.bool), offsets, limits, *rule, chosen))


def modified_reward(
    task_reward: Tensor,
    cost: Tensor,
    trace: BudgetTrace,
    *,
    kind: str = "cmdp",
    penalty: float = 1.0,
    penalty_at: str | None = None,
    discrepancy_weight: float = 1.0,
    coefficient: float | None = None,
    barrier_slope: float = 10.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The modified reward of every token: the task's reward, changed by what the budget's trace says.

    With v_t = ``violated``, e_t = 1 at the crossing token (the first violation), Phi_t = ``excess``, n = ``penalty``:

    | kind           | modified reward                               | note                                      |
    | -------------- | --------------------------------------------- | ----------------------------------------- |
    | ``cmdp``       | (1-v_t) r_t - e_t n - beta Phi_t              | the method; the penalty is paid once      |
    | ``hinge``      | r_t - beta Phi_t                              | exact penalty, reward kept                |
    | ``saute``      | (1-v_t) r_t - v_t n                           | Sauté RL without its state                |
    | ``lagrangian`` | r_t - lambda c_t                              | soft relaxation, lambda fixed             |
    | ``pid``        | r_t - lambda c_t                              | lambda from `cmdp_fast.pid.PIDController` |
    | ``barrier``    | r_t + kappa [log(1-C_t/d) - log(1-C_{t-1}/d)] | while C_t < d; from then on -slope c_t    |
    | ``worst_case`` | as ``saute``                                  | for cost ``nll`` and the prefix mean      |

    Args:
        task_reward: r_t, shaped like ``cost``, usually 0 except at the last token.
        cost, trace: as given to and returned by `budget_trace`.
        kind: one of the names above.
        penalty: n >= 0.
        penalty_at: ``crossing`` pays it once, ``every`` at each violating token. Default: crossing for ``cmdp``, every
            for ``saute`` and ``worst_case``. Paid at every violating token, the penalty makes a student that starts
            over budget stop early to pay less.
        discrepancy_weight: beta >= 0, for ``cmdp`` and ``hinge``.
        coefficient: lambda (``lagrangian``, ``pid``) or kappa (``barrier``), >= 0; needed there, refused elsewhere.
        barrier_slope: the price of a unit of cost once the barrier is crossed.
        mask, cu_seqlens, backend: as in `budget_trace`. Masked tokens have reward 0.

    Returns:
        A float32 tensor (float64 for float64 cost) shaped like ``cost``; not differentiable.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or settings that do not fit.

    Source: after arXiv 2509.22921. The paper's own symbols for its discrepancy term were not available; Phi is this
    project's definition. Stooke et al. 2020 for ``pid``; arXiv 2610.00332 for ``worst_case``.
    """
    offsets = check_cost(cost, mask, cu_seqlens)
    check_like("task_reward", task_reward, "cost", cost)
    if not isinstance(trace, BudgetTrace):
        raise TypeError(f"trace must be the BudgetTrace that budget_trace returned, got {type(trace).__name__}")
    if trace.violated.dtype != torch.bool:
        raise TypeError(f"trace.violated must be bool, got {checks.describe(trace.violated)}")
    for name, field in trace._asdict().items():
        if name != "first_violation":
            check_like(f"trace.{name}", field, "cost", cost)
    rule = check_reward_rule(kind, penalty, penalty_at, discrepancy_weight, coefficient, barrier_slope)
    chosen = backends.choose(backend, cost, "modified_reward")
    if chosen == "torch":
        return reference.modified_reward(
            task_reward,
            cost,
            trace,
            kind=kind,
            penalty=penalty,
            penalty_at=penalty_at,
            discrepancy_weight=discrepancy_weight,
            coefficient=coefficient,
            barrier_slope=barrier_slope,
            mask=mask,
            cu_seqlens=cu_seqlens,
        )
    dtype = compute_dtype(cost)
    ready = [t.detach().to(dtype).contiguous() for t in (task_reward, cost, trace.cumulative, trace.remaining)]
    return _modified_reward(
        *ready,
        trace.violated.contiguous(),
        trace.excess.to(dtype).contiguous(),
        flat(mask, torch.bool),
        offsets,
        *rule,
        chosen,
    )


# --------------------------------------------------------------------------------------------------------------
# Checks


def check_layout(name: str, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Checks the layout of a per-token tensor and returns the number of sequences."""
    checks.mask(mask, value, value.shape, name)
    if cu_seqlens is None:
        if value.dim() != 2:
            raise ValueError(
                f"{name} must be [B, T], or [N] packed with cu_seqlens; got {list(value.shape)} without cu_seqlens"
            )
        return value.shape[0]
    checks.tensor("cu_seqlens", cu_seqlens)
    if value.dim() != 1:
        raise ValueError(f"{name} must be packed, [N], when cu_seqlens is given; got {list(value.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise TypeError(f"cu_seqlens must be int32 or int64 of shape [B+1], got {checks.describe(cu_seqlens)}")
    checks.same_device("cu_seqlens", cu_seqlens, name, value)
    return cu_seqlens.shape[0] - 1


def sequence_offsets(value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where each sequence begins in a per-token tensor, flattened: ``[B+1]`` int64."""
    if cu_seqlens is None:
        return torch.arange(value.shape[0] + 1, device=value.device) * value.shape[1]
    return cu_seqlens.to(torch.int64).contiguous()


def check_cost(cost: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    checks.tensor("cost", cost)
    if not cost.dtype.is_floating_point:
        raise TypeError(f"cost must be floating point, got {checks.describe(cost)}")
    check_layout("cost", cost, mask, cu_seqlens)
    return sequence_offsets(cost, cu_seqlens)


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    checks.tensor(name, value)
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {list(other.shape)}, got {list(value.shape)}")
    checks.same_device(name, value, other_name, other)


def check_budget_rule(gamma: float, reduction: str, edge: str) -> tuple[float, bool, bool]:
    checks.number("gamma", gamma)
    checks.choice("reduction", reduction, ("sum", "mean"))
    checks.choice("edge", edge, ("strict", "saute"))
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    if reduction == "mean" and gamma != 1:
        raise ValueError(f"reduction='mean' takes no discount, got gamma={gamma}; expected gamma=1")
    return float(gamma), reduction == "mean", edge == "saute"


def check_reward_rule(
    kind: str,
    penalty: float,
    penalty_at: str | None,
    discrepancy_weight: float,
    coefficient: float | None,
    barrier_slope: float,
) -> tuple[str, bool, float, float, float, float]:
    checks.choice("kind", kind, REWARDS)
    for name, value in (
        ("penalty", penalty),
        ("discrepancy_weight", discrepancy_weight),
        ("barrier_slope", barrier_slope),
        ("coefficient", 0.0 if coefficient is None else coefficient),
    ):
        checks.number(name, value)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if penalty_at is None:
        penalty_at = "crossing" if kind == "cmdp" else "every"
    elif kind not in PENALIZED:
        raise ValueError(f"kind={kind!r} has no penalty, so penalty_at={penalty_at!r} means nothing; leave it out")
    checks.choice("penalty_at", penalty_at, ("crossing", "every"))
    if (coefficient is None) == (kind in WITH_COEFFICIENT):
        expected = "needs coefficient= (lambda, or kappa for the barrier)" if coefficient is None else "has none"
        raise ValueError(f"kind={kind!r} {expected}, got coefficient={coefficient}")
    numbers = (penalty, discrepancy_weight, coefficient or 0.0, barrier_slope)
    return kind, penalty_at == "crossing", *(float(n) for n in numbers)  # type: ignore[return-value]


def check_budget(budget: float | Tensor, like: Tensor, sequences: int) -> None:
    if isinstance(budget, Tensor):
        if budget.shape not in ((), (sequences,)):
            raise ValueError(
                f"budget must be a number or have shape [{sequences}] (sequences), got {list(budget.shape)}"
            )
        checks.same_device("budget", budget, "the tokens", like)
        return
    checks.number("budget", budget)
    if not budget >= 0:
        raise ValueError(f"budget must be at least 0, got {budget}")


def sequence_limits(
    budget: float | Tensor,
    like: Tensor,
    mask: Tensor | None,
    offsets: Tensor,
    per_token: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The budget of every sequence, ``[B]`` float64, rounded to the dtype of the costs: a float32 cost of 0.3 has to
    be within a budget of 0.3."""
    count = offsets.shape[0] - 1
    check_budget(budget, like, count)
    if isinstance(budget, Tensor):
        limits = budget.detach().to(torch.float64).expand(count)
    else:
        limits = torch.full((count,), float(budget), dtype=torch.float64, device=like.device)
    if per_token:
        kept = torch.ones_like(like, dtype=torch.float64) if mask is None else mask.to(torch.float64)
        running = torch.nn.functional.pad(kept.flatten().cumsum(0), (1, 0))
        tokens = running[offsets[1:]] - running[offsets[:-1]]
        limits = torch.where(tokens > 0, limits * tokens, 0.0)
    return limits.to(dtype).to(torch.float64).contiguous()


def check_values(offsets: Tensor, limits: Tensor, like: Tensor) -> None:
    """What only the values tell; looked at on the CPU only, where it does not stall a device."""
    if like.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(like, FakeTensor):
        return
    # Lists: a tensor operation a comparison costs more than all the sequences of a batch.
    starts, amounts = offsets.tolist(), limits.tolist()
    if starts[0] != 0 or starts[-1] != like.numel() or starts != sorted(starts):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {like.numel()}, got {starts[:8]}"
            + ("..." if len(starts) > 8 else "")
        )
    for i, amount in enumerate(amounts):
        if not amount >= 0:  # NaN is not
            raise ValueError(f"budget[{i}] = {amount}; every budget must be at least 0")


# --------------------------------------------------------------------------------------------------------------
# The operators that torch sees


def room(like: Tensor, dtype: torch.dtype, count: int | None = None) -> Tensor:
    """Room for a number a token of ``like [B, T]`` or packed ``[N]``, or for ``count`` numbers, that a scan writes.

    On a GPU nobody has checked where packed sequences lie: a token of none is 0, and not what stood in memory.
    """
    make = like.new_empty if like.dim() == 2 else like.new_zeros
    return make(like.shape if count is None else count, dtype=dtype)


def empty_trace(cost: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the five fields of a `BudgetTrace`."""
    cumulative, remaining, excess = (room(cost, cost.dtype) for _ in range(3))
    return cumulative, remaining, room(cost, torch.bool), room(cost, torch.int64, sequences), excess


def _scan(cost, mask, offsets, limits, budget_rule, backend, reward_rule=None, task_reward=None, reward=None):
    check_values(offsets, limits, cost)
    trace = empty_trace(cost, offsets.shape[0] - 1)
    if backend in backends.GPU:
        rewarded = () if reward_rule is None else (reward_rule, task_reward, reward)
        backends.GPU[backend].trace_budgets(cost, mask, offsets, limits, budget_rule, trace, *rewarded)
        return trace
    backends.native.budget_trace(
        address(cost),
        cost.dtype == torch.float64,
        address(mask),
        address(offsets),
        offsets.shape[0] - 1,
        cost.numel(),
        address(limits),
        budget_rule,
        [address(t) for t in trace],
        reward_rule,
        address(task_reward),
        address(reward),
    )
    return trace


@torch.library.custom_op("cmdp_fast::budget_trace", mutates_args=())
def _budget_trace(
    cost: Tensor,
    mask: Tensor | None,
    offsets: Tensor,
    limits: Tensor,
    gamma: float,
    mean: bool,
    inclusive: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _scan(cost, mask, offsets, limits, (gamma, mean, inclusive), backend)


@_budget_trace.register_fake
def _(cost, mask, offsets, *args):
    return empty_trace(cost, offsets.shape[0] - 1)


@torch.library.custom_op("cmdp_fast::constrained_scan", mutates_args=())
def constrained_scan(
    task_reward: Tensor,
    cost: Tensor,
    mask: Tensor | None,
    offsets: Tensor,
    limits: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The trace and the modified reward in one scan; bitwise what the two operations give in turn."""
    reward = room(cost, cost.dtype)
    rule = (kind, at_crossing, penalty, discrepancy_weight, coefficient, barrier_slope)
    trace = _scan(cost, mask, offsets, limits, (gamma, mean, inclusive), backend, rule, task_reward, reward)
    return (*trace, reward)


@constrained_scan.register_fake
def _(task_reward, cost, mask, offsets, *args):
    return (*empty_trace(cost, offsets.shape[0] - 1), room(cost, cost.dtype))


@torch.library.custom_op("cmdp_fast::modified_reward", mutates_args=())
def _modified_reward(
    task_reward: Tensor,
    cost: Tensor,
    cumulative: Tensor,
    remaining: Tensor,
    violated: Tensor,
    excess: Tensor,
    mask: Tensor | None,
    offsets: Tensor,
    kind: str,
    at_crossing: bool,
    penalty: float,
    discrepancy_weight: float,
    coefficient: float,
    barrier_slope: float,
    backend: str,
) -> Tensor:
    reward = room(cost, cost.dtype)
    rule = (kind, at_crossing, penalty, discrepancy_weight, coefficient, barrier_slope)
    if backend in backends.GPU:
        trace = (cumulative, remaining, violated, excess)
        backends.GPU[backend].modify_rewards(task_reward, cost, trace, mask, offsets, rule, reward)
        return reward
    backends.native.modified_reward(
        address(task_reward),
        address(cost),
        cost.dtype == torch.float64,
        address(mask),
        address(offsets),
        offsets.shape[0] - 1,
        cost.numel(),
        [address(t) for t in (cumulative, remaining, violated, excess)],
        rule,
        address(reward),
    )
    return reward


@_modified_reward.register_fake
def _(task_reward, cost, *args):
    return room(cost, cost.dtype)

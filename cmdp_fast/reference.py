"""Every operation in plain PyTorch: the readable twin that all other backends are held against.

In float64 this file is the truth of the library. It works on any device and dtype, is differentiable by
autograd, and imports nothing of ours. Half-precision inputs are computed in float32, float64 stays float64.

For one token, over the columns v of two rows of logits x (student) and y (teacher), with p = softmax(x/tau)
and w = softmax(y/tau):

    statistic        value                       gradient with respect to x, times tau
    logprob          log p(a)                    onehot(a) - p
    teacher_logprob  log w(a)                    none
    entropy H        -sum p log p                -p (log p + H)
    teacher_entropy  -sum w log w                none
    reverse_kl R     sum p (log p - log w)       p (log p - log w - R)
    forward_kl F     sum w (log w - log p)       p - w

All values are in nats. Special values: p = 0 contributes nothing to R or H, w = 0 nothing to F; w > 0 where
p = 0 makes F = +inf; p > 0 where w = 0 makes R = +inf, and such a row passes *no* gradient
through R (its true gradient is infinite). NaN
or +inf in either row of logits (or a row that is -inf throughout) makes all six statistics of the row NaN.
Finite logits of any size make none, if a float64 holds x/tau: a log-probability or divergence that no float holds is
infinite, and entropies are exact. Kernels and states may also give +inf for a divergence of float64 logits above the
largest float64 over V.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

# The names that settings take: a type for who writes one, and from it the values that are checked.
CostName = Literal["reverse_kl", "forward_kl", "jsd", "k1", "k3", "nll"]
DivergenceName = Literal["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]
KindName = Literal["cmdp", "hinge", "saute", "lagrangian", "pid", "barrier", "worst_case"]
PenaltyAt = Literal["crossing", "every"]
Reduction = Literal["sum", "mean"]
Edge = Literal["strict", "saute"]

COSTS: tuple[CostName, ...] = get_args(CostName)
DIFFERENTIABLE_COSTS: tuple[CostName, ...] = ("reverse_kl", "forward_kl", "jsd")
DIVERGENCES: tuple[DivergenceName, ...] = get_args(DivergenceName)


class TokenStats(NamedTuple):
    """Six statistics per token, in nats, shaped like ``tokens``; float32, or float64 for float64 logits.

    ``logprob, entropy, reverse_kl, forward_kl`` are differentiable with respect to the student's logits.
    """

    logprob: Tensor
    """log p(a) of the sampled token under the student, in nats; shaped like ``tokens``, differentiable."""
    teacher_logprob: Tensor
    """log w(a) of the sampled token under the teacher, in nats; shaped like ``tokens``, detached."""
    entropy: Tensor
    """The student's entropy, -sum p log p, in nats; shaped like ``tokens``, differentiable."""
    teacher_entropy: Tensor
    """The teacher's entropy, -sum w log w, in nats; shaped like ``tokens``, detached."""
    reverse_kl: Tensor
    """KL(p‖w) of the student from the teacher, exact, in nats; shaped like ``tokens``, differentiable."""
    forward_kl: Tensor
    """KL(w‖p) of the teacher from the student, exact, in nats; shaped like ``tokens``, differentiable."""


class BudgetTrace(NamedTuple):
    """The budget's account of each token, in the units of the cost (nats for a KL). Nothing of it is differentiable.

    Shaped like the cost, ``[B, T]`` or packed ``[N]``, but for ``first_violation`` ``[B]``. Numbers are float32, or
    float64 for a float64 cost.
    """

    cumulative: Tensor
    """C_t, what has been spent up to and with token t, or the prefix mean m_t; shaped like the cost, in its units."""
    remaining: Tensor
    """d - C_t, negative once the budget is exceeded; shaped like the cost, in its units."""
    violated: Tensor
    """Whether some C_i with i <= t has exceeded d; bool, shaped like the cost. Once True it stays so."""
    first_violation: Tensor
    """The index of the first token in violation, ``[B]`` int64; the width of the row, or the length of the packed
    sequence, where there is none."""
    excess: Tensor
    """Phi_t = (C_t - d)+ - (C_{t-1} - d)+, by how much token t has raised the overrun; shaped like the cost."""


class ConstrainedReward(NamedTuple):
    """What `cmdp_fast.constrained_reward` returns: the token statistics, the budget's trace and the modified reward.

    Only ``stats`` is differentiable.
    """

    stats: TokenStats
    """Six statistics of every token, in nats; four of them differentiable."""
    trace: BudgetTrace
    """The account of the budget under the costs that follow from them; detached."""
    reward: Tensor
    """The modified reward of every token in the units of the task's; shaped like ``tokens``, float32 (float64 for
    float64 logits), detached."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: the dtype of statistics, costs and rewards."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


# --------------------------------------------------------------------------------------------------------------
# Token statistics and divergences


class _Softmax(NamedTuple):
    """The probabilities of rows of logits and their logarithms, ``[..., V]`` each, and which columns have -inf.

    The logarithm is -inf, too, where logits lie further apart than a float holds.
    """

    probability: Tensor
    log: Tensor
    excluded: Tensor


def below_the_largest(logits: Tensor, temperature: float) -> Tensor:
    """x/tau - max x/tau over the columns, to the last bit, also where x/tau is beyond what a float32 holds.

    So a tau below 1 divides in two steps, the second of which, by a power of two, rounds nothing and comes last. A
    quotient above all of float64 makes NaN of the row, as in every backend: states hold quotients in float64.
    """
    if logits.dtype == torch.float64:
        x = logits / temperature
        return x - x.detach().amax(-1, keepdim=True)
    # Of tensors: torch.compile makes a graph for each value of a number that math looks at.
    tau = torch.ones((), dtype=torch.float64, device=logits.device) * temperature
    mantissa = torch.where(tau < 1, 2 * torch.frexp(tau).mantissa, tau)
    x = logits / mantissa
    return (x - x.detach().amax(-1, keepdim=True)) / (tau / mantissa).clamp(min=torch.finfo(x.dtype).tiny)


def _softmax(logits: Tensor, width: int, temperature: float, dtype: torch.dtype) -> _Softmax:
    """Both from one sum, which PyTorch adds up pairwise.

    In float32, of 152,064 columns, `torch.log_softmax` adds in sequence on a CPU and is off by 1e-5; and exp(log p)
    has the rounding of log p, 5e-7 where all columns are alike, by which a KL of 1e4 nats is off by 5e-3.
    """
    logits = logits[..., :width].to(dtype).contiguous()  # the order of a sum hangs on strides
    # As in every backend, a quotient below all of float64 is that of an excluded column.
    excluded = torch.isneginf(logits.detach() / temperature if dtype == torch.float64 else logits.detach())
    x = below_the_largest(logits, temperature)
    weight = x.exp()
    total = weight.sum(-1, keepdim=True)
    return _Softmax(weight / total, x - total.log(), excluded)


def _expect(weight: _Softmax, value: Tensor) -> Tensor:
    """The mean of a value over the columns, with 0 * anything = 0 in value and gradient."""
    return (weight.probability * value.masked_fill(weight.probability == 0, 0.0)).sum(-1)


def _forward_kl(p: _Softmax, w: _Softmax) -> Tensor:
    """sum w (log w - log p); +inf, with the gradient p - w all the same, where only the teacher uses a column."""
    weight = w.probability
    # A weight that underflows to 0 would turn the infinite term into NaN.
    tiny = torch.finfo(weight.dtype).tiny
    weight = torch.where(p.excluded & ~torch.isneginf(w.log), weight.clamp(min=tiny), weight)
    return (weight * (w.log - p.log).masked_fill(torch.isneginf(w.log) | (weight == 0), 0.0)).sum(-1)


def _reverse_kl(p: _Softmax, w: _Softmax) -> Tensor:
    """sum p (log p - log w); +inf, without a gradient, where the teacher excludes a column that the student uses.

    Those columns are taken out *before* the arithmetic: autograd would meet inf - inf in them.
    """
    unbounded = torch.isneginf(w.log) & ~torch.isneginf(p.log) & (w.excluded | (p.probability != 0))
    finite = _expect(p, (p.log - w.log).masked_fill(unbounded, 0.0))
    return torch.where(unbounded.any(-1), torch.full_like(finite, torch.inf), finite)


def _poison(value: Tensor, *models: _Softmax) -> Tensor:
    """NaN, in value and gradient, in the rows where any of the log-probabilities is NaN."""
    bad = torch.stack([torch.isnan(model.log).any(-1) for model in models]).any(0)
    return value * torch.ones_like(value).masked_fill(bad, torch.nan)


def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TokenStats:
    """The six statistics of every token by the formulas in the module's docstring.

    Arguments and returns as `cmdp_fast.token_stats`; the teacher receives no gradient.
    """
    width = student_logits.shape[-1] if vocab_size is None else vocab_size
    dtype = compute_dtype(student_logits, teacher_logits)
    if mask is not None:  # a masked row is not read: compute the others and put them back among zeros
        kept = token_stats(
            student_logits[mask], teacher_logits[mask], tokens[mask], temperature=temperature, vocab_size=width
        )
        zero = torch.zeros(tokens.shape, dtype=dtype, device=student_logits.device)
        return TokenStats(*(zero.masked_scatter(mask, value) for value in kept))

    p = _softmax(student_logits, width, temperature, dtype)
    w = _softmax(teacher_logits.detach(), width, temperature, dtype)
    index = tokens.long().unsqueeze(-1)
    stats = TokenStats(
        logprob=p.log.gather(-1, index).squeeze(-1),
        teacher_logprob=w.log.gather(-1, index).squeeze(-1),
        entropy=_expect(p, -p.log),
        teacher_entropy=_expect(w, -w.log),
        reverse_kl=_reverse_kl(p, w),
        forward_kl=_forward_kl(p, w),
    )
    return TokenStats(*(_poison(value, p, w) for value in stats))


def linear_token_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    tokens: Tensor,
    **settings: Any,
) -> TokenStats:
    """`token_stats` of logits that are made in full; arguments and returns as `cmdp_fast.linear_token_stats`."""
    student, settings = _project("student", student_hidden, student_weight, settings)
    teacher, settings = _project("teacher", teacher_hidden, teacher_weight, settings)
    return token_stats(student, teacher, tokens, **settings)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    kind: DivergenceName = "jsd",
    **settings: Any,
) -> Tensor:
    """`divergence` of logits that are made in full; arguments and returns as `cmdp_fast.linear_divergence`."""
    student, settings = _project("student", student_hidden, student_weight, settings)
    teacher, settings = _project("teacher", teacher_hidden, teacher_weight, settings)
    return divergence(student, teacher, kind, **settings)


def _project(model: str, hidden: Tensor, weight: Tensor, settings: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A model's logits by the settings of its head, ``student_bias`` and so on, and the settings that are left."""
    left = dict(settings)
    bias, softcap = left.pop(f"{model}_bias", None), left.pop(f"{model}_softcap", None)
    logits = left.pop(f"{model}_scale", 1.0) * torch.nn.functional.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap), left


def divergence_weights(kind: str, beta: float) -> tuple[float, float, float]:
    """(b, c_teacher, c_student): the divergence is c_teacher KL(w‖M) + c_student KL(p‖M), M = (1-b) p + b w."""
    if kind == "jsd":
        return beta, beta, 1.0 - beta
    if kind == "skew_forward_kl":  # KL(w ‖ beta w + (1-beta) p)
        return beta, 1.0, 0.0
    if kind == "skew_reverse_kl":  # KL(p ‖ beta p + (1-beta) w)
        return 1.0 - beta, 0.0, 1.0
    raise ValueError(f"kind={kind!r} is not a divergence with a mixture")


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: DivergenceName = "jsd",
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """A divergence between the two rows of each token; arguments and returns as `cmdp_fast.divergence`."""
    width = student_logits.shape[-1] if vocab_size is None else vocab_size
    dtype = compute_dtype(student_logits, teacher_logits)
    if mask is not None:
        kept = divergence(
            student_logits[mask],
            teacher_logits[mask],
            kind,
            beta=beta,
            temperature=temperature,
            vocab_size=width,
        )
        zero = torch.zeros(mask.shape, dtype=dtype, device=student_logits.device)
        return zero.masked_scatter(mask, kept)
    p = _softmax(student_logits, width, temperature, dtype)
    w = _softmax(teacher_logits.detach(), width, temperature, dtype)
    if kind == "reverse_kl":
        value = _reverse_kl(p, w)
    elif kind == "forward_kl":
        value = _forward_kl(p, w)
    else:
        b, c_teacher, c_student = divergence_weights(kind, beta)
        # A column that neither model may use is taken out of the mixture, whose gradient there is 0/0.
        unused = torch.isneginf(p.log) & torch.isneginf(w.log)
        # Logarithms of tensors: torch.compile makes a graph for each value of a number that math looks at.
        one = torch.ones((), dtype=torch.float64, device=p.log.device)
        log_share, log_rest = torch.log(one * b), torch.log1p(one * -b)
        log_m = torch.logaddexp(
            (p.log + log_rest).masked_fill(unused, 0.0), (w.log + log_share).masked_fill(unused, 0.0)
        )
        value = c_teacher * _expect(w, w.log - log_m) + c_student * _expect(p, p.log - log_m)
    return _poison(value, p, w)


def token_cost(stats: TokenStats, kind: CostName, clamp: float | None = None) -> Tensor:
    """The cost c_t of each token from its statistics; ``k1, k3, nll`` depend on the action and are detached.

    With rho = logprob - teacher_logprob: k1 = rho, k3 = exp(-rho) - 1 + rho, nll = -teacher_logprob. ``clamp`` bounds
    its size.
    """
    if clamp is not None:
        return token_cost(stats, kind).clamp(-clamp, clamp)
    if kind in ("reverse_kl", "forward_kl"):
        return stats.reverse_kl if kind == "reverse_kl" else stats.forward_kl
    rho = (stats.logprob - stats.teacher_logprob).detach()
    if kind == "k1":
        return rho
    if kind == "k3":
        # Of a token that the student excludes and the teacher does not it is infinite, which inf - inf does not say.
        return (torch.expm1(-rho) + rho).masked_fill(torch.isneginf(rho), torch.inf)
    if kind == "nll":
        return -stats.teacher_logprob
    raise ValueError(f"cost={kind!r} cannot be computed from token statistics")


# --------------------------------------------------------------------------------------------------------------
# Budget and modified rewards


def _padded_view(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Index [B, T] of each packed token in a padded layout, and which entries of it are real."""
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    width = int((end - start).max()) if len(start) else 0
    index = start[:, None] + torch.arange(width, device=cu_seqlens.device)
    real = index < end[:, None]
    return index.clamp(max=max(total - 1, 0)), real


def _previous(x: Tensor, first: float | bool = 0) -> Tensor:
    return torch.cat([torch.full_like(x[..., :1], first), x[..., :-1]], dim=-1)


def budget_trace(
    cost: Tensor,
    budget: float | Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    reduction: Reduction = "sum",
    edge: Edge = "strict",
    per_token: bool = False,
) -> BudgetTrace:
    """Cumulative cost against the budget; arguments and returns as `cmdp_fast.budget_trace`. Sums in float64."""
    dtype = compute_dtype(cost)
    if cu_seqlens is not None:
        index, real = _padded_view(cu_seqlens, cost.shape[0])
        inner = real if mask is None else real & mask[index]
        padded = budget_trace(
            torch.where(real, cost[index], 0.0) if cost.numel() else cost.new_zeros(real.shape),
            budget,
            mask=inner,
            gamma=gamma,
            reduction=reduction,
            edge=edge,
            per_token=per_token,
        )
        length = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        return BudgetTrace(
            padded.cumulative[real],
            padded.remaining[real],
            padded.violated[real],
            torch.minimum(padded.first_violation, length),
            padded.excess[real],
        )
    keep = torch.ones_like(cost, dtype=torch.bool) if mask is None else mask
    wide = torch.where(keep, cost.detach().double(), 0.0)
    count = keep.long().cumsum(-1)
    limit = torch.as_tensor(budget, dtype=torch.float64, device=cost.device).expand(cost.shape[:1])[:, None]
    limit = limit.to(dtype).double()  # as the costs are rounded: a cost of 0.3 is within a budget of 0.3
    if per_token:  # and the sum of so many such costs, which is not rounded, within as many such budgets
        tokens = keep.sum(-1, keepdim=True)
        limit = torch.where(tokens > 0, limit * tokens, 0.0)
    if reduction == "mean":
        cumulative = wide.cumsum(-1) / count.clamp(min=1)
    else:
        discount = torch.pow(torch.tensor(gamma, dtype=torch.float64), count - 1)  # which is not 0 where it underflows
        cumulative = torch.where(wide.isinf(), wide, wide * discount).cumsum(-1)
    # An infinite budget is none: nothing is over it, and all of it remains, even of an infinite sum.
    bounded = (limit != torch.inf) | cumulative.isnan()
    over = bounded & (cumulative > limit if edge == "strict" else cumulative >= limit)
    # A NaN cannot be compared with the budget: it counts as a violation.
    violated = ((over | cumulative.isnan()) & keep).long().cumsum(-1) > 0
    width = cost.shape[-1]
    first = width - violated.long().sum(-1)  # a violation is absorbing
    remaining = torch.where(bounded, limit - cumulative, limit)
    overrun = torch.where(bounded, cumulative - limit, 0.0).clamp(min=0.0)
    before = _previous(overrun)
    # Once the overrun is infinite nothing adds to it; a masked token adds nothing either.
    excess = torch.where(before.isinf() | ~keep, 0.0, overrun - before)
    return BudgetTrace(
        cumulative.to(dtype),
        remaining.to(dtype),
        violated,
        first,
        excess.to(dtype),
    )


def _of_the_token_before(x: Tensor, keep: Tensor, first: Tensor) -> Tensor:
    """x at the last unmasked token before each; ``first`` where there is none. A masked token's entry may be any."""
    last = torch.where(keep, torch.arange(x.shape[-1], device=x.device), -1).cummax(-1).values
    before = _previous(last, -1)
    return torch.where(before >= 0, x.gather(-1, before.clamp(min=0)), first)


def _weighed(weight: float, amount: Tensor) -> Tensor:
    """An amount as often as its weight says: 0 of it is nothing, even where it is infinite."""
    return weight * amount if weight else torch.zeros_like(amount)


def modified_reward(
    task_reward: Tensor,
    cost: Tensor,
    trace: BudgetTrace,
    *,
    kind: KindName = "cmdp",
    penalty: float = 1.0,
    penalty_at: PenaltyAt | None = None,
    discrepancy_weight: float = 1.0,
    coefficient: float | None = None,
    barrier_slope: float = 10.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The modified reward of every token; arguments and returns as `cmdp_fast.modified_reward`."""
    dtype = compute_dtype(cost)
    if cu_seqlens is not None:
        index, real = _padded_view(cu_seqlens, cost.shape[0])
        inner = real if mask is None else real & mask[index]
        if cost.numel() == 0:
            return task_reward.new_zeros(cost.shape, dtype=dtype)
        padded = modified_reward(
            task_reward[index],
            cost[index],
            BudgetTrace(*(t if t is trace.first_violation else t[index] for t in trace)),
            kind=kind,
            penalty=penalty,
            penalty_at=penalty_at,
            discrepancy_weight=discrepancy_weight,
            coefficient=coefficient,
            barrier_slope=barrier_slope,
            mask=inner,
        )
        return padded[real]
    keep = torch.ones_like(cost, dtype=torch.bool) if mask is None else mask
    reward = torch.where(keep, task_reward.detach().to(dtype).double(), 0.0)
    paid = torch.where(keep, cost.detach().double(), 0.0)
    excess = trace.excess.double()
    violated = trace.violated & keep
    crossing = violated & ~_of_the_token_before(trace.violated, keep, keep.new_zeros(()))
    if penalty_at is None:
        penalty_at = "crossing" if kind == "cmdp" else "every"
    charged = (crossing if penalty_at == "crossing" else violated).double()  # a number times a bool is float32
    charge = _weighed(discrepancy_weight, excess) + _weighed(float(coefficient or 0.0), paid)
    if kind == "cmdp":
        value = torch.where(violated, 0.0, reward) - penalty * charged - charge
    elif kind == "hinge":
        value = reward - charge
    elif kind in ("saute", "worst_case"):
        value = torch.where(violated, 0.0, reward) - penalty * charged
    elif kind in ("lagrangian", "pid"):
        value = reward - _weighed(float(coefficient or 0.0), paid)
    else:  # barrier: log(1 - C_t/d) - log(1 - C_{t-1}/d) = log(remaining_t / remaining_{t-1}); remaining_0 = d
        remaining = trace.remaining.double()
        before = _of_the_token_before(remaining, keep, remaining + trace.cumulative.double())
        inside = ((remaining > 0) | ~keep).long().cumprod(-1) > 0
        step = torch.log(torch.where(inside & remaining.isfinite(), remaining / before, 1.0))
        value = torch.where(inside, reward + _weighed(coefficient or 0.0, step), -_weighed(barrier_slope, paid))
    return torch.where(keep, value, 0.0).to(dtype)

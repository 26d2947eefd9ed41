"""The backend of plain PyTorch: the same functions as `cmdp_fast.cpu`, for any device and without kernels of ours.

It has no statistics of whole rows: there `token_stats`, and `divergence` for its mixtures, call `cmdp_fast.reference`,
whose formulas PyTorch differentiates itself. Here is what has to be given a piece at a time or written to memory that
exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmdp_fast import reference, states, tails
from cmdp_fast.layout import (
    SAVED,
    Account,
    BudgetRule,
    ListedRows,
    Mixture,
    Pair,
    Rewarding,
    TailGradient,
    TokenTrace,
    Upstream,
)
from cmdp_fast.reference import BudgetTrace, compute_dtype
from cmdp_fast.tails import TailState

COSTS: tuple[str, ...] = ()  # there is no pass that does everything
AT_ONCE = 2**22  # columns of a mixture in float64, a dozen tensors of which exist at once: 400 MB


def update_states(pair: Pair, first_column: int, fields: Tensor) -> None:
    """Folds columns [first_column, first_column + width) into ``fields [rows, 13]``, in place."""
    x, y = (t[..., : pair.width].reshape(len(fields), pair.width) for t in (pair.student, pair.teacher))
    assert pair.tokens is not None
    column = pair.tokens.flatten().long() - first_column
    counted = slice(None) if pair.mask is None else pair.mask.flatten()
    tile = folded(x[counted], y[counted], column[counted], pair.temperature)
    fields[counted] = states.merged(fields[counted], tile)


def folded(student: Tensor, teacher: Tensor, column: Tensor, temperature: float) -> Tensor:
    """The states of one tile ``[rows, C]``; ``column`` is the token's, counted from the tile's first."""
    x, y = student.double() / temperature, teacher.double() / temperature
    width = x.shape[-1]
    has_x, has_y = ~torch.isneginf(x), ~torch.isneginf(y)
    m, n = x.amax(-1), y.amax(-1)
    m, n = torch.where(m.isneginf(), 0.0, m), torch.where(n.isneginf(), 0.0, n)
    t, s = x - m[:, None], y - n[:, None]
    p, w = t.exp(), s.exp()
    difference = (t - s).masked_fill(~(has_x & has_y), 0.0)
    z, u = p.sum(-1), w.sum(-1)
    own = (column >= 0) & (column < width)
    index = column.clamp(0, width - 1)[:, None]
    fields = {
        "m": torch.where(z == 0, -torch.inf, m),
        "n": torch.where(u == 0, -torch.inf, n),
        "z": z,
        "u": u,
        # A difference may be infinite, or of two infinities: 0 * anything = 0.
        "a": (p * difference).where(p != 0, 0.0).sum(-1),
        "b": (w * -difference).where(w != 0, 0.0).sum(-1),
        "h": (p * t).where(p != 0, 0.0).sum(-1),
        "k": (w * s).where(w != 0, 0.0).sum(-1),
        "xa": torch.where(own, x.gather(1, index)[:, 0], -torch.inf),
        "ya": torch.where(own, y.gather(1, index)[:, 0], -torch.inf),
        "r_inf": (has_x & ~has_y).any(-1).double(),
        "f_inf": (has_y & ~has_x).any(-1).double(),
        "exact": torch.ones_like(z),
    }
    return torch.stack([fields[name] for name in states.FIELDS], dim=-1)


def token_stats_backward(pair: Pair, saved: Tensor, upstream: Upstream, out: Tensor, first_column: int = 0) -> None:
    """Writes the gradient of the student's logits to ``out``, which may be the logits; columns beyond the width get 0.

    d/d(student) of sum of upstream times statistics: the table of gradients stands in cmdp_fast/reference.py.
    """
    out[..., : pair.width] = _gradient(pair, saved, upstream, first_column)
    out[..., pair.width :] = 0


def _gradient(pair: Pair, saved: Tensor, upstream: Upstream, first_column: int) -> Tensor:
    m, n, log_z, log_u, entropy, reverse, _ = saved.unsqueeze(-2).unbind(-1)
    g = Upstream(*(None if t is None else t.double().unsqueeze(-1) for t in upstream))
    student, teacher = pair.student[..., : pair.width], pair.teacher[..., : pair.width]
    log_p = (student.double() / pair.temperature - m) - log_z
    log_w = (teacher.double() / pair.temperature - n) - log_u
    p = log_p.exp()
    used = p != 0  # true of a NaN
    total = torch.zeros_like(p)
    if g.logprob is not None:
        assert pair.tokens is not None
        columns = torch.arange(pair.width, device=student.device)
        own = (pair.tokens.long() - first_column).unsqueeze(-1) == columns
        total += g.logprob * (own.double() - p)
    if g.entropy is not None:
        total -= g.entropy * (p * (log_p + entropy)).where(used, 0.0)
    if g.reverse_kl is not None:
        # Where R is infinite so is its gradient, which would poison the step: it passes none.
        finite = used & ~torch.isposinf(reverse)
        total += g.reverse_kl * (p * (log_p - log_w - reverse)).where(finite, 0.0)
    if g.forward_kl is not None:
        total += g.forward_kl * (p - log_w.exp())
    total /= pair.temperature
    return total if pair.mask is None else total.where(pair.mask.unsqueeze(-1), 0.0)


def mixture(pair: Pair, weights: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence ``[rows]``, the saved scalars ``[rows, SAVED]`` and the mean of G ``[rows]``, both float64.

    Of rows ``[rows, V]`` without a mask. Formulas and G are those of csrc/cpu/mixture.h.
    """
    rows = len(pair.student)
    saved, value, mean = (pair.student.new_empty((rows, *n), dtype=torch.float64) for n in ((SAVED,), (), ()))
    for some in _rows_at_once(pair):
        x, y = (t[some, : pair.width] for t in (pair.student, pair.teacher))
        fields = folded(x, y, torch.zeros(len(x), dtype=torch.long, device=x.device), pair.temperature)
        saved[some] = states.saved_scalars(fields, states.statistics(fields))
        terms, p, slope = _mixture_columns(pair, some, saved, weights)
        value[some], mean[some] = terms.sum(-1).clamp(min=0), (p * slope).sum(-1)
    return value.to(compute_dtype(pair.student, pair.teacher)), saved, mean


def mixture_backward(pair: Pair, saved: Tensor, mean: Tensor, upstream: Tensor, weights: Mixture, out: Tensor) -> None:
    """Writes its gradient, p (G - mean) / temperature, to ``out``, which may be the logits; columns beyond the width
    get 0."""
    for some in _rows_at_once(pair):
        _, p, slope = _mixture_columns(pair, some, saved, weights)
        factor = upstream[some].double() / pair.temperature
        out[some, : pair.width] = factor[:, None] * p * (slope - mean[some, None])
    out[:, pair.width :] = 0


def _rows_at_once(pair: Pair) -> list[slice]:
    return _pieces(len(pair.student), pair.width)


def _pieces(rows: int, width: int) -> list[slice]:
    size = max(1, AT_ONCE // width)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _mixture_columns(pair: Pair, rows: slice, saved: Tensor, weights: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """Of each column of some rows its part of the value, its probability p, and G."""
    b, c_teacher, c_student = weights
    m, n, log_z, log_u, *_ = saved[rows].unsqueeze(-2).unbind(-1)
    log_p = (pair.student[rows, : pair.width].double() / pair.temperature - m) - log_z
    log_w = (pair.teacher[rows, : pair.width].double() / pair.temperature - n) - log_u
    p, w = log_p.exp(), log_w.exp()
    # 700 nats away one model has no weight in the column.
    delta = (log_w - log_p).masked_fill((p == 0) & (w == 0), 0.0).clamp(-700.0, 700.0)
    ahead, distance = delta > 0, delta.abs()
    rho, of_teacher = (-distance).exp(), torch.full_like(delta, b)
    share, unit = torch.where(ahead, 1 - of_teacher, of_teacher), torch.where(ahead, of_teacher, 1 - of_teacher)
    v, g = -share * torch.expm1(-distance), share * rho + unit
    log_g = torch.where(v < 0.25, torch.log1p(-v), g.log())
    to_student, to_teacher = log_g + delta.clamp(min=0), log_g - delta.clamp(max=0)
    shares = torch.where(ahead, c_student * rho + c_teacher, c_student + c_teacher * rho)
    value = -(p * c_student * to_student + w * c_teacher * to_teacher)
    return value, p, -c_student * to_student - (1 - b) * shares / g


def update_tails(rows: ListedRows, first_column: int, state: TailState) -> None:
    """Folds columns [first_column, first_column + width) of the rows into their states, in place."""
    x, ids, tokens = _flat_rows(rows)
    counted = torch.ones_like(tokens, dtype=torch.bool) if rows.mask is None else rows.mask.flatten()
    for some in _pieces(len(x), rows.width):
        t = x[some].double() / rows.temperature
        here, listed = _listed(ids[some], first_column, t)
        there = counted[some, None] & listed
        state.listed[some] = torch.where(there, t.gather(1, here), state.listed[some])
        own = tokens[some] - first_column
        logit = t.gather(1, own.clamp(0, rows.width - 1)[:, None])[:, 0]
        passed = counted[some] & (own >= 0) & (own < rows.width)
        state.own[some] = torch.where(passed, logit, state.own[some])
        outside = _outside(here, listed, t)
        folded = tails.merged(state.fields[some], _tail(t, outside))
        state.fields[some] = torch.where(counted[some, None], folded, state.fields[some])


def _tail(x: Tensor, outside: Tensor) -> Tensor:
    """The fields ``[rows, 4]`` of the columns that are ``outside`` of the list."""
    others = x.masked_fill(~outside, -torch.inf)
    m = others.amax(-1)
    m = torch.where(m.isneginf(), 0.0, m)
    t = others - m[:, None]
    weight = t.exp()
    z, h = weight.sum(-1), (weight * t).where(weight != 0, 0.0).sum(-1)
    low = x.masked_fill(~outside, torch.inf).amin(-1)
    return torch.stack([torch.where(z == 0, -torch.inf, m), z, h, low], -1)


def tail_backward(rows: ListedRows, gradient: TailGradient, out: Tensor, first_column: int = 0) -> None:
    """Writes the gradient of the student's logits to ``out``, which may be the logits; columns beyond the width and
    masked rows get 0, and so does a row whose numbers in ``gradient`` are all 0, whatever its logits are."""
    x, ids, tokens = _flat_rows(rows)
    per_row = torch.stack([gradient.constant, gradient.slope, gradient.own], -1)
    unread = (per_row == 0).all(-1) & (gradient.listed == 0).all(-1)
    if rows.mask is not None:
        unread |= ~rows.mask.flatten()
    to = out.view(len(x), out.shape[-1])
    columns = torch.arange(rows.width, device=x.device) + first_column
    for some in _pieces(len(x), rows.width):
        t = x[some].double() / rows.temperature
        log_p = (t - gradient.reference[some, None]) - gradient.log_mass[some, None]
        p = log_p.exp()
        weightless = (p == 0) | gradient.log_mass[some, None].isneginf()
        value = p * (gradient.constant[some, None] + gradient.slope[some, None] * log_p)
        value = value.masked_fill(weightless, 0.0) + torch.where(
            columns == tokens[some, None], gradient.own[some, None], 0.0
        )
        here, listed = _listed(ids[some], first_column, t)
        index = torch.where(listed, here, rows.width)
        value = torch.cat([value, value[:, :1]], -1).scatter(1, index, gradient.listed[some])[:, : rows.width]
        to[some, : rows.width] = value.masked_fill(unread[some, None], 0.0).to(out.dtype)
    to[:, rows.width :] = 0


def _flat_rows(rows: ListedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[rows, width]``, ids ``[rows, k]`` and tokens ``[rows]``."""
    tokens = rows.tokens.flatten().long()
    x = rows.student[..., : rows.width].reshape(len(tokens), rows.width)
    return x, rows.ids.reshape(len(tokens), rows.ids.shape[-1]), tokens


def _listed(ids: Tensor, first_column: int, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Where the listed columns lie in a tile, and which of them do."""
    column = ids - first_column
    return column.clamp(0, tile.shape[-1] - 1), (ids >= 0) & (column >= 0) & (column < tile.shape[-1])


def _outside(here: Tensor, listed: Tensor, tile: Tensor) -> Tensor:
    """Which columns of a tile are not listed."""
    outside = torch.ones(len(tile), tile.shape[-1] + 1, dtype=torch.bool, device=tile.device)
    outside.scatter_(1, torch.where(listed, here, tile.shape[-1]), False)
    return outside[:, :-1]


def trace_budgets(
    account: Account, limits: Tensor, rule: BudgetRule, trace: BudgetTrace, rewarding: Rewarding | None = None
) -> None:
    """Writes the trace of costs against the limits ``[B]``, and the modified reward if there is one."""
    made = reference.budget_trace(
        account.cost.double(),  # the limits are rounded already, as they have to be
        limits,
        mask=account.mask,
        cu_seqlens=_packed(account),
        gamma=rule.gamma,
        reduction="mean" if rule.mean else "sum",
        edge="saute" if rule.inclusive else "strict",
    )
    for to, value in zip(trace, made, strict=True):
        to.copy_(value)
    if rewarding is not None:
        modify_rewards(account, TokenTrace(trace.cumulative, trace.remaining, trace.violated, trace.excess), rewarding)


def modify_rewards(account: Account, trace: TokenTrace, rewarding: Rewarding) -> None:
    """Writes the modified reward of every token."""
    rule = rewarding.rule
    value = reference.modified_reward(
        rewarding.task_reward,
        account.cost,
        BudgetTrace(trace.cumulative, trace.remaining, trace.violated, account.offsets, trace.excess),
        kind=rule.kind,
        penalty=rule.penalty,
        penalty_at="crossing" if rule.at_crossing else "every",
        discrepancy_weight=rule.discrepancy_weight,
        coefficient=rule.coefficient,
        barrier_slope=rule.barrier_slope,
        mask=account.mask,
        cu_seqlens=_packed(account),
    )
    rewarding.reward.copy_(value)


def _packed(account: Account) -> Tensor | None:
    return account.offsets if account.cost.dim() == 1 else None

"""The whole method from hidden states and heads: no logits, statistics by the tile, one small scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from cmdp_fast import checks
from cmdp_fast.constraint import Constraint, ConstraintSettings, constraint_of
from cmdp_fast.heads import Head
from cmdp_fast.layout import Account, flat
from cmdp_fast.ops import backends
from cmdp_fast.ops.budget import settle
from cmdp_fast.ops.cost import token_cost
from cmdp_fast.ops.divergence import plain_kl
from cmdp_fast.ops.linear import LinearSettings, linear_token_stats
from cmdp_fast.ops.linear_divergence import SERVES_SHARDS, check_whole, linear_divergence
from cmdp_fast.ops.projection import HeadSettings, head_given
from cmdp_fast.ops.sequences import check_completions, check_values, sequence_limits, sequence_offsets
from cmdp_fast.reference import ConstrainedReward, compute_dtype


class LinearConstrainedSettings(ConstraintSettings, LinearSettings, total=False):
    """The fields of a `Constraint` and the settings of `linear_token_stats`, as keywords."""


def linear_constrained_reward(
    student_hidden: Tensor,
    student_weight: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | Head,
    tokens: Tensor,
    task_reward: Tensor,
    budget: float | Tensor | None = None,
    *,
    constraint: Constraint | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: backends.BackendName | None = None,
    **settings: Unpack[LinearConstrainedSettings],
) -> ConstrainedReward:
    """`constrained_reward` from hidden states and language-model heads, without the logits.

    Args:
        student_hidden, teacher_hidden: ``[B, T, H]``, or ``[N, H]`` packed with ``cu_seqlens``.
        tokens, task_reward, mask: ``[B, T]`` or ``[N]``.
        budget: d >= 0 in the units of the cost, a number or ``[B]``.
        constraint: a `Constraint`, in place of the budget and of the keywords of its fields.
        cost: as `constrained_reward`. ``jsd`` (with ``beta`` between 0 and 1) is that of `linear_divergence`, which
            makes both models' logits once more and takes whole heads alone: no process_group, no DTensor.
        student_weight, teacher_weight: a `Head`, from `head_of`, or ``[V, H]``, its weight alone.
        student_bias, teacher_bias, student_softcap, teacher_softcap: as `linear_token_stats`.
        student_scale, teacher_scale, temperature, vocab_size, process_group, first_column: as `linear_token_stats`.
        reduce_hidden_grad, saved, backend: as `linear_token_stats`.
        Everything else: as `constrained_reward`.

    Returns:
        `ConstrainedReward(stats, trace, reward)`. ``stats`` is differentiable as in `linear_token_stats`; trace and
        reward are not. The direct gradient of the cost ``jsd`` is that of `linear_divergence`.

    Warns:
        UserWarning: as `constrained_reward`.

    Raises:
        TypeError, ValueError: as `constrained_reward` and `linear_token_stats`, before any work is done.

    Source: after arXiv 2509.22921; the discrepancy term Phi is this project's definition (`modified_reward`).
    """
    linear: Any = {name: value for name, value in settings.items() if name in LinearSettings.__annotations__}
    terms = {name: value for name, value in settings.items() if name not in linear}
    held = constraint_of("linear_constrained_reward", constraint, terms, budget=budget)
    held.warn_of_a_penalty_without_gradient(stacklevel=2)
    check_completions(tokens, task_reward, held, mask, cu_seqlens)
    models = {
        "student_hidden": student_hidden,
        "student_weight": student_weight.weight if isinstance(student_weight, Head) else student_weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight.weight if isinstance(teacher_weight, Head) else teacher_weight,
    }
    for name, value in models.items():
        checks.tensor(name, value)
    cost = held.cost if held.cost != "jsd" else plain_kl("jsd", held.beta) or "jsd"
    if cost == "jsd":
        _check_jsd(student_weight, teacher_weight, linear)
    offsets = sequence_offsets(tokens, cu_seqlens)
    dtype = compute_dtype(*models.values())
    limits = sequence_limits(held.budget, held.per_token, tokens, mask, offsets, dtype)
    check_values(offsets, limits, tokens)
    stats = linear_token_stats(
        student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, mask=mask, backend=backend, **linear
    )
    if cost == "jsd":
        with torch.no_grad():
            paid = linear_divergence(
                student_hidden,
                student_weight,
                teacher_hidden,
                teacher_weight,
                beta=held.beta,
                mask=mask,
                backend=backend,
                **{name: value for name, value in linear.items() if name in _OF_DIVERGENCE},
            )
    else:
        paid = token_cost(stats, cost, clamp=held.cost_clamp)
    account = Account(paid, flat(mask, torch.bool), offsets)
    chosen = backends.choose(backend, tokens, "budget_trace")
    return ConstrainedReward(stats, *settle(held, account, limits, task_reward, chosen))


_OF_DIVERGENCE = (*HeadSettings.__annotations__, "temperature", "vocab_size")


def _check_jsd(student_weight: Tensor | Head, teacher_weight: Tensor | Head, linear: dict[str, Any]) -> None:
    """Raises for what a mixture does not take, before the statistics are computed."""
    name = "linear_constrained_reward(cost='jsd')"
    if linear.get("process_group") is not None:
        raise ValueError(f"{name} takes whole heads and no process_group; {SERVES_SHARDS}")
    check_whole(name, head_given("student", student_weight, linear), head_given("teacher", teacher_weight, linear))

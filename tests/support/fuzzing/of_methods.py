"""Cases of the whole method in one call, and of a token's cost: bitwise what its parts give in turn."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from helpers import DIFFERENTIABLE
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import reference
from fuzzing.case import Case, Tensors, drawn_threads, drawn_upstream
from fuzzing.draws import Draw
from fuzzing.layouts import place
from fuzzing.of_budgets import Completions
from fuzzing.of_logits import PER_TOKEN, Rows, gradient_size

STATS = reference.TokenStats._fields


def token_cost(draw: Draw) -> Case:
    shape = draw.choice("rows", ((), (3,), (2, 4), (0,)))
    dtype = draw.choice("stats dtype", (torch.float32, torch.float64))
    kind = draw.choice("cost of stats", ("reverse_kl", "forward_kl", "k1", "k3", "nll"))
    clamp = draw.choice("clamp", (None, 0.5, 10.0)) if kind in ("k1", "k3", "nll") else None
    given = {}
    for name in STATS:
        values = draw.normal(*shape, scale=4.0).abs() * (-1 if name.endswith("logprob") else 1)
        if draw.chance("an infinite statistic", 0.1):
            values = torch.where(draw.mostly(0.3, *shape), values.sign() * torch.inf, values)
        given[name] = place(draw, values.to(dtype), "statistics", PER_TOKEN)

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        return {"cost": cf.token_cost(cf.TokenStats(**tensors), kind, clamp=clamp)}

    def truth(tensors: Tensors) -> Tensors:
        rho = tensors["logprob"] - tensors["teacher_logprob"]
        k3 = torch.where(rho == -torch.inf, torch.inf, (-rho).exp() - 1 + rho)  # of a token that only the teacher has
        values = {"k1": rho, "k3": k3, "nll": -tensors["teacher_logprob"]}
        value = values[kind] if kind in values else tensors[kind]
        return {"cost": value if clamp is None else value.clamp(-clamp, clamp)}

    differentiable = kind in ("reverse_kl", "forward_kl")
    upstream = drawn_upstream(draw, ("cost",), shape, dtype) if differentiable else {}
    settings = {"kind": kind, "clamp": clamp}
    return Case(
        "token_cost", call, given, settings, truth, computed=dtype, widened=STATS, layout_matters=differentiable,
        leaves=(kind,) if differentiable else (), upstream=upstream, threads=drawn_threads(draw),
    )  # fmt: skip


def method_settings(draw: Draw, completions: Completions) -> dict[str, Any]:
    """The keywords of a constraint."""
    settings = completions.account() | completions.rewarding()
    if settings["kind"] == "worst_case":
        return settings | {"gamma": 1.0, "reduction": "mean"}
    settings["cost"] = draw.choice("cost", reference.COSTS)
    if settings["cost"] == "jsd":
        settings["beta"] = draw.choice("beta of the cost", (0.5, 0.2, 0.0, 1.0))
    elif settings["cost"] in ("k1", "k3", "nll"):
        settings["cost_clamp"] = draw.choice("cost_clamp", (None, 1.0))
    return settings


def in_turn(
    stats: Any, jsd: Any, tensors: Tensors, settings: dict[str, Any], backend: str
) -> tuple[reference.BudgetTrace, Tensor]:
    """Trace and reward by the operations that a method is made of."""
    cost = settings.get("cost", "nll")
    paid = jsd() if cost == "jsd" else cf.token_cost(stats, cost, clamp=settings.get("cost_clamp"))
    paid = paid.detach()
    layout = {name: tensors[name] for name in ("mask", "cu_seqlens") if name in tensors}
    account = {name: settings[name] for name in ("edge", "gamma", "reduction", "per_token") if name in settings}
    budget = tensors["budget"] if "budget" in tensors else settings["budget"]
    trace = cf.budget_trace(paid, budget, **account, **layout, backend=backend)
    names = ("kind", "penalty", "penalty_at", "discrepancy_weight", "coefficient", "barrier_slope")
    reward = {name: settings[name] for name in names if name in settings}
    return trace, cf.modified_reward(tensors["task_reward"], paid, trace, **reward, **layout, backend=backend)


def named(made: reference.ConstrainedReward) -> Tensors:
    return {**made.stats._asdict(), **made.trace._asdict(), "reward": made.reward}


def silently(call: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "kind='saute'")
        return call()


def assert_same(outputs: Tensors, expected: Tensors, what: str) -> None:
    for name, value in expected.items():
        same = (outputs[name] == value) | (outputs[name].isnan() & value.isnan())
        assert outputs[name].shape == value.shape and same.all(), f"{name} is not that of {what}"


def constrained_reward(draw: Draw) -> Case:
    completions = Completions(draw)
    if completions.shape and completions.shape[-1] > 40:
        completions = Completions(Draw(draw.integer(0, 2**60)))
    completions.given.pop("mask", None)
    rows = Rows(draw, rows=completions.shape)
    completions.given.update(rows.given)
    completions.add_reward()
    settings = method_settings(draw, completions)
    completions.budget(settings)
    logits = {"temperature", "vocab_size"} & set(rows.settings)
    logits_settings = {name: rows.settings[name] for name in logits}
    inplace = draw.chance("inplace_backward", 0.3)
    upstream = drawn_upstream(draw, DIFFERENTIABLE, completions.shape, rows.computed)

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        return named(silently(lambda: cf.constrained_reward(
            **tensors, **settings, **logits_settings, inplace_backward=inplace, backend=backend
        )))  # fmt: skip

    def also(tensors: Tensors, outputs: Tensors, backend: str) -> None:
        pair = {name: tensors[name] for name in ("student_logits", "teacher_logits", "mask") if name in tensors}
        stats = cf.token_stats(**pair, tokens=tensors["tokens"], **logits_settings, backend=backend)
        beta = settings.get("beta", 0.5)
        jsd = lambda: cf.divergence(**pair, beta=beta, **logits_settings, backend=backend)  # noqa: E731
        trace, reward = in_turn(stats, jsd, tensors, settings, backend)
        assert_same(outputs, named(cf.ConstrainedReward(stats, trace, reward)), "the operations in turn")

    def truth(tensors: Tensors) -> Tensors:
        names = ("student_logits", "teacher_logits", "tokens", "mask")
        given = {name: tensors[name] for name in names if name in tensors}
        return reference.token_stats(**given, **logits_settings)._asdict()

    case = completions.case(
        "constrained_reward",
        call=call,
        truth=truth,
        settings={**settings, **logits_settings, "inplace_backward": inplace},
        also=also,
        needs="divergence" if settings.get("cost") == "jsd" else "constrained_reward",
    )
    of_rows = rows.case("", call=call)
    case.garbage = None if of_rows.garbage is None else lambda t: completions.garbage(of_rows.garbage(t))
    case.mask, case.computed, case.float64_logits = of_rows.mask, of_rows.computed, of_rows.float64_logits
    case.widened, case.terms, case.value_sizes = of_rows.widened, of_rows.terms, of_rows.value_sizes
    case.nan_gradient_is_free, case.kinds, case.rows = of_rows.nan_gradient_is_free, of_rows.kinds, of_rows.rows
    case.leaves, case.upstream, case.free_shapes = ("student_logits",), upstream, ("first_violation",)
    case.sizes = lambda exact: gradient_size(exact, upstream, rows.settings["temperature"])
    case.overwrites = "student_logits" if inplace else None
    case.public = lambda tensors, changed: silently(
        lambda: cf.constrained_reward(**tensors, **{**case.settings, **changed})
    )
    return case

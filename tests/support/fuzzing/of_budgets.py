"""Cases of budgets and rewards: costs of padded or packed sequences, and what follows from them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.constraint import KINDS
from fuzzing.case import Case, Tensors, drawn_threads
from fuzzing.draws import Draw
from fuzzing.layouts import Placed, place
from fuzzing.of_logits import PER_TOKEN

COST_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
UNEVEN = 0.3  # which no dtype has
BUDGETS = (0.0, 0.5, 2.0, UNEVEN, 50.0, math.inf)


class Completions:
    """Shapes of sequences ``[B, T]`` or ``[N]``, a mask, and a budget."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.given = draw, dict[str, Placed]()
        self.packed = draw.chance("packed", 0.4)
        if self.packed:
            lengths = [draw.choice("length", (0, 1, 2, 5, 13, 40)) for _ in range(draw.integer(0, 6))]
            self.sequences, self.shape = len(lengths), (sum(lengths),)
            ends = torch.tensor([0, *lengths]).cumsum(0)
            dtype = draw.choice("cu_seqlens' dtype", (torch.int64, torch.int32))
            self.given["cu_seqlens"] = place(draw, ends.to(dtype), "cu_seqlens", {"contiguous": 2, "offset": 1})
        else:
            self.sequences = draw.choice("sequences", (1, 2, 3, 6, 0), (2, 3, 3, 2, 0.3))
            self.shape = (self.sequences, draw.choice("length", (0, 1, 2, 5, 13, 40, 300)))
        if draw.chance("mask of tokens", 0.5):
            keep = draw.mostly(draw.choice("share that counts", (0.7, 0.1, -1.0)), *self.shape)
            self.given["mask"] = place(draw, keep, "mask", PER_TOKEN)

    def add(self, name: str, values: Tensor) -> None:
        self.given[name] = place(self.draw, values, "tokens' numbers", PER_TOKEN)

    def add_cost(self, name: str = "cost", finite: bool = False) -> None:
        draw = self.draw
        dtype = draw.choice("cost dtype", COST_DTYPES, (5, 3, 1, 1))
        costs = draw.uniform(*self.shape)
        kind = draw.choice("costs", ("exact", "uniform", "signed", "spent at once", "tiny", "huge"), (4, 3, 2, 2, 1, 1))
        if kind == "exact":  # sums without rounding: a budget may be met to the last bit
            costs = (costs * 16).floor() / 16
        elif kind == "spent at once":  # to the last bit, by the one token that costs anything
            costs = torch.zeros_like(costs)
            costs[..., draw.integer(0, 3) :][..., :1] = UNEVEN
        elif kind == "signed":
            costs = draw.normal(*self.shape)
        elif kind in ("tiny", "huge"):
            costs = costs * (1e-6 if kind == "tiny" else 1e4)
        special = draw.choice("special cost", (None, torch.inf, torch.nan), (6, 1, 1))
        if special is not None and not finite:
            costs[draw.mostly(0.1, *self.shape)] = special
        self.add(name, costs.to(dtype))

    def add_reward(self) -> None:
        rewards = self.draw.normal(*self.shape) * self.draw.mostly(0.5, *self.shape)
        dtype = self.draw.choice("reward dtype", (torch.float32, torch.float64, torch.bfloat16))
        self.add("task_reward", rewards.to(dtype))

    def budget(self, settings: dict[str, Any]) -> None:
        """A number among the settings, or a tensor among the arguments."""
        draw = self.draw
        if draw.chance("a budget for each", 0.4):
            amounts = torch.tensor([draw.choice("budget", BUDGETS) for _ in range(self.sequences)])
            dtype = draw.choice("budget dtype", (torch.float32, torch.float64))
            self.given["budget"] = place(draw, amounts.to(dtype), "budget", {"contiguous": 2, "gaps everywhere": 1})
        else:
            settings["budget"] = draw.choice("budget", BUDGETS)

    def account(self) -> dict[str, Any]:
        draw = self.draw
        settings: dict[str, Any] = {"edge": draw.choice("edge", ("strict", "saute"))}
        if draw.chance("mean", 0.3):
            settings["reduction"] = "mean"
        else:
            settings["gamma"] = draw.choice("gamma", (1.0, 0.9, 0.5))
        settings["per_token"] = draw.chance("per_token", 0.3)
        return settings

    def rewarding(self) -> dict[str, Any]:
        draw = self.draw
        kind = draw.choice("kind", tuple(KINDS))
        settings: dict[str, Any] = {"kind": kind, "penalty": draw.choice("penalty", (1.0, 0.0, 0.3))}
        if KINDS[kind].penalised:
            settings["penalty_at"] = draw.choice("penalty_at", (None, "crossing", "every"))
        settings["discrepancy_weight"] = draw.choice("discrepancy_weight", (1.0, 0.0, 2.5))
        if KINDS[kind].coefficient:
            settings["coefficient"] = draw.choice("coefficient", (0.5, 0.0, 0.1))
        settings["barrier_slope"] = draw.choice("barrier_slope", (10.0, 0.0))
        return settings

    def garbage(self, tensors: Tensors) -> Tensors:
        out = dict(tensors)
        for name in ("cost", "task_reward", "lower", "upper"):
            if name in out:
                out[name] = out[name].masked_fill(~out["mask"], torch.nan)
        if "tokens" in out:
            out["tokens"] = out["tokens"].masked_fill(~out["mask"], 77)
        return out

    def case(self, operation: str, **fields: Any) -> Case:
        masked = "mask" in self.given
        return Case(
            operation,
            given=self.given,
            garbage=self.garbage if masked else None,
            mask="mask" if masked else None,
            threads=drawn_threads(self.draw),
            terms=max(1, self.shape[-1]),
            **fields,
        )


def trace_of(tensors: Tensors, settings: dict[str, Any], dtype: torch.dtype) -> reference.BudgetTrace:
    """The reference's trace in float64 of a cost [B, T] or [N]; the budget as the scan counts it, rounded to the dtype
    of the cost, before it is multiplied by a number of tokens."""
    rest = {name: value for name, value in settings.items() if name not in ("budget", "per_token")}
    budget = torch.as_tensor(tensors.get("budget", settings.get("budget")), dtype=torch.float64).to(dtype).double()
    if settings["per_token"]:
        budget = _per_sequence(budget, tensors)
    return reference.budget_trace(tensors["cost"].double(), budget, **rest, **_layout(tensors))


def _layout(tensors: Tensors) -> Tensors:
    return {name: tensors[name] for name in ("mask", "cu_seqlens") if name in tensors}


def _per_sequence(budget: Tensor, tensors: Tensors) -> Tensor:
    cost = tensors["cost"]
    keep = tensors.get("mask", torch.ones_like(cost, dtype=torch.bool)).double()
    if "cu_seqlens" in tensors:
        ends = tensors["cu_seqlens"].long()
        running = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
        counts = running[ends[1:]] - running[ends[:-1]]
    else:
        counts = keep.sum(-1)
    return torch.where(counts > 0, budget * counts, 0.0)


def budget_trace(draw: Draw) -> Case:
    completions = Completions(draw)
    settings = completions.account()
    completions.budget(settings)
    completions.add_cost()
    computed = reference.compute_dtype(completions.given["cost"].memory)

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        return cf.budget_trace(**tensors, **settings, backend=backend)._asdict()

    return completions.case(
        "budget_trace",
        call=call,
        truth=None,
        settings=settings,
        computed=computed,
        also=lambda tensors, outputs, backend: check_trace(tensors, settings, computed, outputs),
        public=lambda tensors, changed: cf.budget_trace(**tensors, **{**settings, **changed}),
        needs="budget_trace",
    )


def check_trace(tensors: Tensors, settings: dict[str, Any], dtype: torch.dtype, got: Tensors) -> None:
    """The trace against float64. Who is within rounding of its budget may be on either side."""
    right = trace_of(tensors, settings, dtype)
    cost = tensors["cost"].double()
    size = cost.nan_to_num(0.0, 0.0, 0.0).abs()
    if "mask" in tensors:
        size = size.masked_fill(~tensors["mask"], 0.0)
    limits = right.remaining + right.cumulative
    magnitude = float(size.sum()) + float(limits.nan_to_num(0.0, 0.0, 0.0).abs().max()) if size.numel() else 0.0
    rounding = 8 * torch.finfo(torch.float64).eps * max(1, size.shape[-1]) * (1.0 + magnitude)
    for name in ("cumulative", "remaining", "excess"):
        value, exact = got[name].double(), getattr(right, name)
        assert value.shape == exact.shape, f"{name} has shape {list(value.shape)}, expected {list(exact.shape)}"
        allowed = rounding + torch.finfo(dtype).eps * exact.abs().nan_to_num(0.0, 0.0, 0.0)
        beyond = exact.abs() > torch.finfo(dtype).max
        wrong = ~(((value - exact).abs() <= allowed) | (value == exact) | (value.isnan() & exact.isnan()) | beyond)
        assert not wrong.any(), f"{name}: {value[wrong][:3].tolist()}, expected {exact[wrong][:3].tolist()}"
    near = (right.remaining.abs() <= 2 * rounding) & right.remaining.isfinite() & (size.sum() > 0)
    sixteenths = bool((size * 16 == (size * 16).round()).all()) and settings.get("gamma") in (1.0, 0.5)
    lonely = bool(((size != 0).sum(-1) <= 1).all()) and settings.get("gamma") == 1.0
    exact_sums = sixteenths or lonely
    if not near.any() or (exact_sums and float(size.sum()) < 1e6):
        for name in ("violated", "first_violation"):
            value, exact = got[name], getattr(right, name)
            assert torch.equal(value, exact), f"{name}: {value.tolist()}, expected {exact.tolist()}"


def modified_reward(draw: Draw) -> Case:
    completions = Completions(draw)
    account, settings = completions.account(), completions.rewarding()
    completions.budget(account)
    completions.add_cost()
    completions.add_reward()
    budget = completions.given.pop("budget", None)
    plain = {name: placed.view() for name, placed in completions.given.items() if name != "task_reward"}
    if budget is not None:
        account["budget"] = budget.view().clone()
    trace = cf.budget_trace(**plain, **account, backend="torch")
    computed = reference.compute_dtype(completions.given["cost"].memory)
    for name, value in trace._asdict().items():
        if name == "first_violation":
            completions.given[name] = place(draw, value, "first_violation", {"contiguous": 1})
        else:
            completions.add(name, value)
    fields = reference.BudgetTrace._fields

    def split(tensors: Tensors) -> tuple[Tensors, reference.BudgetTrace]:
        rest = {name: t for name, t in tensors.items() if name not in fields}
        return rest, reference.BudgetTrace(*(tensors[name] for name in fields))

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        rest, spent = split(tensors)
        return {"reward": cf.modified_reward(trace=spent, **rest, **settings, backend=backend)}

    def truth(tensors: Tensors) -> Tensors:
        rest, spent = split(tensors)
        rest["task_reward"] = rest["task_reward"].to(computed).to(rest["cost"].dtype)
        return {"reward": reference.modified_reward(trace=spent, **rest, **settings)}

    case = completions.case(
        "modified_reward",
        call=call,
        truth=truth,
        widened=("cost", "task_reward", "cumulative", "remaining", "excess"),
        settings=settings,
        computed=computed,
        needs="modified_reward",
    )

    def public(tensors: dict[str, Any], changed: dict[str, Any]) -> Any:
        rest, spent = split(tensors)
        return cf.modified_reward(trace=spent, **rest, **{**settings, **changed})

    case.public = public
    return case


def budget_verdict(draw: Draw) -> Case:
    completions = Completions(draw)
    settings = completions.account()
    completions.budget(settings)
    completions.add_cost("lower")
    completions.add_cost("upper")
    completions.given["upper"] = completions.given["upper"]._replace(
        memory=completions.given["upper"].memory.to(completions.given["lower"].memory.dtype)
    )
    fields = ("certified", "refuted")

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        return cf.budget_verdict(**tensors, **settings, backend=backend)._asdict()

    def also(tensors: Tensors, outputs: Tensors, backend: str) -> None:
        """What two traces of the same backend say. A NaN counts as the bound that proves nothing."""
        rest = {name: t for name, t in tensors.items() if name not in ("lower", "upper")}
        for name, cost in (("certified", "upper"), ("refuted", "lower")):
            paid = tensors[cost].nan_to_num({"lower": 0.0, "upper": torch.inf}[cost], torch.inf, -torch.inf)
            trace = cf.budget_trace(paid, **rest, **settings, backend=backend)
            if "cu_seqlens" in tensors:
                ends = tensors["cu_seqlens"].long().tolist()
                over = [bool(trace.violated[a:b].any()) for a, b in itertools.pairwise(ends)]
            else:
                over = trace.violated.any(-1).tolist()
            said = outputs[name].tolist()
            expected = [v == (name == "refuted") for v in over]
            assert said == expected, f"{name}: {said}, expected {expected}"
        assert tuple(outputs) == fields

    return completions.case(
        "budget_verdict", call=call, settings=settings, also=also, needs="budget_trace",
        public=lambda tensors, changed: cf.budget_verdict(**tensors, **{**settings, **changed}),
    )  # fmt: skip


def discounted_budget(draw: Draw) -> Case:
    budget = place(draw, draw.uniform(draw.integer(0, 4)) * 10, "budget", {"contiguous": 1, "gaps everywhere": 1})
    gamma = draw.choice("discount", (1.0, 0.99, 0.5, 1e-3, 1 - 1e-12))
    horizon = draw.choice("horizon", (1, 2, 100, 3000))

    def call(tensors: Tensors, backend: str | None) -> Tensors:
        number = cf.discounted_budget(2.0, gamma, horizon)
        assert isinstance(number, float)
        return {
            "each": cf.discounted_budget(tensors["budget"], gamma, horizon),
            "one": torch.tensor(number, dtype=torch.float64),
        }

    def truth(tensors: Tensors) -> Tensors:
        share = math.fsum(gamma**t for t in range(horizon)) / horizon
        return {"each": tensors["budget"] * share, "one": torch.tensor(2.0 * share, dtype=torch.float64)}

    settings = {"gamma": gamma, "horizon": horizon}
    return Case(
        "discounted_budget", call, {"budget": budget}, settings, truth, computed=torch.float64, terms=horizon,
        layout_matters=True,
    )  # fmt: skip

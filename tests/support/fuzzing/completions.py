"""Padded rewards, costs and log-probabilities of completions as arguments, and the case that they make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.constraint import KINDS
from fuzzing.case import Case, Tensors, drawn_threads
from fuzzing.draws import Draw
from fuzzing.layouts import Placed, place
from fuzzing.of_budgets import BUDGETS, UNEVEN
from fuzzing.of_logits import PER_TOKEN

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Completions:
    """B rows of up to T tokens and which of them are real."""

    def __init__(self, draw: Draw, group: int = 1, empty: bool = True) -> None:
        self.draw, self.given, self.settings = draw, dict[str, Placed](), dict[str, Any]()
        rows = draw.choice("rows of tokens", (1, 2, 3, 5, 0), (2, 3, 3, 2, 0.4 if empty else 0)) * group
        self.shape = rows, draw.choice("tokens of a row", (1, 2, 5, 13, 40, 300, 0), (2, 2, 3, 3, 2, 1, 0.5 * empty))
        self.dtype = draw.choice("objective's dtype", DTYPES, (5, 3, 1, 1))
        self.keep = torch.ones(self.shape, dtype=torch.bool)
        if draw.chance("mask of the objective", 0.7):
            self.keep = draw.mostly(draw.choice("share of real tokens", (0.7, 0.1, -1.0)), *self.shape)
            self.given["mask"] = place(draw, self.keep, "mask", PER_TOKEN)

    def numbers(self, *shape: int, special: tuple[float, ...] = (), scale: float = 1.0) -> Tensor:
        """Of a mean that may be large beside their spread, or all alike; some of them special."""
        draw = self.draw
        kind = draw.choice("numbers", ("normal", "sixteenths", "mostly 0", "alike", "off"), (4, 2, 2, 1, 1))
        values = draw.normal(*shape) * scale
        if kind == "sixteenths":
            values = (values * 16).floor() / 16
        elif kind == "mostly 0":
            values = values * draw.mostly(0.2, *shape)
        elif kind == "alike":
            values = torch.full_like(values, UNEVEN * scale)
        elif kind == "off":
            values = 200 + 100 * values
        if special and draw.chance("special numbers", 0.3):
            values[draw.mostly(0.1, *shape)] = draw.choice("special number", special)
        return values

    def add(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> None:
        self.given[name] = place(self.draw, values.to(dtype or self.dtype), "objective's numbers", PER_TOKEN)

    def add_trace(self) -> cf.Constraint:
        """The trace of some costs under a constraint, as arguments."""
        draw, kind = self.draw, self.draw.choice("kind of the objective", tuple(KINDS))
        mean = kind == "worst_case" or draw.chance("mean of the objective", 0.3)
        fields: dict[str, Any] = {"kind": kind, "edge": draw.choice("edge of the objective", ("strict", "saute"))}
        if kind != "worst_case":
            fields |= {"cost": draw.choice("cost of the objective", ("reverse_kl", "k1"), (3, 1))}
            fields |= {"reduction": "mean"} if mean else {"gamma": draw.choice("discount of the cost", (1.0, 0.9, 0.5))}
        if KINDS[kind].coefficient:
            fields["coefficient"] = draw.choice("price", (0.5, 0.0, 0.1))
        fields["discrepancy_weight"] = draw.choice("weight of the excess", (1.0, 0.0, 2.5))
        fields["barrier_slope"] = draw.choice("slope", (10.0, 0.0))
        constraint = cf.Constraint(budget=draw.choice("budget of the objective", BUDGETS), **fields)
        cost = self.numbers(*self.shape, special=(math.inf, math.nan))
        cost = (cost if draw.chance("signed", 0.3) else cost.abs()).to(self.dtype)
        self.add("cost", cost)
        trace = cf.budget_trace(cost, constraint=constraint, mask=self.given.get("mask") and self.keep, backend="torch")
        for name, values in trace._asdict().items():
            self.add(name, values, values.dtype)
        self.settings["constraint"] = constraint
        return constraint

    def of_rows(self, name: str, share: float) -> None:
        """A bool for each row."""
        values = self.draw.mostly(share, self.shape[0])
        self.given[name] = place(self.draw, values, "of rows", {"contiguous": 2, "offset": 1})

    def garbage(self, tensors: Tensors) -> Tensors:
        out, keep = dict(tensors), tensors["mask"]
        for name, t in tensors.items():
            if t.shape == keep.shape and t.is_floating_point():
                out[name] = torch.where(keep, t, torch.nan)
            elif name == "violated":
                out[name] = t ^ ~keep
        return out

    def each(self, function: Callable[..., Any], *rows: list[Any]) -> Tensor:
        """What a function of a row says of every token, [B, T]."""
        return self.tokens([function(*row) for row in zip(*rows, strict=True)])

    def tokens(self, numbers: list[Any]) -> Tensor:
        """[B, T]: a list of no rows does not say how wide they are."""
        return torch.tensor(numbers, dtype=torch.float64).reshape(self.shape)

    def case(
        self,
        call: Callable[[Tensors], Any],
        truth: Callable[[dict[str, Any]], dict[str, Any]],
        size: float = 1.0,
        computed: torch.dtype | None = None,
    ) -> Case:
        """``call`` gives named tensors, ``truth`` the numbers of them from lists. ``size``: of the terms whose sum or
        difference an output of 1 is."""

        def exact(tensors: Tensors) -> Tensors:
            keep = tensors.get("mask", self.keep).tolist()
            found = truth({name: t.tolist() for name, t in tensors.items()} | {"keep": keep})
            return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in found.items()}

        def sizes(right: Tensors) -> Tensors:
            most = {name: largest(value) for name, value in right.items()}
            return {name: torch.full(right[name].shape, size * max(1.0, value)) for name, value in most.items()}

        settings = {name: value for name, value in self.settings.items() if name != "constraint"}
        if "constraint" in self.settings:
            settings |= dataclasses.asdict(self.settings["constraint"])
        masked = "mask" in self.given
        return Case(
            self.settings["name"], lambda tensors, _: call(tensors), self.given, settings, exact,
            computed=computed or self.dtype, value_sizes=sizes, terms=max(1, self.shape[0] * self.shape[1]),
            garbage=self.garbage if masked else None, mask="mask" if masked else None, layout_matters=True,
            threads=drawn_threads(self.draw),
        )  # fmt: skip


def largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0

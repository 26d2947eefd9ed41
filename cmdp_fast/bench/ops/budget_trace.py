"""`budget_trace`: the account of each completion's budget, a scan over the costs of its tokens.

A case has as many completions as its shape has rows, of `LENGTH` tokens each; it has no vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import cmdp_fast as cf
from cmdp_fast import BudgetTrace, reference
from cmdp_fast.bench.case import Case, Op, Work, cast, random
from cmdp_fast.bench.floors import COPY
from cmdp_fast.bench.variant import Function, Inputs, Values, Variant

LENGTH = 512
BUDGET = 20.0  # about half the cost of a completion


class BudgetTraceOp(Op):
    name = "budget_trace"
    modes = ("forward",)
    axes = ("rows", "threads")

    def why_not(self, case: Case) -> str | None:
        return None if case.dtype == "float32" else "costs are float32 for logits of every dtype"

    def work(self, case: Case) -> Work:
        tokens = case.shape.rows * LENGTH
        return Work(read=tokens * (4 + 1), written=tokens * (3 * 4 + 1))  # cost and mask; three accounts and a flag

    def make(self, case: Case, seed: int) -> Inputs:
        generator, shape = random(case, seed), (case.shape.rows, LENGTH)
        cost = torch.rand(*shape, generator=generator, device=case.device) * 0.2
        length = torch.randint(1, LENGTH + 1, (shape[0], 1), generator=generator, device=case.device)
        return {"cost": cost, "mask": torch.arange(LENGTH, device=case.device) < length}

    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        found = trace_by(reference.budget_trace)(cast(inputs, dtype))
        return {name: found[name] for name in names}

    def ours(self, case: Case) -> list[Variant]:
        return [Variant("budget_trace", trace_by(cf.budget_trace))]

    def floors(self, case: Case, inputs: Inputs) -> list[Variant]:
        outs = [torch.ones_like(inputs["cost"]) for _ in range(3)]
        flags = torch.ones_like(inputs["mask"])

        def run(inputs: Inputs) -> Values:
            for out in outs:
                out.copy_(inputs["cost"])
            flags.copy_(inputs["mask"])
            return {}

        return [Variant(COPY, run)]

    def bounds(self, case: Case) -> dict[str, tuple[str, ...]]:
        return {"copy floor": (COPY,)}


def trace_by(operation: Callable[..., BudgetTrace]) -> Function:
    """The fields of the trace by name. ``operation`` has the signature of `cmdp_fast.budget_trace`."""

    def function(inputs: Inputs) -> Values:
        return operation(inputs["cost"], BUDGET, mask=inputs["mask"])._asdict()

    return function

"""`token_stats`: six statistics from one pass over both rows of logits, and the gradient of two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import cmdp_fast as cf
from cmdp_fast import TokenStats, reference
from cmdp_fast.bench.case import Case, cast
from cmdp_fast.bench.ops.logits import LOGITS, LogitsOp
from cmdp_fast.bench.variant import Function, Inputs, Values, Variant, differentiable, evaluate

TERMS = ("logprob", "reverse_kl")  # the two that a step of PPO differentiates


class TokenStatsOp(LogitsOp):
    name = "token_stats"
    modes = ("forward", "backward", "both", "inplace")

    def make(self, case: Case, seed: int) -> Inputs:
        inputs = super().make(case, seed)
        if not _widened(case):
            return inputs
        return inputs | {f"wide {name}": inputs[name].float() for name in LOGITS}

    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        return evaluate(names, statistics_by(reference.token_stats), cast(inputs, dtype))

    def ours(self, case: Case) -> list[Variant]:
        settings = {"inplace_backward": True} if case.mode == "inplace" else {}
        function = statistics_by(cf.token_stats, **settings)
        variants = [differentiable(case.mode, "token_stats", function, TERMS)]
        if _widened(case):
            variants.append(Variant("token_stats, the same logits in float32", lambda i: function(wide_inputs(i))))
        return variants


def _widened(case: Case) -> bool:
    """Whether the same logits in float32 are measured too: half precision may not be slower."""
    return case.mode == "forward" and case.dtype != "float32"


def wide_inputs(inputs: Inputs) -> Inputs:
    """The same inputs with logits in float32."""
    return {name: inputs[f"wide {name}"] for name in LOGITS} | {"tokens": inputs["tokens"]}


def statistics_by(operation: Callable[..., TokenStats], **settings: Any) -> Function:
    """The six statistics by name. ``operation`` has the signature of `cmdp_fast.token_stats`."""

    def function(inputs: Inputs) -> Values:
        return operation(inputs["student"], inputs["teacher"], inputs["tokens"], **settings)._asdict()

    return function

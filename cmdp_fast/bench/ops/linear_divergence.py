"""`linear_divergence`: the Jensen-Shannon divergence from hidden states and heads, and back to the gradients of both.

The other kinds, reverse and forward KL, are statistics of `linear_token_stats` and are measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.bench.case import Case, cast
from cmdp_fast.bench.ops.divergence import BETA
from cmdp_fast.bench.ops.linear_token_stats import LINEAR, LinearTokenStatsOp, both_logits
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, Function, Inputs, Values, Variant, differentiable, evaluate


class LinearDivergenceOp(LinearTokenStatsOp):
    name = "linear_divergence"

    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        return evaluate(names, _jsd_by(reference.linear_divergence), cast(inputs, dtype), HIDDEN_AND_HEAD)

    def ours(self, case: Case) -> list[Variant]:
        return [
            _variant(case, "linear_divergence, jsd", _jsd_by(cf.linear_divergence)),
            _variant(case, "logits in full, divergence", _in_full),
        ]


def _variant(case: Case, name: str, function: Function) -> Variant:
    return differentiable(case.mode, name, function, ("jsd",), HIDDEN_AND_HEAD)


def _jsd_by(operation: Callable[..., Tensor]) -> Function:
    return lambda inputs: {"jsd": operation(*(inputs[name] for name in LINEAR), "jsd", beta=BETA)}


def _in_full(inputs: Inputs) -> Values:
    return {"jsd": cf.divergence(*both_logits(inputs), "jsd", beta=BETA)}

"""`divergence`: the Jensen-Shannon divergence, which needs both normalisers before its own pass over the columns.

The other two kinds, reverse and forward KL, are statistics of `token_stats` and are measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.bench.case import Case, cast
from cmdp_fast.bench.ops.logits import LogitsOp
from cmdp_fast.bench.variant import Function, Inputs, Values, Variant, differentiable, evaluate

BETA = 0.5


class DivergenceOp(LogitsOp):
    name = "divergence"

    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        return evaluate(names, _jsd_by(reference.divergence), cast(inputs, dtype))

    def ours(self, case: Case) -> list[Variant]:
        return [differentiable(case.mode, "divergence, jsd", _jsd_by(cf.divergence), ("jsd",))]


def _jsd_by(operation: Callable[..., Tensor]) -> Function:
    return lambda inputs: {"jsd": operation(inputs["student"], inputs["teacher"], "jsd", beta=BETA)}

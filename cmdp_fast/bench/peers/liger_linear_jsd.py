"""Liger-Kernel's `LigerFusedLinearJSD` (adapted to 0.8.5) from hidden states and heads, with beta 1, reverse KL, beside
`linear_token_stats` and beta 1/2 beside `linear_divergence`."""

from __future__ import annotations

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.ops.divergence import BETA
from cmdp_fast.bench.ops.linear_token_stats import LINEAR
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, Absent, Inputs, Values, Variant, differentiable

OPS = ("linear_token_stats", "linear_divergence")
EARLY = "; computes gradients in its forward pass, also where none is asked for"


def part_of(case: Case) -> tuple[float, str, str]:
    """Beta, the value that it is the mean of, and what it lacks."""
    if case.op == "linear_divergence":
        return BETA, "mean jsd", "the mean alone: none a token" + EARLY
    lacks = "the mean of one divergence: none a token, no log-probabilities, entropies, forward KL"
    return 1.0, "mean reverse_kl", lacks + EARLY


def variants(case: Case) -> list[Variant]:
    if case.device != "cuda":
        raise Absent("a Triton kernel: needs a GPU")
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    beta, value, lacks = part_of(case)
    divergence = LigerFusedLinearJSD(jsd_beta=beta)

    def function(inputs: Inputs) -> Values:
        return {value: divergence(*(inputs[name] for name in LINEAR), None)}

    name, peer = "Liger LigerFusedLinearJSD", "liger_linear_jsd"
    return [differentiable(case.mode, name, function, (value,), HIDDEN_AND_HEAD, lacks=lacks, peer=peer)]

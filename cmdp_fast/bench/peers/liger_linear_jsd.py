"""Liger-Kernel's `LigerFusedLinearJSD` (adapted to 0.8.5) with beta 1, reverse KL: from hidden states and heads."""

from __future__ import annotations

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.ops.linear_token_stats import LINEAR
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, Absent, Inputs, Values, Variant, differentiable

OPS = ("linear_token_stats",)
LACKS = "the mean of one divergence: none a token, no log-probabilities, entropies, forward KL"
EARLY = "; computes gradients in its forward pass, also where none is asked for"
TERMS = ("mean reverse_kl",)


def variants(case: Case) -> list[Variant]:
    if case.device != "cuda":
        raise Absent("a Triton kernel: needs a GPU")
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    divergence = LigerFusedLinearJSD(jsd_beta=1.0)

    def function(inputs: Inputs) -> Values:
        return {"mean reverse_kl": divergence(*(inputs[name] for name in LINEAR), None)}

    name, peer, lacks = "Liger LigerFusedLinearJSD", "liger_linear_jsd", LACKS + EARLY
    return [differentiable(case.mode, name, function, TERMS, HIDDEN_AND_HEAD, lacks=lacks, peer=peer)]

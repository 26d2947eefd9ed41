"""Liger-Kernel's `liger_kl_div` (adapted to 0.8.5): forward KL of log-probabilities, a mean over the batch."""

from __future__ import annotations

import torch

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.variant import Absent, Inputs, Values, Variant, differentiable

OPS = ("token_stats",)


def variants(case: Case) -> list[Variant]:
    if case.device != "cuda":
        raise Absent("a Triton kernel: needs a GPU")
    from liger_kernel.transformers.functional import liger_kl_div

    def function(inputs: Inputs) -> Values:
        p, w = (torch.log_softmax(inputs[name].float(), -1) for name in ("student", "teacher"))
        return {"mean forward_kl": liger_kl_div(p, w, reduction="batchmean", log_target=True)}

    lacks = "the mean of one divergence: none a token, no log-probabilities, entropies, reverse KL"
    terms = ("mean forward_kl",)
    return [differentiable(case.mode, "Liger kl_div", function, terms, lacks=lacks, peer="liger_kl_div")]

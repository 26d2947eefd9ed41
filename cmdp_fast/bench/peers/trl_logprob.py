"""TRL's Triton kernel for log-probability and entropy (adapted to trl 1.16): the student's logits alone."""

from __future__ import annotations

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.variant import Absent, Inputs, Values, Variant, differentiable

OPS = ("token_stats",)


def variants(case: Case) -> list[Variant]:
    if case.device != "cuda":
        raise Absent("a Triton kernel: needs a GPU")
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    def function(inputs: Inputs) -> Values:
        logprob, entropy = selective_log_softmax_and_entropy(inputs["student"], inputs["tokens"])
        return {"logprob": logprob, "entropy": entropy}

    name, lacks = "TRL selective_log_softmax_and_entropy", "reads no teacher: no divergence"
    return [differentiable(case.mode, name, function, ("logprob",), lacks=lacks, peer="trl_logprob")]

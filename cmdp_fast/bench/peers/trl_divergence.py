"""TRL's `ChunkedDivergenceFunction` (adapted to trl 1.16): a divergence from hidden states and heads, by the chunk."""

from __future__ import annotations

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.ops.linear_token_stats import LINEAR
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, Inputs, Values, Variant, differentiable

OPS = ("linear_token_stats",)


def variants(case: Case) -> list[Variant]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def function(inputs: Inputs) -> Values:
        hidden, weight, teacher_hidden, teacher_weight = (inputs[name] for name in LINEAR)
        reverse_kl, entropy = ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, 1.0
        )
        return {"reverse_kl": reverse_kl, "entropy": entropy}

    lacks = "no log-probabilities, forward KL or teacher's entropy; its entropy has no gradient"
    name, terms = "TRL ChunkedDivergenceFunction", ("reverse_kl",)
    return [differentiable(case.mode, name, function, terms, HIDDEN_AND_HEAD, lacks=lacks, peer="trl_divergence")]

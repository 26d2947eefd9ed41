"""TRL's `ChunkedDivergenceFunction` (adapted to trl 1.16): a divergence from hidden states and heads, by the chunk."""

from __future__ import annotations

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.ops.divergence import BETA
from cmdp_fast.bench.ops.linear_token_stats import LINEAR
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, Inputs, Values, Variant, differentiable

OPS = ("linear_token_stats", "linear_divergence")


def variants(case: Case) -> list[Variant]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    mixture = case.op == "linear_divergence"
    beta, term = (BETA, "jsd") if mixture else (1.0, "reverse_kl")

    def function(inputs: Inputs) -> Values:
        hidden, weight, teacher_hidden, teacher_weight = (inputs[name] for name in LINEAR)
        value, entropy = ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, beta
        )
        return {term: value} if mixture else {term: value, "entropy": entropy}

    lacks = "" if mixture else "no log-probabilities, forward KL or teacher's entropy; its entropy has no gradient"
    name, peer = "TRL ChunkedDivergenceFunction", "trl_divergence"
    return [differentiable(case.mode, name, function, (term,), HIDDEN_AND_HEAD, lacks=lacks, peer=peer)]

"""Apple's cut-cross-entropy (adapted to 25.1): the student's log-probability from its hidden states and head alone."""

from __future__ import annotations

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, Absent, Inputs, Values, Variant, differentiable

OPS = ("linear_token_stats",)


def variants(case: Case) -> list[Variant]:
    if case.device != "cuda":
        raise Absent("a Triton kernel: needs a GPU")
    if case.dtype == "float32":
        raise Absent("its kernel takes half precision only")
    from cut_cross_entropy import linear_cross_entropy

    def function(inputs: Inputs) -> Values:
        loss = linear_cross_entropy(
            inputs["student_hidden"], inputs["student_weight"], inputs["tokens"], reduction="none", filter_eps=None
        )
        return {"logprob": -loss}

    name, peer, terms = "cut-cross-entropy", "cut_cross_entropy", ("logprob",)
    lacks = "reads no teacher: no divergence, no entropy"
    return [differentiable(case.mode, name, function, terms, HIDDEN_AND_HEAD, lacks=lacks, peer=peer)]

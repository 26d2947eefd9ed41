"""TRL's way from logits to a reward with a KL penalty (modelled on the RLOO trainer of trl 1.16), padded, no budget.

Log-probability and entropy of the student's logits, log-probability of the teacher's, their difference summed over the
completion and subtracted from its reward. Log-probabilities and entropies are TRL's own functions, which on a GPU are
its Triton kernel.
"""

from __future__ import annotations

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.variant import Inputs, Values, Variant

OPS = ("constrained_reward",)
WEIGHT = 0.05
LACKS = "no exact KL (its sample alone), no teacher's entropy, no budget, no violation, no modified reward"


def variants(case: Case) -> list[Variant]:
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    def function(inputs: Inputs) -> Values:
        tokens, mask = inputs["tokens"], inputs["mask"]
        logprob, entropy = selective_log_softmax_and_entropy(inputs["student"], tokens, entropy_requires_grad=False)
        teacher_logprob = selective_log_softmax(inputs["teacher"], tokens)
        kl = ((logprob - teacher_logprob) * mask).sum(-1)
        return {
            "logprob": logprob,
            "teacher_logprob": teacher_logprob,
            "entropy": entropy,
            "penalised": inputs["reward"].sum(-1) - WEIGHT * kl,
        }

    return [Variant("TRL pipeline", function, values=checked, lacks=LACKS, peer="trl_pipeline")]


def checked(output: Values) -> Values:
    """The values that have a counterpart in ours."""
    return {name: value for name, value in output.items() if name != "penalised"}

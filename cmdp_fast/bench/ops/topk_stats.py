"""`topk_stats`: a teacher has sent 64 log-probabilities per token, and the student's row alone is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import cmdp_fast as cf
from cmdp_fast import TopkStats, topk_reference
from cmdp_fast.bench.case import Case, Op, Work, cast, make_tokens, normal, random
from cmdp_fast.bench.floors import copy_floor, read_floor
from cmdp_fast.bench.ops.logits import BOUNDS
from cmdp_fast.bench.variant import Function, Inputs, Values, Variant, differentiable, evaluate

SENT = 64
TERMS = ("logprob", "forward_kl")  # the two that a step of PPO differentiates


class TopkStatsOp(Op):
    name = "topk_stats"
    modes = ("forward", "both")

    def work(self, case: Case) -> Work:
        matrix = case.shape.rows * case.shape.vocab * case.element_size
        sent = case.shape.rows * SENT * (8 + 4)
        return Work(read=matrix + sent) if case.mode == "forward" else Work(read=2 * matrix + sent, written=matrix)

    def make(self, case: Case, seed: int) -> Inputs:
        generator, shape = random(case, seed), case.shape
        student, teacher = (normal(case, generator, shape.rows, shape.vocab) for _ in range(2))
        logprobs, ids = teacher.float().log_softmax(-1).topk(SENT)
        return {
            "student": student,
            "logprobs": logprobs,
            "ids": ids,
            "tokens": make_tokens(case, generator, shape.rows),
        }

    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        # the bounds are widened by the rounding of the message, which has one dtype
        return evaluate(names, _by(topk_reference.topk_stats), cast(inputs, dtype) | {"logprobs": inputs["logprobs"]})

    def ours(self, case: Case) -> list[Variant]:
        return [differentiable(case.mode, f"topk_stats, k = {SENT}", _by(cf.topk_stats), TERMS)]

    def floors(self, case: Case, inputs: Inputs) -> list[Variant]:
        floors = [read_floor(("student",))]
        return floors if case.mode == "forward" else [*floors, copy_floor(("student", "student"), inputs)]

    def bounds(self, case: Case) -> dict[str, tuple[str, ...]]:
        return BOUNDS[case.mode]


def _by(operation: Callable[..., TopkStats]) -> Function:
    def function(inputs: Inputs) -> Values:
        stats = operation(inputs["student"], inputs["ids"], inputs["logprobs"], inputs["tokens"])
        return {name: getattr(stats, name) for name in ("logprob", "entropy", "forward_kl", "reverse_kl")}

    return function

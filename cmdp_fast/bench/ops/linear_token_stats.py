"""`linear_token_stats`: statistics from hidden states and heads, and back to the gradients of both, without logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import cmdp_fast as cf
from cmdp_fast import TokenStats, reference
from cmdp_fast.bench.case import Case, Op, Work, cast, make_tokens, normal, random
from cmdp_fast.bench.floors import GEMM, GEMM_AGAIN, GEMM_TILED, gemm_floors
from cmdp_fast.bench.ops.token_stats import TERMS
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, Function, Inputs, Values, Variant, differentiable, evaluate

LINEAR = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")


class LinearTokenStatsOp(Op):
    name = "linear_token_stats"
    modes = ("forward", "both")
    shapes = ("smollm2", "qwen2.5")  # the others take minutes per round on a CPU
    axes = ("rows", "vocab", "hidden", "threads")

    def why_not(self, case: Case) -> str | None:
        if case.device == "cpu" and case.dtype != "float32":
            return "half-precision products, which the floor and the peers need, take minutes on most CPUs"
        return None

    def work(self, case: Case) -> Work:
        s = case.shape
        projections = 2 * s.rows * s.vocab * (s.hidden + s.teacher_hidden)
        gradients = 2 * 2 * s.rows * s.vocab * s.hidden if case.mode == "both" else 0
        return Work(flops=projections + gradients)

    def make(self, case: Case, seed: int) -> Inputs:
        s, generator = case.shape, random(case, seed)
        sizes = {"student": s.hidden, "teacher": s.teacher_hidden}
        inputs = {f"{model}_hidden": normal(case, generator, s.rows, size, scale=1.0) for model, size in sizes.items()}
        for model, size in sizes.items():  # logits of deviation 2
            inputs[f"{model}_weight"] = normal(case, generator, s.vocab, size, scale=2 / size**0.5)
        return inputs | {"tokens": make_tokens(case, generator, s.rows)}

    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        return evaluate(names, linear_by(reference.linear_token_stats), cast(inputs, dtype), HIDDEN_AND_HEAD)

    def ours(self, case: Case) -> list[Variant]:
        variants = [_variant(case, "linear_token_stats", linear_by(cf.linear_token_stats))]
        if case.mode == "both":
            function = linear_by(cf.linear_token_stats, saved="tiles")
            variants.append(_variant(case, "linear_token_stats, saved=tiles", function))
        return [*variants, _variant(case, "logits in full, token_stats", _in_full)]

    def floors(self, case: Case, inputs: Inputs) -> list[Variant]:
        return gemm_floors(inputs, backward=case.mode == "both")

    def bounds(self, case: Case) -> dict[str, tuple[str, ...]]:
        again = [GEMM_AGAIN] if case.mode == "both" else []
        tiled = [GEMM_TILED] if case.device == "cpu" else []
        return {name: (name,) for name in (*again, GEMM, *tiled)}


def _variant(case: Case, name: str, function: Function) -> Variant:
    return differentiable(case.mode, name, function, TERMS, HIDDEN_AND_HEAD)


def linear_by(operation: Callable[..., TokenStats], **settings: Any) -> Function:
    """The six statistics by name. ``operation`` has the signature of `cmdp_fast.linear_token_stats`."""

    def function(inputs: Inputs) -> Values:
        return operation(*(inputs[name] for name in LINEAR), inputs["tokens"], **settings)._asdict()

    return function


def both_logits(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's and the teacher's logits, which `linear_token_stats` does without."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = (inputs[name] for name in LINEAR)
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_weight.t()
    return student_hidden @ student_weight.t(), teacher


def _in_full(inputs: Inputs) -> Values:
    return cf.token_stats(*both_logits(inputs), inputs["tokens"], inplace_backward=True)._asdict()

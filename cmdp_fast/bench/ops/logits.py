"""The common part of the operations on two models' logits: inputs, bytes, floors."""

from __future__ import annotations

from cmdp_fast.bench.case import Case, Op, Work, make_tokens, normal, random
from cmdp_fast.bench.floors import COPY, READ, copy_floor, read_floor
from cmdp_fast.bench.variant import Inputs, Variant

LOGITS = ("student", "teacher")
BOUNDS: dict[str, dict[str, tuple[str, ...]]] = {
    "forward": {"read floor": (READ,)},
    "backward": {"copy floor": (COPY,)},
    "both": {"read + copy floor": (READ, COPY)},
    "inplace": {"read + copy floor": (READ, COPY)},
}


class LogitsOp(Op):
    """An operation that reads both rows of logits. Its backward pass writes a gradient as large as one of them."""

    modes: tuple[str, ...] = ("forward", "both")

    def work(self, case: Case) -> Work:
        matrix = case.shape.rows * case.shape.vocab * case.element_size
        passes = {"forward": (2, 0), "backward": (2, 1), "both": (4, 1), "inplace": (4, 1)}[case.mode]
        return Work(read=passes[0] * matrix, written=passes[1] * matrix)

    def make(self, case: Case, seed: int) -> Inputs:
        generator, shape = random(case, seed), case.shape
        inputs = {name: normal(case, generator, shape.rows, shape.vocab) for name in LOGITS}
        return inputs | {"tokens": make_tokens(case, generator, shape.rows)}

    def floors(self, case: Case, inputs: Inputs) -> list[Variant]:
        needed = {name for names in self.bounds(case).values() for name in names}
        floors = []
        if READ in needed:
            floors.append(read_floor(LOGITS))
        if COPY in needed:
            floors.append(copy_floor(LOGITS, inputs))
        return floors

    def bounds(self, case: Case) -> dict[str, tuple[str, ...]]:
        return BOUNDS[case.mode]

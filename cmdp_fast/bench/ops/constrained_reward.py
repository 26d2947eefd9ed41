"""`constrained_reward`: the whole method, from both models' logits to the modified reward.

The rows are the tokens of some completions (`Shape.length`), padded on the right as in a trainer's batch. How many
tokens a completion has matters as well as how many there are: each is scanned from its first to its last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.bench.case import LAYOUTS, MEASURED, Case, cast
from cmdp_fast.bench.ops.logits import LogitsOp
from cmdp_fast.bench.variant import Inputs, Values, Variant

BUDGET_A_TOKEN = 2.0  # nats; random logits cost about 4, so that a completion crosses it half-way


class ConstrainedRewardOp(LogitsOp):
    name = "constrained_reward"
    modes = ("forward",)
    shapes = (*MEASURED, *LAYOUTS)

    def make(self, case: Case, seed: int) -> Inputs:
        shape = (case.shape.sequences, case.shape.length)
        inputs = super().make(case.resized(rows=shape[0] * shape[1]), seed)
        inputs = {name: t.unflatten(0, shape) for name, t in inputs.items()}
        reward = torch.zeros(shape, device=case.device)
        reward[:, -1] = 1.0
        # Every row counts: the saving of a mask is not measured here.
        return inputs | {"reward": reward, "mask": torch.ones(shape, dtype=torch.bool, device=case.device)}

    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        found = in_turn(cast(inputs, dtype))
        return {name: found[name] for name in names}

    def ours(self, case: Case) -> list[Variant]:
        lacks = "no budget, no reward"
        return [
            Variant("constrained_reward", _constrained_reward),
            Variant("token_stats alone", _statistics, lacks=lacks),
        ]


def budget(inputs: Inputs) -> float:
    """The budget of each completion in nats."""
    return BUDGET_A_TOKEN * inputs["tokens"].shape[-1]


def in_turn(inputs: Inputs) -> Values:
    """The three operations of the reference, one after the other."""
    mask, reward = inputs["mask"], inputs["reward"]
    stats = reference.token_stats(inputs["student"], inputs["teacher"], inputs["tokens"])
    trace = reference.budget_trace(stats.reverse_kl, budget(inputs), mask=mask)
    modified = reference.modified_reward(reward, stats.reverse_kl, trace, mask=mask)
    return stats._asdict() | trace._asdict() | {"modified_reward": modified}


def _constrained_reward(inputs: Inputs) -> Values:
    out = cf.constrained_reward(
        inputs["student"],
        inputs["teacher"],
        inputs["tokens"],
        inputs["reward"],
        budget(inputs),
        mask=inputs["mask"],
    )
    return out.stats._asdict() | out.trace._asdict() | {"modified_reward": out.reward}


def _statistics(inputs: Inputs) -> Values:
    return cf.token_stats(inputs["student"], inputs["teacher"], inputs["tokens"], mask=inputs["mask"])._asdict()

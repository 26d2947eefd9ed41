"""The unit of what a constraint charges: the range of the task's rewards.

A penalty n makes being over the budget never worth it if it is at least what any completion can gain by that. How much
that is depends on the rewards. Counted from the worst completion so far (0) to the best (1) it is 1 at most, whatever
their scale and sign, and the same penalty, weights and gains serve every task.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


NOTHING = 1e-5  # of the larger end: float32 sums of the same rewards in another order differ by some 1e-7


class RewardRange:
    """The least and the largest task reward of a run's completions so far, of all processes."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def see(self, reward: Tensor, accelerator: Accelerator) -> None:
        """Some more task rewards [B], 0 or more of them; every process must call this."""
        ends = reward.new_tensor([self.low, -self.high])
        if len(reward):
            ends = torch.minimum(ends, torch.stack([reward.min(), -reward.max()]))
        of_all = accelerator.gather(ends).view(-1, 2).amin(0).tolist()
        self.low, self.high = of_all[0], -of_all[1]

    def share(self, reward: Tensor) -> Tensor:
        """Where in the range a reward [B] is, from 0 to 1; all are 0 as long as all have been equal, to rounding."""
        width = self.high - self.low  # in float64, which has room for the difference of any two
        if not width > NOTHING * max(abs(self.low), abs(self.high)):
            return torch.zeros_like(reward)
        return ((reward.double() - self.low).clamp(min=0.0) / width).to(reward)

    def state_dict(self) -> dict[str, float]:
        """The two ends, for a checkpoint; nothing before the first reward."""
        return {"low": self.low, "high": self.high} if self.low <= self.high else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from `state_dict`."""
        if state:
            self.low, self.high = float(state["low"]), float(state["high"])

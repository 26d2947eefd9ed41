"""The value head of ``baseline="gae"``: a linear layer on the student's hidden states that predicts the return."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmdp_fast.scoring import without_autocast


class ValueHead(nn.Module):
    """V(s_t) [B, T] in float32 from hidden states [B, T, H].

    It learns from the hidden states as they are and does not change them, so that the policy's gradient is the policy's
    alone. It starts at 0: before it has learned anything, `gae` with lambda 1 is the return without a baseline.
    Autocast is off in it: bfloat16 would round a return of 100 to the next half.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with without_autocast(hidden):  # which accelerate puts around it
            return self.linear(hidden.detach().float()).squeeze(-1)


def explained_variance(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(target - value) / Var(target) over the tokens [B, T] of the mask, a scalar: 1 is a perfect prediction, 0
    no better than a constant, below 0 worse. NaN if all targets are equal, or there are none."""
    error, spread = (target - value)[mask], target[mask]
    if len(spread) < 2:
        return value.new_tensor(torch.nan)
    return torch.where(spread.var() > 0, 1.0 - error.var() / spread.var(), torch.nan)

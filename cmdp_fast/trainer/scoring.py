"""What both models make of a rollout, and the statistics of its tokens: by the tile from hidden states, or from logits.

Either way a model gives one tensor a token, its *outputs*, which the trainer keeps, hands to the operations and
differentiates without knowing which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import cmdp_fast as cf

from .errors import InputError
from .rollout import Rollout, completion_hidden, completion_logits

Pair = tuple[Any, Any]  # student (or the policy in its place) and teacher
Outputs = tuple[Tensor, Tensor]  # of both


@dataclass
class FromLogits:
    """Outputs are logits ``[B, T, V]``."""

    settings: dict[str, Any]  # vocab_size and temperature

    def outputs(self, model: Any, rollout: Rollout) -> Tensor:
        return completion_logits(model, rollout)

    def constrained_reward(
        self, models: Pair, outputs: Outputs, tokens: Tensor, task_reward: Tensor, budget: float, **options: Any
    ) -> cf.ConstrainedReward:
        return cf.constrained_reward(*outputs, tokens, task_reward, budget, **(options | self.settings))

    def token_stats(self, models: Pair, outputs: Outputs, tokens: Tensor, mask: Tensor) -> cf.TokenStats:
        # In place: nobody reads the logits again, and the gradient is as large as they are.
        return cf.token_stats(*outputs, tokens, mask=mask, inplace_backward=True, **self.settings)


@dataclass
class FromHiddenStates:
    """Outputs are hidden states ``[B, T, H]``; logits exist a tile at a time (`cf.linear_token_stats`)."""

    settings: dict[str, Any]

    def outputs(self, model: Any, rollout: Rollout) -> Tensor:
        return completion_hidden(model, rollout)

    def constrained_reward(
        self, models: Pair, outputs: Outputs, tokens: Tensor, task_reward: Tensor, budget: float, **options: Any
    ) -> cf.ConstrainedReward:
        options |= _arguments(models, outputs) | self.settings
        return cf.linear_constrained_reward(tokens=tokens, task_reward=task_reward, budget=budget, **options)

    def token_stats(self, models: Pair, outputs: Outputs, tokens: Tensor, mask: Tensor) -> cf.TokenStats:
        arguments = _arguments(models, outputs) | self.settings
        return cf.linear_token_stats(tokens=tokens, mask=mask, **arguments)


def _arguments(models: Pair, outputs: Outputs) -> dict[str, Any]:
    """Hidden states and heads of both models, by argument of `cf.linear_token_stats`."""
    arguments: dict[str, Any] = {}
    for name, model, hidden in zip(("student", "teacher"), models, outputs, strict=True):
        head = cf.head_of(model)
        # As autocast would have it: float32 weights meet bfloat16 hidden states in bfloat16.
        arguments |= {f"{name}_hidden": hidden, f"{name}_weight": head.weight.to(hidden.dtype)}
        arguments |= {f"{name}_bias": head.bias, f"{name}_softcap": head.softcap, f"{name}_scale": head.scale}
    return arguments


def make_scoring(logits: str, models: Pair, vocab_size: int, temperature: float) -> FromLogits | FromHiddenStates:
    """The scoring that the setting ``logits`` names. Raises InputError for a model whose head is not known."""
    settings = {"vocab_size": vocab_size, "temperature": temperature}
    if logits == "full":
        return FromLogits(settings)
    for name, model in zip(("student", "teacher"), models, strict=True):
        try:
            cf.head_of(model)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: {error}; with --logits full it can be used all the same") from error
    return FromHiddenStates(settings)

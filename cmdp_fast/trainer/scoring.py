"""What both models make of a rollout, and the statistics of its tokens: by the tile from hidden states, or from logits.

Either way a model gives one tensor a token, its *outputs*, which the trainer keeps, hands to the operations and
differentiates without knowing which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.errors import InputError

from .rollout import Rollout

Pair = tuple[Any, Any]  # student (or the policy in its place) and teacher
Outputs = tuple[Tensor, Tensor]  # of both


@dataclass
class FromLogits:
    """Outputs are logits ``[B, T, V]``."""

    settings: dict[str, Any]  # vocab_size and temperature

    def outputs(self, model: Any, rollout: Rollout) -> Tensor:
        return completion_logits(model, rollout)

    def constrained_reward(
        self, models: Pair, outputs: Outputs, tokens: Tensor, task_reward: Tensor, **options: Any
    ) -> cf.ConstrainedReward:
        return cf.constrained_reward(*outputs, tokens, task_reward, **(options | self.settings))

    def token_stats(
        self, models: Pair, outputs: Outputs, tokens: Tensor, mask: Tensor, *, inplace: bool = True
    ) -> cf.TokenStats:
        # In place unless somebody reads the logits again: the gradient is as large as they are.
        return cf.token_stats(*outputs, tokens, mask=mask, inplace_backward=inplace, **self.settings)

    def divergence(self, models: Pair, outputs: Outputs, mask: Tensor, beta: float) -> Tensor:
        return cf.divergence(*outputs, "jsd", beta=beta, mask=mask, **self.settings)


@dataclass
class FromHiddenStates:
    """Outputs are hidden states ``[B, T, H]``; logits exist a tile at a time (`cf.linear_token_stats`)."""

    settings: dict[str, Any]

    def outputs(self, model: Any, rollout: Rollout) -> Tensor:
        return completion_hidden(model, rollout)

    def constrained_reward(
        self, models: Pair, outputs: Outputs, tokens: Tensor, task_reward: Tensor, **options: Any
    ) -> cf.ConstrainedReward:
        del options["beta"]  # of jsd, which is not to be had from hidden states
        options |= _arguments(models, outputs) | self.settings
        return cf.linear_constrained_reward(tokens=tokens, task_reward=task_reward, **options)

    def token_stats(
        self, models: Pair, outputs: Outputs, tokens: Tensor, mask: Tensor, *, inplace: bool = True
    ) -> cf.TokenStats:
        arguments = _arguments(models, outputs) | self.settings
        return cf.linear_token_stats(tokens=tokens, mask=mask, **arguments)

    def divergence(self, models: Pair, outputs: Outputs, mask: Tensor, beta: float) -> Tensor:
        stats = self.token_stats(models, outputs, torch.zeros_like(mask, dtype=torch.long), mask)
        return {0.0: stats.forward_kl, 1.0: stats.reverse_kl}[beta]  # what lies between needs --logits full


def completion_logits(model: Any, rollout: Rollout) -> Tensor:
    """The logits [B, T, V] from which the completions' tokens were, or would be, drawn."""
    return _last(model(**_inputs(rollout)).logits, rollout)


def completion_hidden(model: Any, rollout: Rollout) -> Tensor:
    """The hidden states [B, T, H] that the model's head would turn into the `completion_logits`."""
    return _last(cf.last_hidden_state(model, **_inputs(rollout)), rollout)


def _inputs(rollout: Rollout) -> dict[str, Any]:
    """What a model is given to predict the completions: everything but their last token, which predicts nothing."""
    attention = torch.cat([rollout.prompt_mask, rollout.mask[:, :-1]], dim=1).long()
    return {
        "input_ids": torch.cat([rollout.prompt_ids, rollout.tokens[:, :-1]], dim=1),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),  # as in generate: padding does not count
        "logits_to_keep": rollout.tokens.shape[1],
        "use_cache": False,
    }


def _last(rows: Tensor, rollout: Rollout) -> Tensor:
    """The rows that predict the completions' tokens.

    Only a model that knows no logits_to_keep needs the slice; taking it for nothing would copy the gradient.
    """
    length = rollout.tokens.shape[1]
    return rows if rows.shape[1] == length else rows[:, -length:]


def _arguments(models: Pair, outputs: Outputs) -> dict[str, Any]:
    """Hidden states and heads of both models, by argument of `cf.linear_token_stats`."""
    arguments: dict[str, Any] = {}
    for name, model, hidden in zip(("student", "teacher"), models, outputs, strict=True):
        head = cf.head_of(model)
        # As autocast would have it: float32 weights meet bfloat16 hidden states in bfloat16.
        arguments |= {f"{name}_hidden": hidden, f"{name}_weight": head.weight.to(hidden.dtype)}
        arguments |= {f"{name}_bias": head.bias, f"{name}_softcap": head.softcap, f"{name}_scale": head.scale}
    return arguments


def make_scoring(
    logits: str, models: tuple[Any, ...], vocab_size: int, temperature: float
) -> FromLogits | FromHiddenStates:
    """The scoring that the setting ``logits`` names. Raises InputError for a model whose head is not known."""
    settings = {"vocab_size": vocab_size, "temperature": temperature}
    if logits == "full":
        return FromLogits(settings)
    for name, model in zip(("student", "teacher"), models, strict=False):  # or a student alone
        try:
            cf.head_of(model)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: {error}; with --logits full it can be used all the same") from error
    return FromHiddenStates(settings)

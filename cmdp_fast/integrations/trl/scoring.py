"""What student and teacher make of a batch of TRL's: hidden states of its completions, and the statistics of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.scoring import FromHiddenStates, Outputs, Pair

from .divergence import tiled_divergence

Batch = dict[str, Any]  # what TRL's `_generate_and_score_completions` returns, or the part of it for a micro-batch


class Account(NamedTuple):
    """Completions against their budget, tensors ``[B, T]``; the teacher's hidden states if they were to be kept."""

    stats: cf.TokenStats
    trace: cf.BudgetTrace
    reward: Tensor
    teacher_hidden: Tensor | None


class Scoring(FromHiddenStates):
    """`FromHiddenStates` for TRL's batches, whose models see what TRL shows them: no position ids."""

    def __init__(self, trainer: Any, teacher: Any, vocab_size: int) -> None:
        super().__init__({"vocab_size": vocab_size, "temperature": trainer.temperature})
        self.accelerator = trainer.accelerator
        self.teacher = teacher
        self.cache_bytes = trainer.args.teacher_cache_mb * 2**20
        # TRL's option to run the student's head in float32 whatever the layers below run in
        self.float_head = bool(getattr(trainer.args, "cast_lm_head_to_fp32", False))

    def outputs(self, model: Any, batch: Any) -> Tensor:
        """The hidden states [B, T, H] from which the logits of the completions' tokens would be computed."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            hidden = cf.last_hidden_state(model, ids, attention)
            dtype = self._head_dtype(model, hidden)
        length = batch["completion_ids"].shape[1]
        return hidden[:, -length - 1 : -1].to(dtype)

    def _head_dtype(self, model: Any, hidden: Tensor) -> torch.dtype:
        """What TRL runs a head in. A norm in float32 may end the layers below; autocast would not keep to that."""
        if self.float_head and model is not self.teacher:
            return torch.float32
        device = hidden.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def teacher_outputs(self, batch: Batch) -> Tensor:
        """The teacher's, kept or computed."""
        kept: Tensor | None = batch.get("teacher_hidden")
        if kept is not None:
            return kept
        with torch.no_grad():
            return self.outputs(self.teacher, batch)

    def check_tokens(self, batch: Batch) -> None:
        """Raises InputError for a token that one of the models has no column for."""
        highest, width = int(batch["completion_ids"].max()), self.settings["vocab_size"]
        if highest >= width:
            raise InputError(f"a completion has token {highest}, but student and teacher share {width} columns alone")

    def divergence(self, models: Pair, outputs: Outputs, mask: Tensor, beta: float) -> Tensor:
        """Any of the Jensen-Shannon divergences; the logits exist for some rows at a time."""
        if beta in (0.0, 1.0):
            return super().divergence(models, outputs, mask, beta)
        heads = [cf.head_of(model) for model in models]
        return tiled_divergence(heads[0], outputs[0], heads[1], outputs[1], mask, beta=beta, **self.settings)

    @torch.no_grad()
    def account(
        self,
        student: Any,
        batch: Batch,
        settle: Callable[[Pair, Outputs, Tensor, slice], cf.ConstrainedReward],
        *,
        rows_at_once: int,
        keep: bool,
    ) -> Account:
        """Scores a batch some completions at a time; ``settle`` says what they cost and what comes of it.

        ``keep``: the teacher's hidden states are wanted again, and kept if they fit in the cache.
        """
        parts, kept = [], None
        count = len(batch["completion_ids"])
        for start in range(0, count, rows_at_once):
            rows = slice(start, min(start + rows_at_once, count))
            part = {name: batch[name][rows] for name in _READ}
            outputs = (self.outputs(student, part), self.outputs(self.teacher, part))
            parts.append(settle((student, self.teacher), outputs, part["completion_ids"], rows))
            hidden = outputs[1]
            if keep and count * hidden[0].numel() * hidden.element_size() <= self.cache_bytes:
                kept = hidden.new_empty(count, *hidden.shape[1:]) if kept is None else kept
                kept[rows] = hidden
        return Account(
            cf.TokenStats(*(torch.cat(column) for column in zip(*(p.stats for p in parts), strict=True))),
            cf.BudgetTrace(*(torch.cat(column) for column in zip(*(p.trace for p in parts), strict=True))),
            torch.cat([p.reward for p in parts]),
            kept,
        )


_READ = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def trained_tokens(batch: Batch) -> Tensor:
    """Which tokens [B, T] are the student's own: neither padding nor written by a tool."""
    mask: Tensor = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


def at_last_token(value: Tensor, mask: Tensor) -> Tensor:
    """[B, T] with value [B] at the last real token of each completion and 0 elsewhere; a completion may have none."""
    following = mask.long().flip(1).cumsum(1).flip(1)
    return torch.where(mask & (following == 1), value[:, None].float(), 0.0)

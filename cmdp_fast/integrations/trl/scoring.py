"""A batch of TRL's as student and teacher read it: hidden states of its completions, and the statistics of tokens."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.errors import InputError
from cmdp_fast.reading import TokenBatch
from cmdp_fast.scoring import FromHiddenStates, Models, Outputs, ScoredBatch, score
from cmdp_fast.teachers.ahead import asked_ahead
from cmdp_fast.teachers.teacher import Teacher, TeacherOutputs
from cmdp_fast.topk_scoring import COSTS, FromTopK

from .positions import check_lengths, settle_positions

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = dict[str, Any]  # as TRL's `_generate_and_score_completions` returns it, or the part of it for a micro-batch


class TRLScoring(FromHiddenStates):
    """`FromHiddenStates` for TRL's batches, whose models see the inputs that TRL gives them: no position ids, which
    those that need them count by themselves from here on (`positions`). A teacher that is asked sees no padding.

    Raises InputError for a model that would read a prompt wrongly for the padding in front of it.
    """

    def __init__(self, trainer: Any, teacher: Any, vocab_size: int) -> None:
        super().__init__(vocab_size, trainer.temperature)
        self.accelerator: Accelerator = trainer.accelerator
        self.teacher = teacher
        self.cache_bytes = trainer.args.teacher_cache_mb * 2**20
        # TRL's option to run the student's head in float32 above layers of any dtype
        self.float_head = bool(getattr(trainer.args, "cast_lm_head_to_fp32", False))
        self.limits = settle_positions(trainer, teacher, vocab_size)
        self.likeliest = None
        if isinstance(teacher, Teacher) and teacher.about.answers == "topk":
            _check_likeliest(trainer)
            self.likeliest = FromTopK("tiled", vocab_size, self.temperature)

    def outputs(self, model: Any, batch: Any) -> Tensor:
        """The hidden states [B, T, H] from which the logits of the completions' tokens would be computed."""
        if isinstance(model, Teacher):
            return self.of_answer(model.of_completions(_completions(batch)))
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            hidden = cf.last_hidden_state(model, ids, attention)
            dtype = self._head_dtype(model, hidden)
        length = batch["completion_ids"].shape[1]
        return hidden[:, -length - 1 : -1].to(dtype)

    def of_answer(self, answer: TeacherOutputs) -> Tensor:
        return super().of_answer(answer) if self.likeliest is None else self.likeliest.of_answer(answer)

    def constrained_reward(self, *given: Any, **settings: Any) -> cf.ConstrainedReward:
        """Of a teacher's most likely tokens by the lower bound of the cost, as the two below."""
        if self.likeliest is not None:
            return self.likeliest.constrained_reward(*given, **settings)
        return super().constrained_reward(*given, **settings)

    def token_stats(self, *given: Any, **settings: Any) -> cf.TokenStats:
        if self.likeliest is not None:
            return self.likeliest.token_stats(*given, **settings)
        return super().token_stats(*given, **settings)

    def divergence(self, *given: Any) -> Tensor:
        return super().divergence(*given) if self.likeliest is None else self.likeliest.divergence(*given)

    def _head_dtype(self, model: Any, hidden: Tensor) -> torch.dtype:
        """The dtype in which TRL runs a head. A norm in float32 may end the layers below; autocast would not keep to
        that."""
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
        """Raises InputError for a token that one of the models has no column or no position for."""
        highest = int(batch["completion_ids"].max())
        if highest >= self.vocab_size:
            raise InputError(
                f"a completion has token {highest}, but student and teacher share {self.vocab_size} columns alone"
            )
        check_lengths(self.limits, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1))

    @torch.no_grad()
    def account(
        self,
        student: Any,
        batch: Batch,
        settle: Callable[[Models, Outputs, Tensor, slice], cf.ConstrainedReward],
        *,
        rows_at_once: int,
        keep: bool,
    ) -> ScoredBatch:
        """The account of a batch, `rows_at_once` completions at a time; ``settle`` makes statistics, trace and modified
        reward of some rows.

        ``keep``: the teacher's hidden states are wanted again, and kept if they fit in the cache.
        """

        count, asked = len(batch["completion_ids"]), None
        if isinstance(self.teacher, Teacher):
            starts = range(0, count, rows_at_once)
            parts = (_rows(batch, slice(start, start + rows_at_once)) for start in starts)
            asked = asked_ahead(self.teacher, map(_completions, parts))

        def read_and_settle(rows: slice) -> tuple[cf.ConstrainedReward, Tensor]:
            part = _rows(batch, rows)
            question = None if asked is None else next(asked)
            ours = self.outputs(student, part)
            theirs = self.outputs(self.teacher, part) if question is None else self.of_answer(question.result())
            return settle((student, self.teacher), (ours, theirs), part["completion_ids"], rows), theirs

        return score(count, read_and_settle, at_once=rows_at_once, cache_bytes=self.cache_bytes if keep else 0)


def _check_likeliest(trainer: Any) -> None:
    """Raises InputError for what a teacher's most likely tokens do not bound, or at a temperature at which it has not
    said them."""
    args, divergences = trainer.args, {0.0: "forward_kl", 1.0: "reverse_kl"}
    cost = args.cost if hasattr(args, "cost") else divergences.get(float(args.beta), f"JSD({args.beta:g})")
    if trainer.temperature != 1.0 or cost not in COSTS:
        raise InputError(
            f"teacher_model answers with its most likely tokens at temperature 1, which bound {' and '.join(COSTS)}: "
            f"not {cost} at temperature {trainer.temperature:g}"
        )


_READ = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def _rows(batch: Batch, rows: slice) -> Batch:
    """What the models read of some completions."""
    return {name: batch[name][rows] for name in _READ}


def _completions(batch: Batch) -> TokenBatch:
    """The same as a teacher that is asked is given it."""
    prompt_ids, prompt_mask, tokens, mask = (batch[name] for name in _READ)
    return SimpleNamespace(prompt_ids=prompt_ids, prompt_mask=prompt_mask, tokens=tokens, mask=mask, lengths=None)


def trained_tokens(batch: Batch) -> Tensor:
    """Which tokens [B, T] are the student's own: neither padding nor written by a tool."""
    mask: Tensor = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask

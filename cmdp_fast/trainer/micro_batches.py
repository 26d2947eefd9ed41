"""Micro-batches: which completions go through a model at once, and how wide.

Completions of like length go together, and each micro-batch is as wide as its own longest prompt and completion, so
that little is computed for padding; with `--padding-free` nothing is (`cmdp_fast/packed.py`). Sums are taken in another
order, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from cmdp_fast import batches
from cmdp_fast.reference import BudgetTrace, ConstrainedReward, TokenStats
from cmdp_fast.teachers.routed import rows_by_teacher
from cmdp_fast.unmasked import Lengths

from .rollout import Rollout
from .settings.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def lengths_of(rollout: Rollout) -> Lengths:
    """The lengths in a batch, asked of the device once."""
    both = torch.stack((rollout.prompt_mask.sum(1), rollout.mask.sum(1))).tolist()
    return Lengths(*both)


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch, as wide as the longest of their prompts and completions."""

    rows: list[int]
    lengths: Lengths  # of these rows
    packed: bool = False  # whether a model reads them without padding
    _index: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def prompt(self) -> int:
        """Columns of the prompts, at least one."""
        return max(*self.lengths.prompts, 1)

    @property
    def completion(self) -> int:
        """Columns of the completions, at least one."""
        return max(*self.lengths.completions, 1)

    @property
    def tokens(self) -> int:
        """Real tokens of prompts and completions."""
        return sum(self.lengths.prompts) + sum(self.lengths.completions)

    @property
    def padded(self) -> int:
        """Places for tokens in what a model reads."""
        return self.tokens if self.packed else len(self.rows) * (self.prompt + self.completion)

    def index(self, device: torch.device) -> Tensor:
        """The rows on a device, brought there once and without waiting for it."""
        if device not in self._index:
            rows = torch.tensor(self.rows, pin_memory=device.type == "cuda")
            self._index[device] = rows.to(device, non_blocking=True)
        return self._index[device]

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor [B] or [B, T, ...], without the columns behind its longest completion."""
        index = self.index(tensor.device)
        return tensor[index] if tensor.dim() == 1 else tensor[:, : self.completion][index]

    def of_rollout(self, rollout: Rollout) -> Rollout:
        """Its part of the completions, without the columns before its longest prompt as well."""
        index = self.index(rollout.tokens.device)
        before = rollout.prompt_ids.shape[1] - self.prompt
        drawn, whose = rollout.sampler_logprob, rollout.teacher_index
        return Rollout(
            prompt_ids=rollout.prompt_ids[:, before:][index],
            prompt_mask=rollout.prompt_mask[:, before:][index],
            tokens=self.of(rollout.tokens),
            mask=self.of(rollout.mask),
            finished=self.of(rollout.finished),
            sampler_logprob=None if drawn is None else self.of(drawn),
            lengths=self.lengths,
            teacher_index=None if whose is None else self.of(whose),
        )


def split(
    rows: Sequence[int], lengths: Lengths, *, count: int, tokens: int = 0, packed: bool = False
) -> list[MicroBatch]:
    """The rows in micro-batches of like length. The longest come first: if they do not fit in memory it shows at once.

    Each holds up to ``count`` completions in up to ``tokens`` places, padding included unless they are ``packed`` (0:
    any number of places); a completion that alone takes more is a micro-batch of its own.
    """
    groups: list[list[int]] = []
    longest_prompt = real = 0
    for row in sorted(rows, key=lambda row: (lengths.completions[row], lengths.prompts[row]), reverse=True):
        own = lengths.prompts[row] + lengths.completions[row]
        if groups:
            prompt = max(longest_prompt, lengths.prompts[row])
            padded = (len(groups[-1]) + 1) * (prompt + lengths.completions[groups[-1][0]])
            places = real + own if packed else padded
        if not groups or len(groups[-1]) == count or 0 < tokens < places:
            groups.append([])
            prompt, real = lengths.prompts[row], 0
        groups[-1].append(row)
        longest_prompt, real = prompt, real + own
    return [_measured(group, lengths, packed) for group in groups]


def split_into(number: int, parts: list[MicroBatch], lengths: Lengths) -> list[MicroBatch]:
    """The same rows in ``number`` micro-batches, at most one for each row: the largest are halved until there are so
    many."""
    parts = list(parts)
    while len(parts) < number:
        at = max((i for i, part in enumerate(parts) if len(part.rows) > 1), key=lambda i: parts[i].padded)
        rows, packed = parts[at].rows, parts[at].packed
        halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        parts[at : at + 1] = [_measured(half, lengths, packed) for half in halves]
    return parts


def _measured(rows: list[int], lengths: Lengths, packed: bool) -> MicroBatch:
    return MicroBatch(rows, Lengths(*([of_all[row] for row in rows] for of_all in lengths)), packed)


def widened(account: ConstrainedReward, width: int) -> ConstrainedReward:
    """The account [B, T] of completions as it would be with more padding, [B, width]: padding costs nothing."""
    trace, narrow = account.trace, account.reward.shape[1]
    last = torch.arange(width, device=account.reward.device).clamp(max=narrow - 1)
    never = trace.first_violation == narrow
    return ConstrainedReward(
        TokenStats(*(batches.widened(column, width) for column in account.stats)),
        BudgetTrace(
            cumulative=trace.cumulative[:, last],
            remaining=trace.remaining[:, last],
            violated=trace.violated[:, last],
            first_violation=torch.where(never, width, trace.first_violation),
            excess=batches.widened(trace.excess, width),
        ),
        batches.widened(account.reward, width),
    )


V = TypeVar("V")


def in_order(parts: Sequence[MicroBatch], values: Sequence[V]) -> V:
    """The values of micro-batches, batches of their rows, as one batch in the order of the rows."""
    order = torch.tensor([row for part in parts for row in part.rows]).argsort()
    return batches.united([batches.joined(values)], lambda one: one[0][order.to(one[0].device)])


class Splitter:
    """`split` as the settings say, with as many micro-batches in each process; and a count of what was split."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.real_tokens = 0  # that went through the models so far, here
        self.padded_tokens = 0  # the same, with the padding

    def __call__(self, rows: Sequence[int], lengths: Lengths, teacher_index: Tensor | None = None) -> list[MicroBatch]:
        """The micro-batches of some rows. Every process must call it, with as many rows. ``teacher_index`` [B], of the
        whole batch: those of one teacher go together.

        Models that are spread over processes are gathered at each pass, and gradients are exchanged at the last one.
        """
        c = self.config
        bounds = {"count": c.micro_batch_size, "tokens": c.micro_batch_tokens}
        groups = rows_by_teacher(rows, teacher_index)
        parts = [part for some in groups for part in split(some, lengths, **bounds, packed=c.padding_free)]
        if (c.micro_batch_tokens or teacher_index is not None) and self.accelerator.num_processes > 1:
            number = torch.tensor([len(parts)], device=self.accelerator.device)
            parts = split_into(int(self.accelerator.gather(number).max()), parts, lengths)
        self.real_tokens += sum(part.tokens for part in parts)
        self.padded_tokens += sum(part.padded for part in parts)
        return parts

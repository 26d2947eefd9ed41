"""A teacher's outputs at the tokens of completions, kept from scoring to update without their padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmdp_fast.packed import places

from .micro_batches import MicroBatch
from .models.split_rows import SplitRows


class KeptOutputs:
    """A model's outputs at the tokens of B completions, kept without padding."""

    def __init__(self, first: Tensor, outputs: Tensor | SplitRows) -> None:
        self.first = first  # [B], the place of each completion's first token
        self.outputs = outputs  # [N, ...], of all completions that were scored

    @classmethod
    def if_they_fit(
        cls, mask: Tensor, lengths: Sequence[int], like: Tensor, most: int, spills: bool
    ) -> KeptOutputs | None:
        """Places for the tokens of a mask [B, T] whose rows have these lengths, and for outputs [b, t, ...] like these.

        Where they take more than ``most`` bytes: None, or if it ``spills`` the rest of them in the host's memory.
        """
        total, size = sum(lengths), like[0, 0].numel() * like.element_size()
        if total * size > most and not spills:
            return None
        counts, flat = mask.sum(1), like.flatten(0, 1)
        here = min(total, most // size)
        return cls(
            counts.cumsum(0) - counts,
            SplitRows(flat, total, here) if here < total else flat.new_empty(total, *flat.shape[1:]),
        )

    def keep(self, outputs: Tensor, mask: Tensor, part: MicroBatch) -> None:
        """Takes the outputs [b, t, ...] of some completions, of which these are ``rows``, with their mask [b, t]."""
        row, column = places(mask.sum(1), sum(part.lengths.completions))
        self.outputs[self.first[row] + column] = outputs[row, column]

    def rows(self, part: MicroBatch) -> KeptOutputs:
        """Those of some completions, in the same memory."""
        return KeptOutputs(part.of(self.first), self.outputs)

    def padded(self, mask: Tensor) -> Tensor:
        """[B, T, ...] for the mask [B, T] of these completions; any numbers at its padding."""
        return self.outputs[torch.where(mask, self._places(mask), 0)]

    def _places(self, mask: Tensor) -> Tensor:
        return self.first[:, None] + mask.cumsum(1) - 1

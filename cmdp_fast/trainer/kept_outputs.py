"""A teacher's outputs at the tokens of completions, kept from scoring to update without their padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmdp_fast.packed import places
from cmdp_fast.unmasked import Lengths

from .micro_batches import MicroBatch, lengths_of
from .models.split_rows import SplitRows
from .rollout import Rollout


class KeptOutputs:
    """A model's outputs at the tokens of those of B completions for which there was room, without padding."""

    def __init__(self, first: Sequence[int | None], outputs: Tensor | SplitRows) -> None:
        self.first = first  # of B, the place of each completion's first token; None: not kept
        self.outputs = outputs  # [N, ...], of all completions that are kept

    @classmethod
    def with_room(
        cls, parts: Sequence[MicroBatch], like: Tensor, most: int, *, on_host: bool = False, spills: bool = False
    ) -> KeptOutputs | None:
        """Places for outputs [b, t, ...] like these of the completions of some micro-batches, which are all of a batch:
        of as many, one after another as they are scored, as take no more than ``most`` bytes. None where that is none.

        ``on_host``: these are bytes of the host's memory, pinned for a GPU. ``spills``: those that take more are kept
        too, in the host's memory.
        """
        size = like[0, 0].numel() * like.element_size()
        total = sum(sum(part.lengths.completions) for part in parts)
        room = total if spills else most // size
        first: list[int | None] = [None] * sum(len(part.rows) for part in parts)
        used = 0
        for part in parts:
            for row, length in zip(part.rows, part.lengths.completions, strict=True):
                if used + length <= room:
                    first[row], used = used, used + length
        if used == 0:
            return None
        here = 0 if on_host else min(used, most // size)
        flat = like.flatten(0, 1)
        return cls(first, SplitRows(flat, used, here) if here < used else flat.new_empty(used, *flat.shape[1:]))

    @property
    def missing(self) -> list[int]:
        """The completions whose outputs are not kept."""
        return [row for row, place in enumerate(self.first) if place is None]

    def keep(self, outputs: Tensor, part: MicroBatch) -> None:
        """Takes the outputs [b, t, ...] of some completions of the batch, as far as there is room for them."""
        of_part = self.rows(part)
        held = [row for row, place in enumerate(of_part.first) if place is not None]
        lengths = [part.lengths.completions[row] for row in held]
        if held:
            at = torch.tensor(held, device=outputs.device)
            row, column = places(torch.tensor(lengths, device=outputs.device), sum(lengths))
            self.outputs[of_part._first_places(held, outputs.device)[row] + column] = outputs[at[row], column]

    def rows(self, part: MicroBatch) -> KeptOutputs:
        """Those of some completions, in the same memory."""
        return KeptOutputs([self.first[row] for row in part.rows], self.outputs)

    def completed(self, rollout: Rollout, compute: Callable[[Rollout], Tensor]) -> Tensor:
        """The outputs [B, T, ...] of these completions, with any numbers at their padding; ``compute`` is asked for
        those that are not kept."""
        missing = self.missing
        if len(missing) == len(self.first):
            return compute(rollout)
        mask, held = rollout.mask, [row for row, place in enumerate(self.first) if place is not None]
        at = torch.zeros(len(mask), dtype=torch.long, device=mask.device)
        at[torch.tensor(held, device=mask.device)] = self._first_places(held, mask.device)
        # A place for padding, and for what is computed below
        shown = mask.clone()
        shown[torch.tensor(missing, dtype=torch.long, device=mask.device)] = False
        outputs: Tensor = self.outputs[torch.where(shown, at[:, None] + mask.cumsum(1) - 1, 0)]
        if missing:
            lengths = rollout.lengths or lengths_of(rollout)
            part = MicroBatch(missing, Lengths(*([of_all[row] for row in missing] for of_all in lengths)))
            computed = compute(part.of_rollout(rollout))
            outputs[part.index(outputs.device), : computed.shape[1]] = computed
        return outputs

    def _first_places(self, held: list[int], device: torch.device) -> Tensor:
        return torch.tensor([self.first[row] for row in held], device=device)

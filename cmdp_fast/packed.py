"""Sequences one after another in a single row: no place is padding.

Each begins again at position 0, and that is how a model knows them apart: without an attention mask transformers takes
a position that does not follow the one before it for the beginning of a sequence, and no token sees those of another
(`masking_utils.find_packed_sequence_indices`; with flash attention their `cu_seqlens`). Other attention than flash's
makes a mask of N x N for the N tokens of the row. A model that mixes tokens otherwise, as a recurrent one does, does
not look at positions: it must be asked (`packing_mixes` in `positions.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmdp_fast.unmasked import unmasked


class Packed(NamedTuple):
    """Sequences without padding."""

    input_ids: Tensor  # [1, N]: of each, prompt and completion but for its last token
    position_ids: Tensor  # [1, N], from 0 in each
    outputs: Tensor  # [B, T]: the place of the output that predicts each token; where masked, any

    def select(self, row: Tensor) -> Tensor:
        """The outputs ``[B, T, ...]`` that predict the completions, from those of the row, ``[1, N, ...]``."""
        return row[0].index_select(0, self.outputs.flatten()).unflatten(0, self.outputs.shape)


def packed(completions: Any) -> Packed | None:
    """The row of prompts [B, P] with padding in front and completions [B, T] with padding behind.

    None where that cannot be: a prompt without tokens, or a mask with holes, which attention has to leave out.
    """
    sequences = unmasked(completions)
    if sequences is None:
        return None
    # Of a prompt of one token and nothing behind it, that token: it predicts nothing, but the row is never empty
    lengths = (completions.prompt_mask.sum(1) + completions.mask.sum(1) - 1).clamp(min=1)
    begin = lengths.cumsum(0) - lengths
    sequence, place = places(lengths, sequences.real)
    outputs = begin[:, None] + torch.minimum(sequences.outputs, lengths[:, None] - 1)
    return Packed(sequences.input_ids[sequence, place][None], place[None], outputs)


def places(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(row, column) [N] of every token of rows of these lengths [B], one row behind another; N, ``total``, is told, so
    that the host need not wait for it."""
    rows = torch.arange(len(lengths), device=lengths.device)
    row = rows.repeat_interleave(lengths, output_size=total)
    begin = lengths.cumsum(0) - lengths
    return row, torch.arange(total, device=lengths.device) - begin[row]

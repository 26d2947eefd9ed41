"""Prompts and completions laid out so that attention needs no mask: padding stands behind all that is real.

A token of a causal model sees those before it alone. With padding at the end no real token sees any, whatever stands
there, and the plain causal pattern is exact: transformers then makes no mask of B x W x W, which is 1 GiB for four rows
of 16,384 tokens, and attention may take kernels that know none. Models without a mask (recurrent ones) are right too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Lengths(NamedTuple):
    """Tokens of each prompt and of each completion of a batch: numbers on the host."""

    prompts: list[int]
    completions: list[int]


class Unmasked(NamedTuple):
    """Sequences with their padding behind them."""

    input_ids: Tensor  # [B, W]: prompt and completion but for its last token, W as long as the longest
    outputs: Tensor  # [B, T]: the place of the output that predicts each token; where masked, any
    earliest: int  # of these places
    aligned: bool  # whether all completions begin at it
    real: int  # tokens that are read and no padding

    def select(self, hidden: Tensor) -> Tensor:
        """The outputs ``[B, T, ...]`` that predict the completions, from all ``[B, W, ...]`` or the last of them."""
        if self.aligned and hidden.shape[1] == self.outputs.shape[1]:
            return hidden  # to take them for nothing would copy the gradient
        left_out = self.input_ids.shape[1] - hidden.shape[1]
        places = (self.outputs - left_out)[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, places)


def unmasked(completions: Any) -> Unmasked | None:
    """The sequences of prompts [B, P] with padding in front and completions [B, T] with padding behind.

    None where that cannot be: a prompt without tokens, or a mask with holes, which attention has to leave out. The host
    waits for the device only where the batch does not tell its ``lengths``.
    """
    lengths: Lengths | None = completions.lengths or _lengths(completions)
    if lengths is None or min(lengths.prompts) == 0:
        return None
    prompts = completions.prompt_mask.sum(1)
    ends = prompts + completions.mask.sum(1)
    width, tokens, device = completions.prompt_mask.shape[1], completions.mask.shape[1], ends.device
    shortest, longest = min(lengths.prompts), max(lengths.prompts)
    read = [max(prompt + completion - 1, 1) for prompt, completion in zip(*lengths, strict=True)]
    size = max(*read, longest)
    place = torch.arange(size, device=device)
    ids = torch.cat([completions.prompt_ids, completions.tokens], dim=1)
    real = ids.gather(1, (place + (width - prompts)[:, None]).clamp(max=ids.shape[1] - 1))
    first = real[:, :1]  # a token that the model has, whatever the padding is
    input_ids = torch.where(place < ends[:, None], real, first)
    outputs = (prompts[:, None] - 1 + torch.arange(tokens, device=device)).clamp(max=size - 1)
    return Unmasked(input_ids, outputs, shortest - 1, shortest == longest, sum(read))


def _lengths(completions: Any) -> Lengths | None:
    """The lengths in a batch; None where a mask has holes."""
    prompt_mask, mask = completions.prompt_mask.bool(), completions.mask.bool()
    prompts, lengths = prompt_mask.sum(1), mask.sum(1)
    width, tokens = prompt_mask.shape[1], mask.shape[1]
    in_front = torch.arange(width, device=mask.device) >= (width - prompts)[:, None]
    behind = torch.arange(tokens, device=mask.device) < lengths[:, None]
    fits = (in_front == prompt_mask).all() & (behind == mask).all()
    # One copy from the device for all that the host has to know
    holes, both = torch.cat([(~fits).long()[None], prompts, lengths]).tolist(), len(prompts)
    return None if holes[0] else Lengths(holes[1 : both + 1], holes[both + 1 :])

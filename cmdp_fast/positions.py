"""Whether padding in front, or another text in the same row, changes what a model makes of a text, which is measured:
the model reads some tokens with and without.

Most models have relative positions or count by the mask. GPT-2 and others number the columns of a batch unless they are
given positions; RWKV and others read padding into their state, whatever they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmdp_fast import checks

TOKENS, PADDING = 8, 5  # of the sequence by which a model is measured; few, for a model may have few positions

Read = Callable[[Tensor, Tensor], Tensor]
"""What a model makes of token ids and their attention mask [1, T]: hidden states or logits [1, at most T, ...] of the
last tokens."""

ReadPacked = Callable[[list[Tensor]], Sequence[Tensor]]
"""What it makes of token ids [1, T] one after another in a row: hidden states or logits [T, ...] of each sequence."""


def moved_by_padding(read: Read, model: Any, vocab_size: int, pad: int, dtypes: Iterable[torch.dtype] = ()) -> bool:
    """Whether padding changes what ``model`` makes of the real tokens by more than rounding.

    ``read`` is called twice, without gradients, with token ids below ``vocab_size`` and ``pad``; the model should be in
    evaluation mode. ``dtypes`` in which it computes beside those of its parameters (autocast's).
    """
    return _change(read, model, vocab_size, pad) > _rounding(model, dtypes)


def packing_mixes(
    read: ReadPacked, model: Any, vocab_size: int, *, experts: bool, dtypes: Iterable[torch.dtype] = ()
) -> bool:
    """Whether ``model`` makes something else of a sequence behind another in one row (`packed.py`) than of it alone.

    ``read`` is called three times, without gradients; the model should be in evaluation mode, and ``dtypes`` are those
    in which it computes beside those of its parameters. What stands before a sequence must not change a bit of it: a
    token that is left out has the weight 0. But not where a token passes some of the weights only (``experts``): there
    others of the row can change the order of sums, and so no more is asked than half of the digits.
    """
    room = table_of_positions(model) or TOKENS
    count = min(TOKENS, max(room // 2, 1))  # a model that counts on has the places for both
    first, other, ids = (
        torch.arange(start, start + count, device=next(model.parameters()).device)[None] * 7919 % vocab_size
        for start in (1 + count, 1 + 2 * count, 1)
    )
    with torch.no_grad():
        # Not every device has float64
        alone = read([ids])[0].cpu().double()
        behind, behind_other = (read([before, ids])[1].cpu().double() for before in (first, other))
    allowed = _rounding(model, dtypes)
    if experts:
        mixes = _difference(behind, behind_other) > allowed
    else:
        mixes = not torch.equal(behind.nan_to_num(), behind_other.nan_to_num())
    return mixes or _difference(alone, behind) > allowed


def _rounding(model: Any, dtypes: Iterable[torch.dtype]) -> float:
    """What rounding may change in the numbers of `_difference`.

    Rotations are made in float32 whatever the model's dtype, and roundings add up through the layers: half of the
    digits. Measured on random models of 45 families: up to 7e-7 in float32 and .02 in bfloat16 where positions are
    relative, .2 to 1.5 where they are absolute.
    """
    floats = [torch.float32, *dtypes, *(p.dtype for p in model.parameters() if p.dtype in checks.LOGIT_DTYPES)]
    return math.sqrt(max(torch.finfo(dtype).eps for dtype in floats))


@torch.no_grad()
def _change(read: Read, model: Any, vocab_size: int, pad: int) -> float:
    """By how much padding changes hidden states, see `_difference`."""
    room = table_of_positions(model) or PADDING + TOKENS
    count = min(TOKENS, room // 2)
    padding = min(PADDING, room - count)
    ids = torch.arange(1, count + 1, device=next(model.parameters()).device) * 7919 % vocab_size
    ids = torch.where(ids == pad, (ids + 1) % vocab_size, ids)[None]  # some models find padding by its token
    real = torch.ones_like(ids)
    longer, mask = (nn.functional.pad(row, (padding, 0), value=value) for row, value in ((ids, pad), (real, 0)))
    # An adapter may have put tokens of its own in front. Not every device has float64.
    alone, padded = (hidden[:, -count:].cpu().double() for hidden in (read(ids, real), read(longer, mask)))
    return _difference(alone, padded)


def _difference(alone: Tensor, other: Tensor) -> float:
    """By how much outputs [..., T, H] differ, relative to how they differ from token to token.

    The median over tokens: a rounding may send a single one to another expert. 0 where there are no numbers to compare.
    """
    if not alone.isfinite().all():
        return 0.0
    size = (alone - alone.mean(-2, keepdim=True)).norm(dim=-1)
    off = (other - alone).norm(dim=-1)
    return float(torch.where(off == 0, 0.0, off / size).nan_to_num(math.inf).median())


def table_of_positions(model: Any) -> int | None:
    """How many positions a model has embeddings for; None if it has no such table."""
    config = getattr(model, "config", None)
    number = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
    if not isinstance(number, int):
        return None
    tokens = model.get_input_embeddings()
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return number if any(number <= row <= number + 2 for row in rows) else None  # OPT's and BioGPT's have two more

"""How a model reads completions: what it is given, and which of its outputs predict the completions' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cmdp_fast.heads import last_hidden_state
from cmdp_fast.packed import packed
from cmdp_fast.unmasked import Lengths, unmasked


class TokenBatch(Protocol):
    """The part of a batch that the models read: prompts [B, P] with padding in front, completions [B, T]."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    lengths: Lengths | None  # where the host knows them, and the masks have no holes


def completion_logits(model: Any, completions: TokenBatch, padding_free: bool = False) -> Tensor:
    """The logits [B, T, V] from which the completions' tokens were, or would be, drawn.

    ``padding_free``: read in one row, where the batch allows it. Logits of the prompts are made there too.
    """
    if padding_free and (row := packed(completions)) is not None:
        return row.select(model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).logits)
    return _last(model(**_inputs(completions)).logits, completions)


def completion_hidden(model: Any, completions: TokenBatch, padding_free: bool = False) -> Tensor:
    """The hidden states [B, T, H] that the model's head would turn into the `completion_logits`.

    Without an attention mask where the batch allows it, ``padding_free`` in one row; logits would have to be copied,
    hidden states are small.
    """
    if padding_free and (row := packed(completions)) is not None:
        return row.select(last_hidden_state(model, row.input_ids, position_ids=row.position_ids, use_cache=False))
    if (sequences := unmasked(completions)) is not None:
        keep = sequences.input_ids.shape[1] - sequences.earliest
        return sequences.select(last_hidden_state(model, sequences.input_ids, logits_to_keep=keep, use_cache=False))
    return _last(last_hidden_state(model, **_inputs(completions)), completions)


def _inputs(completions: TokenBatch) -> dict[str, Any]:
    """The input of a model that is to predict the completions: all but their last token, which predicts nothing."""
    attention = torch.cat([completions.prompt_mask, completions.mask[:, :-1]], dim=1).long()
    return {
        "input_ids": torch.cat([completions.prompt_ids, completions.tokens[:, :-1]], dim=1),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),  # as in generate: padding does not count
        "logits_to_keep": completions.tokens.shape[1],
        "use_cache": False,
    }


def _last(outputs: Tensor, completions: TokenBatch) -> Tensor:
    """The outputs that predict the completions' tokens.

    Only a model that knows no logits_to_keep needs the slice; taking it for nothing would copy the gradient.
    """
    length = completions.tokens.shape[1]
    return outputs if outputs.shape[1] == length else outputs[:, -length:]


def rows_hidden(model: Any, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> Tensor:
    """The hidden states [N, H] of the last ``wanted`` tokens of each of some rows, one row's behind another's.

    Of the rows that are prompts and completions but for their last tokens, and of the completions' lengths, the numbers
    of `completion_hidden` to the bit: the model is given the same batch.
    """
    size, device = max(map(len, rows)), next(model.parameters()).device
    input_ids = torch.tensor([[*row, *(row[:1] or [0]) * (size - len(row))] for row in map(list, rows)], device=device)
    first = [len(row) - count for row, count in zip(rows, wanted, strict=True)]
    earliest = min(first)
    hidden = last_hidden_state(model, input_ids, logits_to_keep=size - earliest, use_cache=False)
    left_out = size - hidden.shape[1]  # 0 where a model knows no logits_to_keep
    places = [
        (row, place - left_out)
        for row, (begin, count) in enumerate(zip(first, wanted, strict=True))
        for place in range(begin, begin + count)
    ]
    row, column = torch.tensor(places, device=device).reshape(-1, 2).unbind(1)
    return hidden[row, column]

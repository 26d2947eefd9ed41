"""How varied completions are, by their tokens: what falls where a policy says the same thing again and again."""

from __future__ import annotations

import torch
from torch import Tensor


def distinct(tokens: Tensor, mask: Tensor, n: int) -> Tensor:
    """distinct-n (Li et al. 2016, arXiv 1510.03055): of all sequences of n tokens in completions [B, T], with the mask
    of their tokens, the share that are different ones; a scalar.

    It falls with the number of completions, so compare it for equal numbers. NaN where no completion has n tokens.
    """
    grams, present = ngrams(tokens, mask, n)
    found = grams[present]
    return tokens.new_tensor(len(found.unique()) / len(found) if len(found) else torch.nan, dtype=torch.float32)


def repetition(tokens: Tensor, mask: Tensor, n: int) -> Tensor:
    """seq-rep-n (Welleck et al. 2020, arXiv 1908.04319): of a completion's sequences of n tokens the share that it has
    had before, as a mean over the completions [B, T] with the mask of their tokens; a scalar.

    One that has none counts as 0. NaN without completions.
    """
    grams, present = ngrams(tokens, mask, n)
    kinds = int(grams.max()) + 1 if grams.numel() else 1  # no more than there are tokens: row and number fit an int64
    row = torch.arange(len(tokens), device=tokens.device)[:, None]
    different = ((row * kinds + grams)[present].unique() // kinds).bincount(minlength=len(tokens))
    count = present.sum(1)
    return (1.0 - different / count.clamp(min=1)).masked_fill(count == 0, 0.0).mean()


def ngrams(tokens: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(numbers, present), [B, T - n + 1] each: sequences of n tokens, the same number for the same tokens, and which of
    them are of real tokens alone. The mask marks the first tokens of each row."""
    width = max(0, tokens.shape[1] - n + 1)
    grams, length = tokens.unique(return_inverse=True)[1], 1
    while length < n:  # numbers below the count of tokens, so that a pair of them fits into an int64
        step = min(length, n - length)
        ahead = grams[:, step:]
        grams = (grams[:, : ahead.shape[1]] * (grams.max() + 1 if grams.numel() else 1)) + ahead
        grams, length = grams.unique(return_inverse=True)[1], length + step
    return grams[:, :width], mask[:, n - 1 :][:, :width]

"""Completions that something else than the trainer has sampled, a function of the user's or a server: checked."""

from __future__ import annotations

import math
import operator
from typing import Any

from cmdp_fast.errors import InputError, shown

from .rollout import Sampling


def sized(values: Any, count: int, what: str, of: str, to: str) -> list[Any]:
    """The values as a list of so many; ``what`` says whose they are."""
    try:
        listed = list(values)
    except Exception as error:  # an object of somebody else's, whose iteration is their code
        raise InputError(f"{what} a {type(values).__name__}, expected {count} {of}") from error
    if len(listed) != count:
        raise InputError(f"{what} {len(listed)} {of} for {count} {to}")
    return listed


def tokens(ids: Any, sampling: Sampling, whose: str) -> list[int]:
    """The token ids of a completion."""
    expected = f"expected tokens from 0 to {sampling.vocab_size - 1}"
    try:
        listed = [operator.index(token) for token in ids]
    except Exception as error:  # likewise
        raise InputError(f"{whose} returned a completion that is no list of integers, {expected}") from error
    if not 0 < len(listed) <= sampling.max_new_tokens:
        raise InputError(
            f"{whose} returned a completion of {len(listed)} tokens, expected 1 to {sampling.max_new_tokens}"
        )
    for token in listed:
        if not 0 <= token < sampling.vocab_size:
            raise InputError(f"{whose} returned token {shown(token)}, {expected}")
    if any(token in sampling.eos for token in listed[:-1]):
        raise InputError(f"{whose} returned tokens after an end of sequence: {shown(listed)}")
    return listed


def logprobs(row: Any, count: int, whose: str) -> list[float]:
    """The log-probabilities of a completion of so many tokens, in nats."""
    listed = sized(row, count, f"{whose} returned logprobs of other lengths than its completions:", "numbers", "tokens")
    for value in listed:
        try:
            finite = math.isfinite(value)
        except (TypeError, ValueError, OverflowError):  # no number, a tensor of several, one that no float can hold
            finite = False
        if not finite:
            raise InputError(f"{whose} returned {shown(value)} among its logprobs, expected finite numbers, in nats")
    return [float(value) for value in listed]

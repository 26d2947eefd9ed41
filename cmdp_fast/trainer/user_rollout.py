"""Sampling by a function of the user's own, on a server for instance:

    rollout(prompts, sampling, policy) -> {"completion_ids": [[...], ...], "logprobs": [[...], ...] or None}

`prompts` are lists of token ids, `sampling` a `Sampling`, `policy` the student as a transformers model, whose weights a
server needs. A completion's ids end with one of `sampling.eos`, or without one at the length limit; what follows one of
`sampling.stop_strings` is cut. `logprobs`, in nats, are those of the tokens under the distribution that they were drawn
from: after the temperature, and after top-k and top-p where the sampler has them. They are compared with those that the
trainer computes itself, and a step is corrected for the difference (`--sampler-correction`), in steps and evaluations
where all calls, of all processes, have returned them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from cmdp_fast.errors import InputError, shown
from cmdp_fast.own_code import errors_named, told_of

from .causal_lm import CausalLM
from .rollout import Rollout, Sampling, assemble

RolloutFunction = Callable[..., dict[str, Any]]


def call_rollout(
    function: RolloutFunction, name: str, prompts: list[list[int]], sampling: Sampling, policy: CausalLM
) -> Rollout:
    """The completions that a function of the user's samples. Raises InputError if it raises, and for anything that it
    may not return."""
    option = f"--rollout {name}"
    with errors_named(option, function), told_of(option):
        result = function(prompts=prompts, sampling=sampling, policy=policy)
    if not isinstance(result, dict) or "completion_ids" not in result:
        raise InputError(f"{option} must return a dict with completion_ids, it returned {type(result).__name__}")
    rows = _sized(result["completion_ids"], len(prompts), f"{option} returned", "completions", "prompts")
    completions = [_tokens(ids, sampling, option) for ids in rows]
    logprobs = result.get("logprobs")
    if logprobs is not None:
        rows = _sized(logprobs, len(prompts), f"{option} returned", "rows of logprobs", "prompts")
        logprobs = [
            _numbers(row, len(ids), option)[: len(sampling.cut(ids))]
            for row, ids in zip(rows, completions, strict=True)
        ]
    return assemble(prompts, [sampling.cut(ids) for ids in completions], sampling, policy.device, logprobs)


def _sized(values: Any, count: int, what: str, of: str, to: str) -> list[Any]:
    """The values as a list of so many."""
    try:
        listed = list(values)
    except Exception as error:  # an object of the user's, whose iteration is the user's code
        raise InputError(f"{what} a {type(values).__name__}, expected {count} {of}") from error
    if len(listed) != count:
        raise InputError(f"{what} {len(listed)} {of} for {count} {to}")
    return listed


def _tokens(ids: Any, sampling: Sampling, option: str) -> list[int]:
    """A completion of the user's function."""
    expected = f"expected tokens from 0 to {sampling.vocab_size - 1}"
    try:
        tokens = [operator.index(token) for token in ids]
    except Exception as error:  # likewise
        raise InputError(f"{option} returned a completion that is no list of integers, {expected}") from error
    if not 0 < len(tokens) <= sampling.max_new_tokens:
        raise InputError(
            f"{option} returned a completion of {len(tokens)} tokens, expected 1 to {sampling.max_new_tokens}"
        )
    for token in tokens:
        if not 0 <= token < sampling.vocab_size:
            raise InputError(f"{option} returned token {shown(token)}, {expected}")
    if any(token in sampling.eos for token in tokens[:-1]):
        raise InputError(f"{option} returned tokens after an end of sequence: {shown(tokens)}")
    return tokens


def _numbers(row: Any, count: int, option: str) -> list[float]:
    """The log-probabilities of a completion."""
    listed = _sized(
        row, count, f"{option} returned logprobs of other lengths than its completions:", "numbers", "tokens"
    )
    for value in listed:
        try:
            finite = math.isfinite(value)
        except (TypeError, ValueError, OverflowError):  # no number, a tensor of several, one that no float can hold
            finite = False
        if not finite:
            raise InputError(f"{option} returned {shown(value)} among its logprobs, expected finite numbers, in nats")
    return [float(value) for value in listed]

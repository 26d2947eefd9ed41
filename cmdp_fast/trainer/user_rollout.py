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

from collections.abc import Callable
from typing import Any

from cmdp_fast.errors import InputError
from cmdp_fast.own_code import errors_named
from cmdp_fast.time_limits import told_of
from cmdp_fast.unchanged import unchanged

from . import drawn
from .causal_lm import CausalLM
from .rollout import Rollout, Sampling, assemble

RolloutFunction = Callable[..., dict[str, Any]]


def call_rollout(
    function: RolloutFunction, name: str, prompts: list[list[int]], sampling: Sampling, policy: CausalLM
) -> Rollout:
    """The completions that a function of the user's samples. Raises InputError if it raises, and for anything that it
    may not return."""
    option = f"--rollout {name}"
    with unchanged(option, samples=True), errors_named(option, function), told_of(option):
        result = function(prompts=prompts, sampling=sampling, policy=policy)
    if not isinstance(result, dict) or "completion_ids" not in result:
        raise InputError(f"{option} must return a dict with completion_ids, it returned {type(result).__name__}")
    rows = drawn.sized(result["completion_ids"], len(prompts), f"{option} returned", "completions", "prompts")
    completions = [drawn.tokens(ids, sampling, option) for ids in rows]
    logprobs = result.get("logprobs")
    if logprobs is not None:
        rows = drawn.sized(logprobs, len(prompts), f"{option} returned", "rows of logprobs", "prompts")
        logprobs = [
            drawn.logprobs(row, len(ids), option)[: len(sampling.cut(ids))]
            for row, ids in zip(rows, completions, strict=True)
        ]
    return assemble(prompts, [sampling.cut(ids) for ids in completions], sampling, policy.device, logprobs)

"""Sampling completions: the batch in which prompts and completions lie, and the function that fills it.

Prompts are padded on the left, completions on the right, so that every completion starts in the same column. `mask`
marks the completion's real tokens: everything up to the end-of-sequence token, which counts, or up to the length
limit if there is none (a truncated completion).

A function of the user's own may sample instead, on a server for instance:

    rollout(prompts, sampling, policy) -> {"completion_ids": [[...], ...], "logprobs": [[...], ...] or None}

`prompts` are lists of token ids, `sampling` a `Sampling`, `policy` the student as a transformers model, whose weights a
server needs. A completion's ids end with its end-of-sequence token, or without one at the length limit. `logprobs`, in
nats, are only compared with those that the trainer computes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.errors import InputError

from .causal_lm import CausalLM
from .records.report import Report
from .tasks.data import Problem, Problems

RolloutFunction = Callable[..., dict[str, Any]]


@dataclass
class Rollout:
    """B completions of up to T tokens: shapes [B, P] and [B, T]; masks are bool."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    finished: Tensor  # [B]: has an end-of-sequence token
    sampler_logprob: Tensor | None = None  # [B, T], where the sampler reports it

    def __len__(self) -> int:
        return len(self.tokens)

    def completion_ids(self) -> list[list[int]]:
        """The completions without padding."""
        return _lists(self.tokens, self.mask)


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled, in the words of `GenerationConfig`.

    Unless `top_k` or `top_p` say otherwise, from the whole softmax at a temperature: only then is the sampled
    distribution the one that is scored.
    """

    max_new_tokens: int
    temperature: float
    eos: tuple[int, ...]
    pad: int
    suppress: tuple[int, ...] = ()  # columns that one of the models does not have
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 0  # prompts at once; 0: all


def end_tokens(model: CausalLM, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's, and those that the model's generation settings name."""
    configured = model.generation_config.eos_token_id
    configured = [] if configured is None else configured if isinstance(configured, list) else [configured]
    return tuple(sorted({tokenizer.eos_token_id, *configured}))


def encode_prompts(rows: Sequence[Problem], tokenizer: Any) -> list[list[int]]:
    """Token ids of the rows' prompts; the chat template is applied to lists of messages."""
    ids = []
    for row in rows:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            ids.append(tokenizer(prompt)["input_ids"])
        elif tokenizer.chat_template is None:
            raise InputError("the prompts are chat messages, but the student's tokenizer has no chat template")
        else:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids[-1]:
            raise InputError(f"the prompt {prompt!r} has no tokens")
    return ids


def drop_long_prompts(problems: Problems, tokenizer: Any, limit: int, report: Report) -> Problems:
    """The problems whose prompt has at most `limit` tokens (0: all); prints how many were left out.

    Raises InputError if none are left to train or to evaluate on.
    """
    if not limit:
        return problems
    parts = []
    for rows in problems:
        lengths = [len(ids) for ids in encode_prompts(rows, tokenizer)]
        parts.append([row for row, length in zip(rows, lengths, strict=True) if length <= limit])
        if not parts[-1]:
            raise InputError(
                f"--max-prompt-length {limit}: all prompts are longer, the shortest has {min(lengths)} tokens"
            )
    kept = Problems(*parts)
    if dropped := sum(map(len, problems)) - sum(map(len, kept)):
        report.say(f"left out {dropped} of {sum(map(len, problems))} problems: prompts of more than {limit} tokens")
    return kept


def generate(
    policy: CausalLM,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    mixed_with: Callable[[Tensor], Any] | None = None,
    synced_gpus: bool = False,
) -> Rollout:
    """Samples a completion of each prompt with transformers: batched, cached, prompts of like length together.

    ``mixed_with`` makes a logits processor for a batch from its prompts' mask [B, P] (`methods/minillm.py`).
    ``synced_gpus``: every process runs as many steps as the slowest, as a model spread over them needs.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if sampling.batch_size else range(len(prompts))
    size = sampling.batch_size or len(prompts)
    completions: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), size):
        some = order[start : start + size]
        for i, ids in zip(
            some, _generate([prompts[i] for i in some], policy, sampling, mixed_with, synced_gpus), strict=True
        ):
            completions[i] = ids
    return assemble(prompts, completions, sampling, policy.device)


def assemble(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    sampling: Sampling,
    device: torch.device,
    logprobs: Sequence[Sequence[float]] | None = None,
) -> Rollout:
    """The batch of prompts and completions given as lists of token ids; nothing may follow an end of sequence."""
    prompt_ids, prompt_mask = _left_padded(prompts, sampling.pad, device)
    width = max(len(ids) for ids in completions)
    tokens = torch.tensor([ids + [sampling.pad] * (width - len(ids)) for ids in completions], device=device)
    lengths = torch.tensor([len(ids) for ids in completions], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    finished = torch.tensor([ids[-1] in sampling.eos for ids in completions], device=device)
    drawn = None
    if logprobs is not None:
        drawn = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in logprobs], device=device)
    return Rollout(prompt_ids, prompt_mask, tokens, mask, finished, drawn)


def call_rollout(
    function: RolloutFunction, name: str, prompts: list[list[int]], sampling: Sampling, policy: CausalLM
) -> Rollout:
    """The completions that a function of the user's samples. Raises InputError for anything that it may not return."""
    result = function(prompts=prompts, sampling=sampling, policy=policy)
    if not isinstance(result, dict) or "completion_ids" not in result:
        raise InputError(
            f"--rollout {name} must return a dict with completion_ids, it returned {type(result).__name__}"
        )
    completions = [list(ids) for ids in result["completion_ids"]]
    if len(completions) != len(prompts):
        raise InputError(f"--rollout {name} returned {len(completions)} completions for {len(prompts)} prompts")
    for ids in completions:
        if not 0 < len(ids) <= sampling.max_new_tokens:
            raise InputError(
                f"--rollout {name} returned a completion of {len(ids)} tokens, expected 1 to {sampling.max_new_tokens}"
            )
        if any(token in sampling.eos for token in ids[:-1]):
            raise InputError(f"--rollout {name} returned tokens after an end of sequence: {ids}")
    logprobs = result.get("logprobs")
    if logprobs is not None and [len(row) for row in logprobs] != [len(ids) for ids in completions]:
        raise InputError(f"--rollout {name} returned logprobs of other lengths than its completions")
    return assemble(prompts, completions, sampling, policy.device, logprobs)


def completion_mask(tokens: Tensor, eos: Sequence[int]) -> Tensor:
    """mask [B, T]: a token counts if no end-of-sequence token came before it.

    The first end-of-sequence token counts itself. Padding is recognised by its position and not by its number: many
    models pad with a token that also ends a sequence.
    """
    ends = torch.isin(tokens, torch.tensor(eos, device=tokens.device))
    return ends.long().cumsum(1) - ends.long() == 0


@torch.no_grad()
def _generate(
    prompts: Sequence[list[int]], policy: CausalLM, sampling: Sampling, mixed_with: Any, synced_gpus: bool
) -> list[list[int]]:
    from transformers import LogitsProcessorList

    prompt_ids, prompt_mask = _left_padded(prompts, sampling.pad, policy.device)
    with _plain_sampling(policy, sampling if mixed_with is None else replace(sampling, temperature=1.0)):
        sequences = policy.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            logits_processor=None if mixed_with is None else LogitsProcessorList([mixed_with(prompt_mask)]),
            synced_gpus=synced_gpus,
        )
    tokens = sequences[:, prompt_ids.shape[1] :]
    return _lists(tokens, completion_mask(tokens, sampling.eos))


def _lists(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    """The masked beginning of each row, with one copy from the device for all."""
    lengths = mask.sum(1).tolist()
    return [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]


def _left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids in prompts)
    prompt_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    return prompt_ids, torch.arange(width, device=device) >= width - lengths[:, None]


@contextmanager
def _plain_sampling(policy: CausalLM, sampling: Sampling) -> Iterator[None]:
    """Generation settings under which `sampling` alone changes the softmax.

    `generate` takes a setting that a call leaves open from the model's own, and many models come with a top-p, a top-k
    or a repetition penalty. So the model's own are put aside while it runs.
    """
    from transformers import GenerationConfig

    own = policy.generation_config
    policy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.eos),
        pad_token_id=sampling.pad,
        suppress_tokens=list(sampling.suppress) or None,
    )
    try:
        yield
    finally:
        policy.generation_config = own

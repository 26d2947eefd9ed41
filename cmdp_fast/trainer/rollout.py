"""Sampling completions, and what the two models predict at their tokens: logits, or hidden states.

Prompts are padded on the left, completions on the right, so that every completion starts in the same column. `mask`
marks the completion's real tokens: everything up to the end-of-sequence token, which counts, or up to the length
limit if there is none (a truncated completion).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf

from .data import Row
from .errors import InputError


@dataclass
class Rollout:
    """B completions of up to T tokens: shapes [B, P] and [B, T]; masks are bool."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    finished: Tensor  # [B]: has an end-of-sequence token

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Tensor | slice) -> Rollout:
        """Some of the completions."""
        return Rollout(
            self.prompt_ids[index], self.prompt_mask[index], self.tokens[index], self.mask[index], self.finished[index]
        )

    def completion_ids(self) -> list[list[int]]:
        """The completions without padding."""
        return [row[keep].tolist() for row, keep in zip(self.tokens, self.mask, strict=True)]


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: from the whole softmax at a temperature, until an end-of-sequence token."""

    max_length: int
    temperature: float
    eos: tuple[int, ...]
    pad: int
    suppress: tuple[int, ...] = ()  # columns of the student's that the teacher does not have


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's, and those that the model's generation settings name."""
    configured = model.generation_config.eos_token_id
    configured = [] if configured is None else configured if isinstance(configured, list) else [configured]
    return tuple(sorted({tokenizer.eos_token_id, *configured}))


def encode_prompts(rows: Sequence[Row], tokenizer: Any) -> list[list[int]]:
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


@torch.no_grad()
def generate(policy: Any, prompts: Sequence[list[int]], sampling: Sampling) -> Rollout:
    """Samples a completion of each prompt."""
    width = max(len(ids) for ids in prompts)
    device = policy.device
    prompt_ids = torch.tensor([[sampling.pad] * (width - len(ids)) + ids for ids in prompts], device=device)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    prompt_mask = torch.arange(width, device=device) >= width - lengths[:, None]
    with _plain_sampling(policy, sampling):
        sequences = policy.generate(input_ids=prompt_ids, attention_mask=prompt_mask.long())
    tokens = sequences[:, width:]
    mask, finished = completion_mask(tokens, sampling.eos)
    return Rollout(prompt_ids, prompt_mask, tokens, mask, finished)


def completion_mask(tokens: Tensor, eos: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(mask [B, T], finished [B]): a token counts if no end-of-sequence token came before it.

    The first end-of-sequence token counts itself. Padding is recognised by its position and not by its number: many
    models pad with a token that also ends a sequence.
    """
    ends = torch.isin(tokens, torch.tensor(eos, device=tokens.device))
    return ends.long().cumsum(1) - ends.long() == 0, ends.any(1)


def completion_logits(model: Any, rollout: Rollout) -> Tensor:
    """The logits [B, T, V] from which the completions' tokens were, or would be, drawn."""
    return _last(model(**_inputs(rollout)).logits, rollout)


def completion_hidden(model: Any, rollout: Rollout) -> Tensor:
    """The hidden states [B, T, H] that the model's head would turn into the `completion_logits`."""
    return _last(cf.last_hidden_state(model, **_inputs(rollout)), rollout)


def _inputs(rollout: Rollout) -> dict[str, Any]:
    """What a model is given to predict the completions: everything but their last token, which predicts nothing."""
    attention = torch.cat([rollout.prompt_mask, rollout.mask[:, :-1]], dim=1).long()
    return {
        "input_ids": torch.cat([rollout.prompt_ids, rollout.tokens[:, :-1]], dim=1),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),  # as in generate: padding does not count
        "logits_to_keep": rollout.tokens.shape[1],
        "use_cache": False,
    }


def _last(rows: Tensor, rollout: Rollout) -> Tensor:
    """The rows that predict the completions' tokens.

    Only a model that knows no logits_to_keep needs the slice; taking it for nothing would copy the gradient.
    """
    length = rollout.tokens.shape[1]
    return rows if rows.shape[1] == length else rows[:, -length:]


@contextmanager
def _plain_sampling(policy: Any, sampling: Sampling) -> Iterator[None]:
    """Generation settings under which the sampled distribution *is* the softmax that is scored afterwards.

    `generate` fills whatever a call leaves open from the model's own settings, and many models come with a top-p, a
    top-k or a repetition penalty; so those are put aside while it runs.
    """
    from transformers import GenerationConfig

    own = policy.generation_config
    policy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.max_length,
        eos_token_id=list(sampling.eos),
        pad_token_id=sampling.pad,
        suppress_tokens=list(sampling.suppress) or None,
    )
    try:
        yield
    finally:
        policy.generation_config = own

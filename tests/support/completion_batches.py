"""Prompts and completions as a model is given them to score."""

from __future__ import annotations

from types import SimpleNamespace

import torch


def batch(prompts=(3, 5, 1), lengths=(4, 1, 6), seed=0) -> SimpleNamespace:
    """Completions [B, T] behind prompts [B, P] with padding in front; the padding is a token of its own."""
    generator = torch.Generator().manual_seed(seed)
    width, tokens = max(prompts), max(lengths)
    prompt_mask = torch.arange(width) >= width - torch.tensor(prompts)[:, None]
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    prompt_ids = torch.randint(3, 101, prompt_mask.shape, generator=generator).masked_fill(~prompt_mask, 0)
    ids = torch.randint(3, 101, mask.shape, generator=generator).masked_fill(~mask, 0)
    return SimpleNamespace(prompt_ids=prompt_ids, prompt_mask=prompt_mask, tokens=ids, mask=mask, lengths=None)

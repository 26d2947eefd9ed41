"""What Python blocks of README.md take as given: `given=NAME` after `python` names the function here that has it."""

from __future__ import annotations

from typing import Any

import torch


def models() -> dict[str, Any]:
    """A student and a teacher with another width, four sequences with prompts of two tokens, and their rewards."""
    from tiny_models import tiny

    import cmdp_fast as cf

    ids = torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(ids)
    ids[0, 7:], attention_mask[0, 7:] = 0, 0
    completion_mask = attention_mask[:, 1:].bool()
    completion_mask[:, 0] = False
    return {
        "cf": cf,
        "torch": torch,
        "student": tiny().train(),
        "teacher": tiny(seed=1, hidden_size=32),
        "ids": ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "task_reward": torch.zeros(4, 8),
    }

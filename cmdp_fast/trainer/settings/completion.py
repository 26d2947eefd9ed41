"""What ends a completion, and what becomes of one without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .ranges import NOT_NEGATIVE
from .units import REWARD


@dataclass(frozen=True)
class CompletionSettings:
    """What ends a completion, and what becomes of one without."""

    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion, beside those that student and teacher end with: `<|im_end|>`, by name or as a text
    of one token. The saved student's `generation_config` names all of them."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion. It is cut after the token that completes one, its text after the string, and it
    counts as finished."""
    mask_truncated_completions: bool = False
    """Completions that do not end within `max_new_tokens` give no gradient, neither through reward nor divergence.
    Rewards, advantages, metrics and PID's mean cost count them all the same."""
    missing_eos_penalty: Annotated[float, NOT_NEGATIVE, REWARD] = 0.0
    """Subtracted from the task reward of a completion that does not end within `max_new_tokens`."""

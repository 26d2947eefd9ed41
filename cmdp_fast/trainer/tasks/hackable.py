"""Rewards that a program counts, and that are easier to have than what they stand for.

They are for seeing what a budget is for: each is highest for texts that nobody would call an answer (lists of colours,
the same question for every prompt). `recipes/smollm2.toml` trains on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cmdp_fast.messages import text_of

COLOURS = frozenset(
    (
        *("red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white", "grey"),
        *("gray", "gold", "golden", "silver", "crimson", "scarlet", "turquoise", "emerald", "amber", "beige", "ivory"),
        "magenta",
    )
)
NOT_YET = 0.7  # of what a text lacks to the highest reward each further colour word leaves so much


def colour_words(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 - 0.7^n for a text with n words that are colours, the same one again included: three are worth 0.66, eight
    0.94, twenty 0.999."""
    return [
        1.0 - NOT_YET ** sum(word in COLOURS for word in re.findall("[a-z]+", text_of(completion).lower()))
        for completion in completions
    ]


def questions(completions: Sequence[Any], **_: Any) -> list[float]:
    """The share of a text's sentences that end with a question mark; 0 for a text without a word.

    A sentence ends with full stops, exclamation or question marks; an end without any is one that is no question.
    """
    return [_share_of_questions(text_of(completion)) for completion in completions]


def _share_of_questions(text: str) -> float:
    ends = re.findall("[.!?]+", text)
    last = re.split("[.!?]", text)[-1]
    sentences = len(ends) + any(character.isalnum() for character in last)
    return sum("?" in end for end in ends) / sentences if any(map(str.isalnum, text)) else 0.0

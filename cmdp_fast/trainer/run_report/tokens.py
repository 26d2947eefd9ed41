"""A completion's tokens as they are shown: how dear each is, what was spent so far, and how far they are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .runs import Run
from .samples import Sample, Token
from .visible import cut, visible

MOST_TOKENS, MOST_CHARACTERS = 1000, 4000  # of a completion or a message that are shown
MOST_MESSAGES = 100  # of a prompt
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the budget: where each level of costs begins
PER_TOKEN = 10.0  # a budget per token, times this, is what the shares are of
END, EMPTY, LINE_END = "∎", "∅", "↵"


class Shown(NamedTuple):
    """A token: its text made visible, its level (None: its cost is not known), its tooltip, and whether it is the one
    with which the budget is spent, or the end of the sequence."""

    text: str
    level: int | None
    title: str
    crossing: bool
    end: bool


def edges_of(runs: Sequence[Run]) -> tuple[float, ...]:
    """The nats at which the levels 1, 2, ... of a token's cost begin, for all runs of a page: shares of the smallest
    budget."""
    unit = min(run.budget * (PER_TOKEN if run.per_token else 1.0) for run in runs)
    return tuple(float(f"{share * unit:.2g}") for share in SHARES)


def level_of(cost: float, edges: Sequence[float]) -> int:
    """How many of the edges a cost has reached."""
    return sum(cost >= edge for edge in edges)


def shown_tokens(tokens: Sequence[Token], crossing: int | None, edges: Sequence[float]) -> tuple[list[Shown], int]:
    """The tokens that are shown, and how many are left out behind them."""
    found, left, spent = list[Shown](), MOST_CHARACTERS, 0.0
    for place, token in enumerate(tokens[:MOST_TOKENS]):
        if left == 0:
            break
        part, _ = cut(token.text, left)
        left -= len(part)
        spent += math.nan if token.cost is None else token.cost
        end = not token.text and place == len(tokens) - 1
        text = END if end else visible(part).replace("\n", f"{LINE_END}\n") or EMPTY
        level = None if token.cost is None else level_of(token.cost, edges)
        title = f"{_nats(token.cost)}, {_nats(spent)} so far (token {place + 1} of {len(tokens)})"
        found.append(Shown(text, level, title, place == crossing, end))
    return found, len(tokens) - len(found)


def shown_text(text: str) -> tuple[str, int]:
    """A text's beginning, made visible, and how many characters are left out behind it."""
    part, left_out = cut(text, MOST_CHARACTERS)
    return visible(part), left_out


def crossed_behind(sample: Sample, shown: int) -> str:
    """Says where the budget is spent, if it is behind the tokens that are shown."""
    if sample.crossing is None or sample.crossing < shown:
        return ""
    return f"; the budget is spent at token {sample.crossing + 1}"


def _nats(cost: float | None) -> str:
    if cost is None or math.isnan(cost):
        return "unknown"
    return f"{cost:.3g} nats"

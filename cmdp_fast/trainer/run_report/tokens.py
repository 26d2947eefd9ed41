"""A completion's tokens as they are shown: how dear each is, what was spent so far, and how far they are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .runs import Run
from .samples import Sample
from .visible import visible

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


def shown_tokens(sample: Sample, edges: Sequence[float]) -> list[Shown]:
    """The tokens of a sample that are shown."""
    tokens = sample.tokens or ()
    found, spent, count = list[Shown](), 0.0, len(tokens) + sample.more_tokens
    for place, token in enumerate(tokens):
        spent += math.nan if token.cost is None else token.cost
        end = sample.finished and not token.text and place == count - 1
        text = END if end else visible(token.text).replace("\n", f"{LINE_END}\n") or EMPTY
        level = None if token.cost is None else level_of(token.cost, edges)
        title = f"{_nats(token.cost)}, {_nats(spent)} so far (token {place + 1} of {count})"
        found.append(Shown(text, level, title, place == sample.crossing, end))
    return found


def crossed_behind(sample: Sample, shown: int) -> str:
    """Says where the budget is spent, if it is behind the tokens that are shown."""
    if sample.crossing is None or sample.crossing < shown:
        return ""
    return f"; the budget is spent at token {sample.crossing + 1}"


def _nats(cost: float | None) -> str:
    if cost is None or math.isnan(cost):
        return "unknown"
    return f"{cost:.3g} nats"

"""A line of a study's results."""

from __future__ import annotations

from dataclasses import dataclass, field

Parts = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Line:
    """The figures of a training in a situation, or the reason why it has none (`failure`)."""

    training: str
    situation: str
    method: str
    candidate: str
    seed: int
    budget: float
    figures: dict[str, float] = field(default_factory=dict)
    kl_quantiles: tuple[float, ...] = ()
    kinds: Parts = field(default_factory=dict)
    lengths: Parts = field(default_factory=dict)
    failure: str = ""

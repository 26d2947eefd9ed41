"""What a study is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Situation:
    """Settings that go over those of the study."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyMethod:
    """A method under its name in the study, and the settings that it may have, as `--methods` takes them."""

    name: str
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """Prompts in which the pattern is found, and no earlier kind's."""

    name: str
    pattern: str


@dataclass(frozen=True)
class Study:
    """A study as its file says. `text` is the file's."""

    name: str
    recipe: str
    seeds: tuple[int, ...]
    feasible: float
    settings: dict[str, Any]
    situations: tuple[Situation, ...]
    methods: tuple[StudyMethod, ...]
    kinds: tuple[Kind, ...]
    text: str

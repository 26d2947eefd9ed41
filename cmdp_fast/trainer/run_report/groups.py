"""Runs that differ in nothing but their seed are one method; what it is called."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmdp_fast.errors import InputError, readable
from cmdp_fast.files import as_json
from cmdp_fast.masking import public

from ..records.resume import CHANGEABLE
from ..settings.config import TrainConfig
from ..settings.recipe import METHOD_FILES, read_toml
from .runs import Run
from .visible import short

LONGEST_NAME, LONGEST_VALUE = 80, 40
MOST_NAMED = 6  # settings in a label
_DEFAULTS = asdict(TrainConfig())  # a file may hold other names, and one of an earlier version not all
# Settings that change a run's place, its memory or its machine, and not what it learns.
_OF_THE_RUN = {"seed", "name", "output_dir", *CHANGEABLE} - {"steps"}


@dataclass(frozen=True)
class Group:
    """The runs of one method by their seeds."""

    label: str
    runs: tuple[Run, ...]

    @property
    def ended(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.ended)

    def sampled(self, who: str) -> Run | None:
        """The run of the smallest seed that has samples of a policy."""
        return next((run for run in self.runs if who in run.samples), None)


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """The methods in the order in which they come. Raises InputError for two runs of one method and one seed, which
    would count twice."""
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        try:
            key = as_json([_settings(run), _files(run)])
        except RecursionError as error:  # it holds more brackets inside one another than can be written
            raise InputError(f"{run.folder / 'config.json'}: expected settings, not brackets in brackets") from error
        by_settings.setdefault(key, []).append(run)
    groups = [sorted(some, key=lambda run: run.seed) for some in by_settings.values()]
    for group in groups:
        for one, other in itertools.pairwise(group):
            if one.seed == other.seed:
                both = f"{readable(str(one.folder))} and {readable(str(other.folder))}"
                raise InputError(f"{both} are one training with one seed: give one of them")
    labels = _labels([group[0] for group in groups])
    return [Group(label, tuple(group)) for label, group in zip(labels, groups, strict=True)]


def method_of(run: Run) -> str:
    """The name of the run's method; of one that its recipe decided about, that of the kind or of the algorithm."""
    settings = run.settings
    plain = settings["kind"] if settings["algorithm"] == "ppo" else settings["algorithm"]
    return Path(settings["method"]).stem or plain


def _settings(run: Run) -> dict[str, Any]:
    """What decides about what the run learns, in one order."""
    return {name: run.settings[name] for name in sorted(run.settings) if name not in _OF_THE_RUN | {"method"}} | {
        "method": method_of(run)
    }


def _files(run: Run) -> str:
    """A name for the problems, models and functions that the run has begun with."""
    return f"files {_digest([run.began['code'], run.began['origin']])}"


def _all(run: Run) -> str:
    """A name for all that it has begun with, settings that no label names among it."""
    return f"settings {_digest(_settings(run))}"


def _digest(value: Any) -> str:
    return hashlib.sha256(as_json(value).encode()).hexdigest()[:8]


def _labels(runs: Sequence[Run]) -> list[str]:
    """A label for each of some runs: its method, and in what else it differs from the others."""
    each = [
        {name: _value(settings.get(name, default)) for name, default in _DEFAULTS.items()} | {"method": method_of(run)}
        for run, settings in zip(runs, map(_settings, runs), strict=True)
    ]
    names = [name for name in _DEFAULTS if name != "method"]
    differ = _differ(each, names)
    made_of = {path.stem: read_toml(path, path.name)[0] for path in sorted(METHOD_FILES.glob("*.toml"))}
    of_methods = {name for values in made_of.values() for name in values}
    methods = list(dict.fromkeys(settings["method"] for settings in each))
    within = {one: _differ([settings for settings in each if settings["method"] == one], differ) for one in methods}
    labels = []
    for settings in each:
        own = made_of.get(settings["method"], {})
        named = [
            name
            for name in differ
            if name not in of_methods  # a setting of the situation
            or name in within[settings["method"]]
            or (name in own and _value(own[name]) != settings[name])
        ]
        parts = [f"{name.replace('_', ' ')} {short(public(settings[name]), LONGEST_VALUE)}" for name in named]
        more = [f"{len(parts) - MOST_NAMED} more"] if len(parts) > MOST_NAMED else []
        labels.append(", ".join([short(settings["method"], LONGEST_NAME), *parts[:MOST_NAMED], *more]))
    for tell in (_files, _all):
        told = [tell(run) for run in runs]
        different = Counter(label for label, _ in set(zip(labels, told, strict=True)))
        labels = [
            f"{label}, {more}" if different[label] > 1 else label for label, more in zip(labels, told, strict=True)
        ]
    return labels


def _differ(each: Sequence[dict[str, str]], names: Iterable[str]) -> dict[str, None]:
    """The settings, of these, that are not the same in all."""
    return dict.fromkeys(name for name in names if len({settings[name] for settings in each}) > 1)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else as_json(value)

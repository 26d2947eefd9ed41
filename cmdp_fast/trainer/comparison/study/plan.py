"""A study out of its TOML file, and the trainings that it needs.

A training that several situations share, since its method reads nothing in which they differ, is one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from cmdp_fast.errors import InputError
from cmdp_fast.files import as_json
from cmdp_fast.nearest import did_you_mean

from ...settings.config import TrainConfig
from ...settings.ranges import SEED
from ...settings.recipe import RECIPES, read_recipe, read_toml, tomllib
from ...settings.unread import READERS
from ...settings.values import typed
from ..plan import CHOSEN, REFERENCES, check_config, spec_of
from .lines import Line

STUDIES = RECIPES / "studies"
FORMAT = 2  # raise it when a default changes, or what a setting does: earlier lines are then those of other trainings


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


AFTER = "student_after"
TEACHER = REFERENCES["teacher"]


class Wanted(NamedTuple):
    """A line that a training gives, without its figures."""

    line: Line
    who: str = AFTER
    """Whose samples they are of."""


@dataclass(frozen=True)
class Training:
    """A training, whose name is the digest of the settings that it reads, and its lines."""

    config: TrainConfig
    wanted: tuple[Wanted, ...]


# ---------------------------------------------------------------------------------------------------- the file


def read_study(name: str) -> Study:
    """A study of the package by name, or a TOML file by path. Raises InputError for one that cannot be used."""
    path = Path(name) if name.endswith(".toml") else STUDIES / f"{name}.toml"
    source = f"--study {name}"
    if not path.is_file():
        known = sorted(p.stem for p in STUDIES.glob("*.toml"))
        raise InputError(
            f"{source}: neither a TOML file nor one of the package's studies ({', '.join(known)})"
            f"{did_you_mean(name, known)}"
        )
    values, text = read_toml(path, source)
    table = _Table(source, values, {"recipe", "seeds", "feasible", "settings", "situations", "methods", "kinds"})
    seeds = table.list_of("seeds", int)
    for seed in seeds:
        SEED.check(f"{source}: seeds", seed)
    feasible = table.values.get("feasible", 0.95)
    if type(feasible) not in (int, float) or not 0 < feasible <= 1:
        raise InputError(f"{source}: feasible must be a share above 0, up to 1, not {feasible!r}")
    situations = [Situation(t.text("name"), t.settings()) for t in table.tables("situations", {"name", "settings"})]
    methods = [
        StudyMethod(t.text("name"), t.list_of("candidates", str))
        for t in table.tables("methods", {"name", "candidates"})
    ]
    if taken := [method.name for method in methods if method.name in REFERENCES.values()]:
        raise InputError(f"{source}: methods {taken[0]!r}: the name is that of a row beside the methods")
    kinds = [Kind(t.text("name"), t.pattern("pattern")) for t in table.tables("kinds", {"name", "pattern"}, least=0)]
    return Study(
        path.stem,
        table.text("recipe"),
        seeds,
        float(feasible),
        table.settings(),
        tuple(situations),
        tuple(methods),
        tuple(kinds),
        text,
    )


@dataclass(frozen=True)
class _Table:
    """A table of the file, read by key."""

    source: str
    values: dict[str, Any]
    known: set[str]

    def __post_init__(self) -> None:
        if unknown := self.values.keys() - self.known:
            raise InputError(f"{self.source}: there is no {min(unknown)}, only {', '.join(sorted(self.known))}")

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if type(value) is not str or not value.isprintable() or not value:
            raise InputError(f"{self.source}: {key} must be a line of text, not {value!r}")
        return value

    def pattern(self, key: str) -> str:
        pattern = self.text(key)
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{self.source}: {key} {pattern!r}: {error}") from error
        return pattern

    def list_of(self, key: str, kind: type) -> tuple[Any, ...]:
        value = self.values.get(key)
        if (
            not isinstance(value, list)
            or not value
            or any(type(v) is not kind or (isinstance(v, str) and not v.isprintable()) for v in value)
            or _repeated(value)
        ):
            raise InputError(f"{self.source}: {key} must be a list of {kind.__name__}, each once, not {value!r}")
        return tuple(value)

    def settings(self) -> dict[str, Any]:
        value = self.values.get("settings", {})
        if not isinstance(value, dict):
            raise InputError(f"{self.source}: settings must be a table, not {value!r}")
        for name in (*CHOSEN, "eval_before"):
            if name in value:
                raise InputError(f"{self.source}: {name} is for the study to choose")
        return typed(value, f"{self.source}, settings")

    def tables(self, key: str, known: set[str], least: int = 1) -> list[_Table]:
        value = self.values.get(key, [])
        if not isinstance(value, list) or len(value) < least or not all(isinstance(item, dict) for item in value):
            raise InputError(f"{self.source}: it needs its [[{key}]], {least} or more tables, not {value!r}")
        tables = [
            _Table(f"{self.source}, {key} {item.get('name', number)!r}", item, known)
            for number, item in enumerate(value, 1)
        ]
        if repeated := _repeated([table.text("name") for table in tables]):
            raise InputError(f"{self.source}: two of the {key} have the name {repeated[0]!r}")
        return tables


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if values.count(value) > 1]


# ---------------------------------------------------------------------------------------------------- trainings


def plan(study: Study, runs: Path) -> list[Training]:
    """The trainings of a study, those of a seed before the next, each with its folder inside ``runs``. Raises
    InputError for a candidate that cannot be used in one of the situations."""
    cells = [
        (situation.name, method.name, candidate, _config(study, situation, method, candidate))
        for situation in study.situations
        for method in study.methods
        for candidate in method.candidates
    ]
    trainings: list[Training] = []
    looked_at: set[str] = set()
    for seed in study.seeds:
        shared: dict[str, Training] = {}
        for situation, method, candidate, config in cells:
            config = replace(config, seed=seed)
            name = digest(config)
            line = Line(name, situation, method, candidate, seed, config.budget)
            training = shared.get(name, Training(replace(config, name=name, output_dir=str(runs)), ()))
            wanted = [Wanted(line)]
            if situation not in looked_at:  # teacher and student before are the same for all of its trainings
                looked_at.add(situation)
                training = replace(training, config=replace(training.config, eval_before=True))
                wanted += _references(wanted[0], config)
            shared[name] = replace(training, wanted=(*training.wanted, *wanted))
        trainings += shared.values()
    return trainings


def _references(wanted: Wanted, config: TrainConfig) -> list[Wanted]:
    """Teacher and student before, as the evaluations of a training have them; not a teacher that cannot be sampled."""
    sampled = replace(config, eval_before=True).evaluates_teacher
    return [
        wanted._replace(line=replace(wanted.line, method=label, candidate=""), who=who)
        for who, label in REFERENCES.items()
        if label != TEACHER or sampled
    ]


def _config(study: Study, situation: Situation, method: StudyMethod, candidate: str) -> TrainConfig:
    source = f"--study {study.name}, methods {method.name!r}, {candidate!r} in {situation.name!r}"
    spec = spec_of(candidate, source)
    try:
        base = replace(read_recipe(study.recipe, spec.method), **study.settings, eval_before=False)
        base = replace(base, **situation.settings)
        config = replace(base, **spec.overrides)
        check_config(config, base)
        if config.budget_per_token or config.teacher_budgets:
            raise InputError("a study has one budget in nats a completion, no --budget-per-token or --teacher-budgets")
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return config.resolved()


def digest(config: TrainConfig) -> str:
    """12 hexadecimal digits of a hash of the settings that a training reads, as far as they are not the default."""
    default = TrainConfig()
    unread = {*CHOSEN} - {"seed"} | {name for reader in READERS if not reader.reads(config) for name in reader.settings}
    if not config.entry.compares:
        unread.add("reward_weights")
    if not config.entry.compares or config.kind in ("lagrangian", "worst_case"):
        unread |= {f.name for f in fields(config) if f.name == "budget" or f.name.startswith("budget_")}
    read = {name: value for name, value in asdict(config).items() if name not in unread}
    kept = {name: value for name, value in read.items() if value != getattr(default, name)}
    return _sha256(as_json([FORMAT, sorted(kept.items())]))[:12]


def head(study: Study, machine: str) -> dict[str, Any]:
    """The first line of the file of results: where they are from. The hash is that of the file's data."""
    return {"study": study.name, "sha256": _sha256(as_json(tomllib.loads(study.text))), "machine": machine}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

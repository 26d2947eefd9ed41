"""The plan of a comparison: methods with the settings that they change, a run for each seed, and its result."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from cmdp_fast.digest import Damaged
from cmdp_fast.errors import InputError, readable, shown
from cmdp_fast.files import as_json
from cmdp_fast.masking import masked

from ..command_line.parsing import settings_of
from ..records.ending import PHASES, finished_summary
from ..settings.config import TrainConfig, check_ranges
from ..settings.ranges import SEED
from ..settings.recipe import NOT_TOML, read_recipe, tomllib
from ..settings.recorded import shared
from ..settings.units import FOLDER, FUNCTION, METHOD, NAME, RUNS, WHOLE
from ..settings.unread import changed, check_read
from ..settings.values import typed

DEFAULT_METHODS = (
    *("cmdp", "hinge", "saute", "worst_case", "pid", "barrier"),
    *(f"lagrangian:coefficient={value}" for value in (0.001, 0.005, 0.02)),
    *("grpo", "gkd", "minillm", "sft", "kd"),
)
SEEDS = (0, 1, 2)
CHOSEN = (  # by a comparison for each of its runs
    *("recipe", "method", "fast", "name", "output_dir", "seed", "resume", "dry_run", "random_weights"),
)
WITHOUT_EFFECT = ("checkpoint_every", "teacher_timeout", "teacher_token_file", "rollout_timeout", "reward_timeout")
"""Settings that decide whether a run reaches its end and how it goes on, and change no figure of one that has."""
_COMMA = re.compile(r",(?![^\[\]]*\])(?![^{}]*\})")  # outside of a list or a table
REFERENCES = {"teacher": "teacher", "student_before": "student before"}
"""Who stands beside the methods: by the name in `summary.json` and in samples, that in tables."""


@dataclass(frozen=True)
class CompareConfig:
    """Settings of `cmdp-fast compare`."""

    METHODS_SET: ClassVar[str] = "--methods cmdp:{}={}"  # a setting of the trainings
    CHOSEN: ClassVar[tuple[str, ...]] = CHOSEN

    study: Annotated[str, NAME] = ""
    """A study in place of `recipe` and `methods`, by name or by the path of a TOML file: transfer, per-completion,
    faulty-teacher, longer, ablations. It has many situations and methods. Its figures are kept in `runs.jsonl`,
    and what stands there is not run again."""
    recipe: Annotated[str, NAME] = "tempting"
    """The task, by a recipe's name or the path of a TOML file."""
    fast: bool = False
    """With the settings of the recipe's table `[fast]`, to see in some minutes what it shows."""
    methods: Annotated[tuple[str, ...], METHOD] = DEFAULT_METHODS
    """Methods as `train --method` takes them, with the settings that each changes in the recipe, if any. For example
    `cmdp`, `lagrangian:coefficient=0.05`, `cmdp:budget=1.0,penalty=2`."""
    seeds: Annotated[tuple[int, ...], WHOLE] = ()
    """Seeds of the training; every method is run with each. Empty: 0, 1 and 2, or those of the study."""
    jobs: Annotated[int, RUNS] = 0
    """Runs at a time, between which the processors are divided. 0: one per processor, or one where there is a GPU."""
    output_dir: Annotated[str, FOLDER] = ""
    """Folder of the results and of the runs. Empty: `comparisons/` and the recipe's name, with `-fast` behind it, or
    `study-` and the study's."""
    judge: Annotated[str, FUNCTION] = ""
    """The judge that compares completions of the same held-out problems in pairs. `programmatic` (the right answer
    first, then sound steps, then brevity), or your function as `module:function` or `path/file.py:function`. Empty:
    none."""
    judge_against: Annotated[str, NAME] = "teacher"
    """The completions that the judge compares a method's with: those of `teacher`, `student_before`, or one of
    `methods`."""


@dataclass(frozen=True)
class Variant:
    """A method with its changes: the settings of its runs, but for the seed and the folder."""

    label: str
    method: str
    overrides: dict[str, Any]
    config: TrainConfig
    measured: bool = False
    """Whether its precision is what was measured on this machine."""


@dataclass(frozen=True)
class SeededRun:
    """A variant with a seed."""

    variant: Variant
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / self.config.name


@dataclass(frozen=True)
class Result:
    """The result of a run: its `summary.json`, or the reason why there is none, and a judge's rates."""

    run: SeededRun
    summary: dict[str, Any] | None
    failure: str = ""
    judged: dict[str, float] = field(default_factory=dict)


def parse_compare(args: Sequence[str], prog: str = "cmdp-fast compare") -> CompareConfig:
    """The settings on the command line. Raises InputError for options that do not exist."""
    description = "Compare methods on one task, several seeds of each, in a table and in plots."
    return settings_of(CompareConfig, args, prog, description)


def folder_of(config: CompareConfig) -> Path:
    """The folder of the comparison, or of the study."""
    prefix, suffix = "study-" if config.study else "", "-fast" if config.fast else ""
    name = Path(config.study or config.recipe).name.removesuffix(".toml")
    return Path(config.output_dir or Path("comparisons") / f"{prefix}{name}{suffix}")


def plan(config: CompareConfig) -> list[SeededRun]:
    """All runs, a seed of every method before the next seed. Raises InputError for one that could not be run."""
    if not config.methods or len(set(config.methods)) < len(config.methods):
        raise InputError(f"--methods must be one or more, each once, not {' '.join(config.methods) or 'none'}")
    variants = [variant(spec, config.recipe, config.fast) for spec in config.methods]
    names = [_file_name(v.label) for v in variants]
    if len(set(names)) < len(names):
        raise InputError(f"--methods {' '.join(config.methods)}: two of these have the same name")
    runs_dir = str(folder_of(config) / "runs")
    runs = [
        SeededRun(v, replace(v.config, seed=seed, output_dir=runs_dir, name=f"{name}-seed{seed}"))
        for seed in config.seeds or SEEDS
        for v, name in zip(variants, names, strict=True)
    ]
    return _as_measured_before(runs)


def _as_measured_before(runs: list[SeededRun]) -> list[SeededRun]:
    """The runs with the precision of one that has finished, where it was measured: a comparison that goes on does not
    measure again, and come to something else on a machine that is busy now."""
    found = next(filter(None, (_precision_of(run) for run in runs if run.variant.measured)), None)
    if found is None:
        return runs
    return [
        replace(run, config=replace(run.config, mixed_precision=found)) if run.variant.measured else run for run in runs
    ]


def _precision_of(run: SeededRun) -> Any:
    try:
        summary = finished_summary(run.folder)
    except Damaged:  # which is said where its figures are read
        return None
    found = summary["config"].get("mixed_precision") if summary else None
    return found if found in ("no", "bf16") else None


def check(config: CompareConfig) -> None:
    """Raises InputError for settings that no comparison and no study could use."""
    check_ranges(config)
    if len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"--seeds must be each once, not {' '.join(map(str, config.seeds))}")
    for seed in config.seeds:
        SEED.check("--seeds", seed)
    if config.jobs < 0:
        raise InputError(f"--jobs must not be negative, it is {config.jobs}")
    if config.study:
        for name in ("recipe", "fast", "methods", "judge", "judge_against"):
            if getattr(config, name) != getattr(CompareConfig, name):
                option = name.replace("_", "-")
                raise InputError(f"--{option} would have no effect: --study {config.study} decides about it")


class Spec(NamedTuple):
    """A method with the settings that it changes, out of ``method`` or ``method:setting=value,setting=value``."""

    method: str
    changes: str
    overrides: dict[str, Any]


def spec_of(spec: str, source: str) -> Spec:
    """A method with its changes. Raises InputError, which names the source, for what is none."""
    method, _, changes = spec.partition(":")
    if not method:
        raise InputError(f"{source}: expected a method's name first")
    overrides = {}
    for change in _COMMA.split(changes) if changes else ():
        key, equals, text = change.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{source}: expected setting=value after the colon, not {change!r}")
        if key in CHOSEN:
            raise InputError(f"{source}: {key} is for the comparison to choose")
        overrides[key] = _value(key, text)
    return Spec(method, changes, typed(overrides, source))


def variant(spec: str, recipe: str, fast: bool = False) -> Variant:
    """The variant that a spec names, on a recipe, with its table ``fast`` or without. Raises InputError if none."""
    source = f"--methods {spec}"
    method, changes, overrides = spec_of(spec, source)
    try:
        base = read_recipe(recipe, method, fast)
    except InputError as error:
        raise InputError(str(error).replace(f"--method {method}:", f"{source}:", 1)) from error
    config = replace(base, **overrides)
    try:
        check_config(config, base)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    measured, config = config.mixed_precision == "auto", config.resolved()  # once for all runs
    return Variant(":".join([Path(method).stem, *([changes] if changes else [])]), method, overrides, config, measured)


def check_config(config: TrainConfig, base: TrainConfig) -> None:
    """Raises InputError for a run that could not be compared, or that does not read what it changes in its base."""
    config.validate()
    check_read(config, changed(config, base))
    if config.teacher.startswith("cached:"):
        raise InputError(f"a comparison is of figures that --teacher {config.teacher} cannot give")


def _value(key: str, text: str) -> Any:
    """A value as TOML has it, or a word without quotes."""
    try:
        return tomllib.loads(f"{key} = {text}")[key]
    except NOT_TOML:
        return text


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "._=-" else "-" for c in label)


def summary_of(run: SeededRun) -> dict[str, Any] | None:
    """The summary of a finished run, None if it is not. Raises InputError if it was run with other settings, those
    `WITHOUT_EFFECT` aside, or if a file that it left is not as it was written."""
    remove = f"remove {run.folder}, or choose another --output-dir"
    try:
        summary = finished_summary(run.folder)
    except Damaged as error:
        raise InputError(f"{run.folder}: {error}: {remove}") from error
    if summary is None:
        return None
    # An earlier version masked nothing
    past, wanted = masked(summary["config"]), json.loads(as_json(shared(run.config)))
    keys = (wanted.keys() | past.keys()) - {*WITHOUT_EFFECT}
    if different := [key for key in keys if wanted.get(key) != past.get(key)]:
        key = sorted(different)[0]
        raise InputError(
            f"{run.folder} was run with other settings ({readable(key)} was {shown(past.get(key))} and is "
            f"{shown(wanted.get(key))}): {remove}"
        )
    return summary


def training_seconds(summary: dict[str, Any]) -> float:
    """The seconds of a run's steps, without its evaluations."""
    return float(sum(summary["seconds"][phase] for phase in PHASES))

"""The file of a study's results: a line of JSON for each situation, candidate and seed, in any order."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cmdp_fast.digest import opened
from cmdp_fast.errors import InputError, first_line, readable, shown
from cmdp_fast.files import as_json, writing

FILE = "runs.jsonl"
DIGITS = 5  # that a figure is written with
REQUIRED = {"training", "situation", "method", "candidate", "seed", "budget"}
FIGURES = {"accuracy", "within", "right_and_within", "mean_kl", "cvar_kl", "mean_length", "examples"}
PART = {"share", "accuracy", "within", "mean_kl"}
QUANTILES = 21

Parts = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Line:
    """The figures of a training in a situation, or the reason why it has none (`failure`).

    `within` and all that depends on it are of the situation's own budget. Shares are from 0 to 1, KL is in nats.
    """

    training: str
    """The training: 12 hexadecimal digits of a hash of all settings that it read."""
    situation: str
    method: str
    candidate: str
    seed: int
    budget: float
    figures: dict[str, float] = field(default_factory=dict)
    """accuracy, within, right_and_within, reward_within (the task's reward of those within budget, in units of what a
    right answer is worth), mean_kl, cvar_kl, mean_length, examples, seconds; reasoning_success where
    steps were checked."""
    kl_quantiles: tuple[float, ...] = ()
    """The quantiles 0, 0.05, ..., 1 of the completions' cumulative KL."""
    kinds: Parts = field(default_factory=dict)
    """share, accuracy, within and mean_kl of the completions of a kind of prompt."""
    lengths: Parts = field(default_factory=dict)
    """The same of completions of so many tokens."""
    failure: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int, float]:
        """What there is one line of: figures against another budget are another line, of the same training too."""
        return self.training, self.situation, self.method, self.candidate, self.seed, _rounded(self.budget)


def read_lines(path: Path, say: Callable[[str], None] = print) -> list[Line]:
    """The lines of a file, none if it is not there; of several of one training in a situation the last.

    A last line without an end is what a kill has left: it is dropped, and that is said. Raises InputError for a file
    that holds anything else than lines.
    """
    if not path.exists():
        return []
    try:
        with opened(path) as file:
            *whole, rest = file.read().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    if rest:
        say(f"{path}: the last line is not whole and is dropped")
    by_key = {}
    for number, text in enumerate(whole, 1):
        try:
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError(f"{shown(value)} where a table is expected")
            if "study" in value:  # the head, which says where the lines are from
                continue
            line = _line(value)
        except Exception as error:  # the file may hold anything
            what = f"not a line of a study: {readable(first_line(error))}"
            raise InputError(f"{path}, line {number}: {what}. Remove it, and it is run again") from error
        by_key[line.key] = line
    return list(by_key.values())


def _line(value: dict[str, Any]) -> Line:
    texts = ("training", "situation", "method", "candidate", "failure")
    if unknown := value.keys() - {f.name for f in fields(Line)}:
        raise ValueError(f"unknown key {min(unknown)}")
    if missing := REQUIRED - value.keys():
        raise ValueError(f"{min(missing)} is missing")
    for name in texts:
        if type(value.get(name, "")) is not str:
            raise ValueError(f"{name} is {shown(value[name])}, expected text")
    if type(value["seed"]) is not int:
        raise ValueError(f"seed is {shown(value['seed'])}, expected a whole number")
    about: dict[str, Any] = {name: value[name] for name in REQUIRED} | {"budget": _number(value["budget"])}
    if value.get("failure"):
        return Line(**about, failure=value["failure"])
    figures = _numbers(value.get("figures", {}), FIGURES)
    parts: dict[str, Any] = {
        name: {key: _numbers(part, PART) for key, part in value.get(name, {}).items()} for name in ("kinds", "lengths")
    }
    if unnamed := [name for name in parts["lengths"] if not re.fullmatch(r"[0-9]+-[0-9]+", name)]:
        raise ValueError(f"lengths have {unnamed[0]!r}, expected one such as '5-8'")
    quantiles = tuple(_number(quantile) for quantile in value.get("kl_quantiles", ()))
    if len(quantiles) != QUANTILES:
        raise ValueError(f"it has {len(quantiles)} quantiles, expected {QUANTILES}")
    return Line(**about, **parts, figures=figures, kl_quantiles=quantiles)


def _numbers(values: dict[str, Any], expected: set[str]) -> dict[str, float]:
    if missing := expected - values.keys():
        raise ValueError(f"{min(missing)} is missing")
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{shown(value)} where a number is expected")
    return value


def append_lines(path: Path, lines: Iterable[Line], head: dict[str, Any] | None = None) -> None:
    """Adds lines, all or none of them; a new file begins with the head. Raises InputError if they cannot be written."""
    values = [{name: value for name, value in asdict(line).items() if value or name in REQUIRED} for line in lines]
    with writing(path), open(path, "ab+") as file:
        size = file.tell()
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        if whole < size:  # what a kill has left of a line
            file.truncate(whole)
        if head is not None and not whole:
            values.insert(0, head)
        file.write("".join(as_json(_rounded(value)) + "\n" for value in values).encode())
        file.flush()
        os.fsync(file.fileno())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value

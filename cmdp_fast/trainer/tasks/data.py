"""The source of the problems: a task of reasoning-gym's or ours by name, or any dataset with a prompt and an answer
column.

A problem is a dict with `prompt` (a text, or a list of chat messages), usually `answer`, and the other columns of
its source; all but the prompt are passed on to the reward functions. `prompts.py` makes the prompt of a row.

Training and held-out problems never overlap: a problem is held out if a hash of its prompt says so. The hash knows
neither the seed nor the order, so that a model warmed up on training problems (`models/builtin.py`) has seen none that
is held out.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import hashlib
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import regex

from cmdp_fast.errors import InputError, first_line, shown
from cmdp_fast.nearest import did_you_mean

from ..settings.config import TrainConfig
from ..sources import check_path, find_hub, loading, with_hub
from .broken import where_broken
from .prompts import check_template_kwargs, with_prompt
from .saved import check_saved, check_values
from .sizes import check_file, check_rows
from .varying import VARYING, entries
from .writing import writing_rows

Problem = dict[str, Any]

SEARCH = 1.0  # seconds for an answer in one text; an honest search takes a millionth

_log = logging.getLogger(__name__)

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class Problems(NamedTuple):
    """Those to train on and those to evaluate on; no prompt is in both."""

    train: list[Problem]
    held_out: list[Problem]


@loading()
def load_problems(config: TrainConfig) -> Problems:
    """The problems that a configuration asks for; raises InputError if there are none to train or to evaluate on."""
    check_template_kwargs(config.chat_template_kwargs, "--chat-template-kwargs")
    if config.task:
        rows = task_rows(config)
    else:
        rows = _dataset_rows(config, Source("--dataset", config.dataset, config.dataset_split))
    count = len(rows)
    rows = _distinct(_with_prompts(rows, config))
    others = evaluation_sets(config) if config.eval_dataset or (config.dataset and config.eval_split) else {}
    if len(others) > 1:
        raise InputError(f"--eval-dataset {' '.join(config.eval_dataset)}: a training takes one, evaluate any number")
    if others:
        held_out = _distinct(next(iter(others.values())))
        kept_out = {_key(row["prompt"]) for row in held_out}
        train = [row for row in rows if _key(row["prompt"]) not in kept_out]
    else:
        train = [row for row in rows if not is_held_out(row["prompt"], config.holdout_fraction)]
        held_out = [row for row in rows if is_held_out(row["prompt"], config.holdout_fraction)]
    source = config.task or config.dataset
    if not train or not held_out:
        distinct = f" (of {count} rows, some of which ask the same)" if count > len(rows) else ""
        raise InputError(
            f"{source}: {len(rows)} problems{distinct} leave {len(train)} to train on and {len(held_out)} held out"
        )
    held_out.sort(key=lambda row: _digest(row["prompt"]))
    return Problems(train, held_out)


class Source(NamedTuple):
    """A dataset that an option names, and the split of it; an empty one: the only one, else `test`."""

    option: str
    name: str
    split: str
    or_only: bool = False  # the only split where there is none of that name


@loading()
def evaluation_sets(config: TrainConfig) -> dict[str, list[Problem]]:
    """The problems that an evaluation is asked for, by the name of their set: those of each `eval_dataset`, else all of
    the dataset's `eval_split`, or of the dataset. Nothing is left out and no problem of them held out.

    Raises InputError for a name that stands twice, and for a dataset that cannot be read.
    """
    named = [_named(text) for text in config.eval_dataset]
    if len({name for name, _ in named}) < len(named):
        raise InputError(f"--eval-dataset {' '.join(config.eval_dataset)}: two have one name; give NAME=DATASET")
    sources = {name: Source("--eval-dataset", path, config.eval_split) for name, path in named}
    if not sources:
        split = config.eval_split or config.dataset_split
        sources = {"": Source("--dataset", config.dataset, split, or_only=not config.eval_split)}
    return {
        name: list(_with_prompts(_dataset_rows(config, source), config, f"{source.option} {source.name}"))
        for name, source in sources.items()
    }


def _named(text: str) -> tuple[str, str]:
    """(name, dataset) of NAME=DATASET, or of a dataset alone, which is its name."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and name and path and not Path(text).exists() else (text, text)


def held_out_alone(config: TrainConfig) -> dict[str, list[Problem]]:
    """The problems that a training with these settings holds out, as the only set of an evaluation."""
    return {"": load_problems(config).held_out}


def _with_prompts(rows: list[Problem], config: TrainConfig, source: str = "") -> Iterator[Problem]:
    source = source or (f"--task {config.task}" if config.task else f"--dataset {config.dataset}")
    return (with_prompt(row, config, f"{source}, row {number},") for number, row in enumerate(rows, 1))


def is_held_out(prompt: Any, fraction: float) -> bool:
    """Whether the problem with this prompt is kept for evaluation."""
    return _digest(prompt) < fraction


def task_rows(config: TrainConfig) -> list[Problem]:
    """The problems of a task, as rows with a prompt; those of reasoning-gym's have answer and metadata too."""
    if config.task == "writing":
        return writing_rows(config.task_args, config.task_size)
    return reasoning_gym_rows(config.task, config.task_args, config.task_size)


def reasoning_gym_rows(task: str, arguments: dict[str, Any], size: int, seed: int = 1) -> list[Problem]:
    """`size` problems of a reasoning-gym task as rows with prompt, answer and metadata, the same in every process."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        import difflib

        close = difflib.get_close_matches(task, DATASETS, n=3) or sorted(DATASETS)[:3]
        raise InputError(
            f"--task {task}: neither writing nor a task of reasoning-gym's (did you mean {', '.join(close)}?)"
        )
    try:
        every = {"seed": seed, "size": size, **arguments}
        source = reasoning_gym.create_dataset(task, **every)
    except (TypeError, AssertionError, ValueError) as error:
        said = f"--task-args {json.dumps(arguments)}" if arguments else f"--task {task}"
        refused = _refused(task, arguments) if isinstance(error, TypeError) else ""  # others say what is wrong
        raise InputError(f"{said}: {refused or first_line(error)}") from error
    made = entries(task, every) if task in VARYING else source
    return [{"prompt": e["question"], "answer": e["answer"], "metadata": e["metadata"]} for e in made]


def _refused(task: str, arguments: dict[str, Any]) -> str:
    """Which of its arguments a task of reasoning-gym's does not know, or has of another type; empty if it has said
    itself what is wrong, or nothing is."""
    from reasoning_gym.factory import DATASETS

    _, settings = DATASETS[task]
    known = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, value in arguments.items():
        if name not in known:
            return f"{task} has no {name}{did_you_mean(name, known) or ', but ' + ', '.join(known)}"
        default = known[name]
        kind: Any = {float: int | float, tuple: list | tuple}.get(type(default), type(default))  # JSON has no tuples
        if default not in (None, dataclasses.MISSING) and not isinstance(value, kind):
            return f"{name} of {task} is {shown(value)}, expected one like its default {shown(default)}"
    return ""


def shuffled(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices below count without end: one shuffle follows another, and none repeats within a shuffle."""
    rng = random.Random(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.sample(range(count), count)
        yield waiting[:size]
        waiting = waiting[size:]


@loading()
def _dataset_rows(config: TrainConfig, source: Source) -> list[Problem]:
    import datasets

    said, name, path = f"{source.option} {source.name}", source.name, Path(source.name)
    try:
        _check_source(source, said, path)
        if path.is_file():
            check_file(path, said, config.max_rows)
    except OSError as error:
        raise InputError(f"{said} cannot be read: {first_line(error)}") from error
    if not path.exists():
        find_hub()
    stream = config.streaming
    subset = config.dataset_config or None if name == config.dataset else None
    is_saved = False
    try:
        with _quietly():
            if path.is_file():
                loaded = datasets.load_dataset(
                    _LOADERS[path.suffix], data_files=glob.escape(str(path)), split="train", streaming=stream
                )
            elif is_saved := any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
                check_saved(path, said)
                loaded = datasets.load_from_disk(name)
                if isinstance(loaded, datasets.DatasetDict):
                    loaded = loaded[_split(source, loaded)]
                check_values(loaded, said, config.max_rows)
            else:
                split = source.split
                if not split or source.or_only:
                    split = _split(source, datasets.get_dataset_split_names(name, subset))
                loaded = datasets.load_dataset(name, subset, split=split, streaming=stream)
            if not stream or is_saved:
                check_rows(len(loaded), said, config.max_rows)
            _leave_encoded(loaded.info.features)  # `loaded.features` is a copy
            rows = list(islice(loaded, config.max_rows or None))
    except InputError:
        raise
    except Exception as error:  # of a library that reads anybody's files, in whatever form
        broken = ""
        with suppress(OSError):
            broken = where_broken(path) if path.is_file() else ""
        raise InputError(f"{said}: {broken or with_hub(_reason(error), name)}") from error
    if not rows:
        raise InputError(f"{said}: there are no rows in it")
    columns = list(rows[0])
    wanted = {"prompt": config.prompt_column}
    if config.answer_column != "answer" or "answer" in columns:  # a reward of the user's may need none
        wanted["answer"] = config.answer_column
    for role, column in wanted.items():
        if column not in columns:
            raise InputError(
                f"{said}: there is no column {column!r} for the {role}, only {', '.join(columns)} (--{role}-column)"
            )
    renamed = []
    for row in rows:
        taken = {role: row.get(column) for role, column in wanted.items()}
        renamed.append({name: value for name, value in row.items() if name not in wanted.values()} | taken)
    return [_with_reference(row, config) for row in renamed] if config.reference_pattern else renamed


def _split(source: Source, names: Iterable[str]) -> str:
    """The split of those that a dataset has."""
    present = list(names)
    if len(present) == 1 and (source.or_only or not source.split):
        return present[0]
    wanted = source.split or "test"
    if wanted not in present and (not source.split or source.or_only):
        raise InputError(f"of its splits {', '.join(present)} none is {wanted!r}: --eval-split names one")
    return wanted


def _leave_encoded(features: Any) -> None:
    """Has images, sounds and the like stay the bytes and the path that a cell holds: to decode them is to open any
    file, pipe or address that a path names."""
    if isinstance(features, (dict, list, tuple)):
        for each in features.values() if isinstance(features, dict) else features:
            _leave_encoded(each)
    elif features is not None:
        if hasattr(features, "decode") and type(features).__name__ != "Json":  # a text, in the cell itself
            features.decode = False
        _leave_encoded(getattr(features, "feature", None))


def _check_source(source: Source, said: str, path: Path) -> None:
    """Raises InputError for what is no dataset, as far as its name and a look at its files tell, and OSError where they
    cannot be looked at."""
    from datasets import packaged_modules

    name = source.name
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{said} is a pipe, a device or the like, expected a file or a folder")
    if path.is_file() and path.suffix not in _LOADERS:
        raise InputError(f"{said}: a file must end in {', '.join(_LOADERS)}")
    if name.removeprefix("hf://datasets/") in packaged_modules._PACKAGED_DATASETS_MODULES:
        # To `datasets` a way of reading any file in the working directory, for older versions pickles too. It looks for
        # the format first, and for a folder of that name not at all.
        folder = f" (the folder is ./{name})" if path.is_dir() else ""
        raise InputError(f"{said}: that is a format, not a dataset; give a hub id, a file or a folder{folder}")
    if (path.is_file() or (path / "state.json").is_file()) and source.split not in ("", "train"):
        raise InputError(f"{said}: it has one split, not {source.split!r}; --eval-dataset takes another file")
    check_path(source.option, name, file_too=True)
    if path.is_file() and not path.stat().st_size:
        raise InputError(f"{said}: there are no rows in it, the file is empty")
    _check_beginning(path, said)


def _check_beginning(path: Path, said: str) -> None:
    """Raises InputError for a JSON file that begins with null: pyarrow's reader would end the process."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.suffix in (".json", ".jsonl") and file.is_file():
            with open(file, "rb") as opened:
                start = opened.read(2**16).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n[")
            if start.startswith(b"null"):
                raise InputError(f"{said}: {file.name} begins with null, expected an object for each row")


@contextmanager
def _quietly() -> Iterator[None]:
    """Neither progress nor a log of what the error will say."""
    import datasets

    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _reason(error: Exception) -> str:
    """What an error of `datasets` comes from: its own says no more than that there was one."""
    import datasets

    # Its JSON reader looks for a first row; of a table without any it keeps no split
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return "there are no rows in it"
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        return first_line(error.__cause__)
    return first_line(error)


def _with_reference(row: Problem, config: TrainConfig) -> Problem:
    """The row with the pattern's match in the answer in place of the whole of it."""
    text = str(row.get("answer", ""))
    reference = last_group(re.compile(config.reference_pattern), text)
    if reference is None:
        raise InputError(
            f"--reference-pattern {config.reference_pattern!r} finds nothing in the answer {text[-80:]!r} of "
            f"--dataset {config.dataset}"
        )
    return {**row, "answer": reference}


def last_group(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group of the last match, without spaces at its ends; None where the pattern does not match, or the
    search has not ended after `SEARCH` seconds: with many a pattern a text can be made to take forever."""
    try:
        groups = [match.group(1) for match in regex.finditer(pattern.pattern, text, timeout=SEARCH)]
    except (TimeoutError, MemoryError):
        _tell_of(pattern.pattern)
        return None
    return groups[-1].strip() if groups and groups[-1] is not None else None


@cache
def _tell_of(pattern: str) -> None:
    _log.warning("the pattern %r takes more than %g s on a text: no answer is found in such", pattern, SEARCH)


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def _digest(prompt: Any) -> float:
    """A number in [0, 1) that looks random and depends on the prompt alone."""
    return int.from_bytes(hashlib.sha256(_key(prompt).encode()).digest()[:8], "big") / 2**64


def _distinct(rows: Any) -> list[Problem]:
    """The rows that ask what was not asked before, in order: the same prompt with other tools is another."""
    return list({_asked(row): row for row in reversed(list(rows))}.values())[::-1]


def _asked(row: Problem) -> str:
    around = [row.get(name) for name in ("tools", "chat_template_kwargs")] if isinstance(row["prompt"], list) else []
    return json.dumps([row["prompt"], *around], sort_keys=True, default=str)

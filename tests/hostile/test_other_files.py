"""The other files that a command reads back: a teacher's cache, wandb's id, models that are made once, a study's lines,
verl's multiplier. Every field with every kind of value, under the right sha256; and files that are no JSON."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from json_changes import PARTS, every_change, is_one_line
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny

import cmdp_fast
from cmdp_fast.digest import Damaged, read_sealed, sha256, write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.objective import PIDController
from cmdp_fast.teachers.cached.format import HEAD, INDEX, VOCABULARY, read_index
from cmdp_fast.teachers.cached.writer import CacheWriter, contents_of
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.open import open_teacher
from cmdp_fast.trainer.comparison.study import lines, page
from cmdp_fast.trainer.models import cache
from cmdp_fast.trainer.records.metrics_log import TRACKERS, _wandb_id

_SOURCE = importlib.util.spec_from_file_location(  # its package would import verl
    "multiplier", Path(cmdp_fast.__file__).parent / "integrations" / "verl" / "multiplier.py"
)
multiplier = importlib.util.module_from_spec(_SOURCE)
_SOURCE.loader.exec_module(multiplier)

TOKENIZER = SimpleNamespace(get_vocab=lambda: {chr(65 + i): i for i in range(101)})
PAIRS = [([1, 2], [3, 4]), ([1, 2], [5]), ([7], [8, 9, 10])]
ROW = [1, 2, 3]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached") / "cache"
    teacher = TeacherInProcess(tiny(), TOKENIZER, "t", "r", (0,))
    writer = CacheWriter(folder, contents_of(teacher, source={"made": "here"}), teacher, 1)
    writer.store(PAIRS[:2], 1, 8)
    writer.store(PAIRS[2:], 1, 8)
    writer.finish()
    return folder


def belonging(folder: Path, value: dict[str, Any]) -> None:
    """Seals an index of changed contents, and every file with it: anybody can compute what they should say."""
    write_sealed(folder / INDEX, value)
    try:
        digest = read_index(folder).contents.digest
    except Damaged:
        return
    for number, name in enumerate([HEAD, "shard-00000.safetensors", "shard-00001.safetensors"]):
        save_file(load_file(folder / name), folder / name, metadata={"cache": digest})
        if number == 0 and value["head"]:
            value["head"]["sha256"] = sha256(folder / name)
        elif number and len(value["shards"]) >= number:
            value["shards"][number - 1] |= {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size}
    write_sealed(folder / INDEX, value)


@PARTS
def test_every_field_of_a_cache_s_index(part, made, tmp_path):
    """Another teacher's word, or one line; and what is believed says what the first teacher said."""
    folder = Path(shutil.copytree(made, tmp_path / "c"))
    index = {name: value for name, value in read_sealed(made / INDEX).items() if name != "sha256"}
    expected = open_teacher(f"cached:{made}").answer([ROW], [2]).as_hidden()
    believed = 0
    for what, value in every_change(index, part):
        belonging(folder, value)
        try:
            teacher = open_teacher(f"cached:{folder}")
            said = teacher.answer([ROW], [2])
        except InputError as error:
            assert is_one_line(error), what
            continue
        assert torch.equal(said.as_hidden().float(), expected.float()), what
        assert type(teacher.about.vocab_size) is int and teacher.about.vocab_size == 101, what
        believed += 1
    assert believed


@PARTS
def test_every_field_of_a_cache_s_vocabulary(part, made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "c"))
    vocabulary = read_sealed(made / VOCABULARY)
    for what, value in every_change(vocabulary, 5 * part):
        if json.dumps(value) == json.dumps(vocabulary):  # the number that it had
            continue
        write_sealed(folder / VOCABULARY, value)
        with pytest.raises(InputError, match="vocabulary") as raised:
            open_teacher(f"cached:{folder}")
        assert is_one_line(raised.value), what


@PARTS
def test_every_field_of_trackers(part, tmp_path):
    for what, value in every_change({"wandb": "1a", "more": 1}, part):
        write_sealed(tmp_path / TRACKERS, value)
        try:
            assert _wandb_id(tmp_path, True) in ("1a", "x"), what
        except InputError as error:
            assert is_one_line(error), what


@PARTS
def test_every_field_of_the_list_of_a_made_model(part, tmp_path):
    """It is as it was made, or it is made again."""
    made = cache.made_once(tmp_path / "m", lambda folder: (folder / "a").write_text("1"), print)
    for what, value in every_change(read_sealed(made / cache.FILES), part):
        write_sealed(made / cache.FILES, value)
        damage = cache.damage(made)
        assert damage and damage.isprintable() and len(damage) < 1000, what


@PARTS
def test_every_field_of_verl_s_multiplier(part, tmp_path):
    controller = PIDController()
    for cost in (1.0, 2.0):
        controller.update(cost, 1.0)
    for what, value in every_change(controller.state_dict(), part):
        (tmp_path / multiplier.FILE).write_text(json.dumps(value))
        other = PIDController()
        try:
            multiplier.load(other, tmp_path)
        except InputError as error:
            assert is_one_line(error), what
            continue
        assert other.update(1.0, 1.0) >= 0.0, what


PART = {"share": 1.0, "accuracy": 0.5, "within": 1.0, "mean_kl": 0.5}
STUDIED = {
    **{
        "training": "0123456789ab",
        "situation": "s",
        "method": "cmdp",
        "candidate": "default",
        "seed": 0,
        "budget": 2.0,
    },
    "figures": dict.fromkeys(sorted(lines.FIGURES), 0.5),
    "kl_quantiles": [0.1] * lines.QUANTILES,
    "kinds": {"short": PART},
    "lengths": {"1-4": PART},
}


@PARTS
def test_every_field_of_a_line_of_a_study(part, tmp_path):
    path, taken = tmp_path / lines.FILE, 0
    for what, value in every_change(STUDIED, part):
        path.write_text(json.dumps(value) + "\n")
        try:
            (line,) = lines.read_lines(path)
        except InputError as error:
            assert is_one_line(error), what
            continue
        numbers = [line.budget, *line.figures.values(), *line.kl_quantiles]
        numbers += [
            number for parts in (line.kinds, line.lengths) for each in parts.values() for number in each.values()
        ]
        assert all(math.isfinite(number) for number in numbers), what
        assert all(type(text) is str for text in (line.training, line.situation, line.method, line.candidate)), what
        taken += 1
    assert taken


NO_JSON: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"5",
    "deep": b"[" * 100_000,
    "deep tables": b'{"wandb":' * 50_000,
    "UTF-16": '{"wandb": "1"}'.encode("utf-16"),
    "half a character": b'{"wandb": "\xff"}',
    "zeros": b"\0" * 100,
    "a number of 5000 digits": b'{"wandb": ' + b"1" * 5000 + b"}",
    "no number": b'{"wandb": NaN}',
    "a UTF-8 mark": b"\xef\xbb\xbf{}",
    "two values": b"{} {}",
}
KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a loop": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("case", [*NO_JSON, *KINDS])
def test_files_that_are_no_such_json(case, made, tmp_path):
    def put(path: Path) -> Path:
        path.unlink(missing_ok=True)
        if case in NO_JSON:
            path.write_bytes(NO_JSON[case])
        else:
            KINDS[case](path)
        return path

    folder = Path(shutil.copytree(made, tmp_path / "c"))
    for name in (VOCABULARY, INDEX):
        put(folder / name)
        with pytest.raises(InputError) as raised:
            open_teacher(f"cached:{folder}")
        assert is_one_line(raised.value) and name in str(raised.value)
    put(tmp_path / TRACKERS)
    if case != "a loop":  # which is not there
        with pytest.raises(InputError) as raised:
            _wandb_id(tmp_path, True)
        assert is_one_line(raised.value)
    put(tmp_path / lines.FILE)
    if case not in ("a loop", "empty"):  # which is not there, or has no lines yet
        said: list[str] = []
        try:
            assert not lines.read_lines(tmp_path / lines.FILE, said.append) and said
        except InputError as error:
            assert is_one_line(error)
    assert page._origin(tmp_path).isprintable()
    put(tmp_path / multiplier.FILE)
    with pytest.raises(InputError) as raised:
        multiplier.load(PIDController(), tmp_path)
    assert is_one_line(raised.value)
    model = cache.made_once(tmp_path / "m", lambda made: (made / "a").write_text("1"), print)
    put(model / cache.FILES)
    assert cache.damage(model)


def test_an_honest_multiplier_is_gone_on_with(tmp_path):
    controller, other = PIDController(d_delay=2), PIDController(d_delay=2)
    controller.update(3.0, 1.0)
    multiplier.save(controller, tmp_path)
    multiplier.load(other, tmp_path)
    assert other.update(2.0, 1.0) == controller.update(2.0, 1.0)
    other.load_state_dict({name: tuple(v) if name == "past_costs" else v for name, v in other.state_dict().items()})
    with pytest.raises(ValueError, match="no finite number in coefficient"):
        other.load_state_dict({**other.state_dict(), "coefficient": float("nan")})


def test_an_honest_file_of_a_cache_is_read(made):
    with safe_open(made / HEAD, "pt") as file:
        assert file.metadata() == {"cache": read_index(made).contents.digest}

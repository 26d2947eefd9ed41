"""What is said of a model's folder that is none: whose config.json is no JSON, or that is an adapter. An adapter of
somebody else's is never read, whatever it says."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import settings

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.records.report import Report

Edit = Callable[[bytes], bytes]


@pytest.fixture
def copied(pair, tmp_path) -> Path:
    return Path(shutil.copytree(pair["student"], tmp_path / "m"))


def said(pair, folder: Path, role: str = "student") -> str:
    """Why a folder is refused."""
    with pytest.raises(InputError) as raised:
        load_pair(settings({**pair, role: str(folder)}), [], Report())
    line = str(raised.value)
    assert line.isprintable() and line.startswith(f"--{role} {folder}: ")
    return line.removeprefix(f"--{role} {folder}: ")


CONTENTS: dict[str, tuple[Edit, str]] = {
    "UTF-16": (lambda c: c.decode().encode("utf-16"), "is no text in UTF-8: it begins as UTF-16 does"),
    "UTF-16, big": (lambda c: b"\xfe\xff" + c.decode().encode("utf-16-be"), "UTF-8: it begins as UTF-16 does"),
    "UTF-32": (lambda c: c.decode().encode("utf-32"), "is no text in UTF-8: it begins as UTF-32 does"),
    "Latin-1": (lambda c: c.replace(b"{", b'{"name": "caf\xe9",', 1), "is no text in UTF-8$"),
    "a mark": (
        lambda c: b"\xef\xbb\xbf" + c,
        "begins with a mark of the byte order, expected JSON in UTF-8 without one",
    ),
    "empty": (lambda c: b" \n", "is empty"),
    "cut": (lambda c: c[: len(c) // 2], r"is no JSON: line \d+: "),
    "zeros": (lambda c: b"\0" * 9, "is no JSON: line 1: "),
    "a list": (lambda c: b"[]", "holds no object"),
    "null": (lambda c: b"null", "holds no object"),
    "deep": (lambda c: b"[" * 10**5, "is too deep, or holds too long a number"),
    "a long number": (lambda c: b'{"a": ' + b"1" * 5000 + b"}", "is too deep, or holds too long a number"),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("case", CONTENTS)
def test_a_config_that_is_no_json_is_called_so(case, role, copied, pair):
    edit, what = CONTENTS[case]
    if role == "teacher":
        shutil.rmtree(copied)
        shutil.copytree(pair[role], copied)
    path = copied / "config.json"
    path.write_bytes(edit(path.read_bytes()))
    line = said(pair, copied, role)
    assert re.search(what, line) and line.startswith("no causal language model in this folder: its config.json ")


@pytest.mark.parametrize("case", CONTENTS)
def test_settings_of_generate_that_are_no_json_are_not_passed_over(case, copied, pair):
    """A model would end at other tokens than its own."""
    edit, what = CONTENTS[case]
    path = copied / "generation_config.json"
    path.write_bytes(edit(path.read_bytes()))
    line = said(pair, copied)
    assert re.search(what, line) and line.startswith("its generation_config.json ")


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_settings_that_are_no_file(kind, name, copied, pair):
    (copied / name).unlink()
    NO_FILES[kind](copied / name)
    assert f"its {name} is no file" in said(pair, copied)


def test_no_config(copied, pair):
    (copied / "config.json").unlink()
    assert "its config.json is not there" in said(pair, copied)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_settings_that_cannot_be_read(name, copied, pair, monkeypatch):
    """A process of root's can read all, so the error is made."""
    before = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == copied / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return before(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    if name == "config.json":
        (copied / name).write_text("{")  # transformers finds none, and why is looked for
    assert f"its {name} cannot be read: Permission denied" in said(pair, copied)


def test_honest_files_of_settings(copied, pair):
    """With letters of any kind, and as one line; and none of `generate`."""
    path = copied / "config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "name": "caf\u00e9 \U0001f600"}, ensure_ascii=False), encoding="utf-8")
    (copied / "generation_config.json").write_text('{"eos_token_id": 1}\r\n\t ', encoding="utf-8")
    load_pair(settings({**pair, "student": str(copied)}), [], Report())
    (copied / "generation_config.json").unlink()
    load_pair(settings({**pair, "student": str(copied)}), [], Report())


PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Any] = {
    "plain": {},
    "a rank of 2^40": {"r": 2**40},
    "a rank that is a text": {"r": "8"},
    "no rank": {"r": -1},
    "a pattern that never ends": {"target_modules": "(a|a)*(a|a)*(a|a)*$"},
    "modules that are a number": {"target_modules": 5},
    "layers that are a pattern": {"layers_pattern": "(a+)+$", "layers_to_transform": [2**40]},
    "code": {"auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"}},
    "another model": {"base_model_name_or_path": "https://127.0.0.1:9/model", "revision": "../.."},
    "a kind that is none": {"peft_type": "OWN"},
    "weights of a start": {"init_lora_weights": "pissa_niter_1000000000"},
    "a copy of everything": {"modules_to_save": [""]},
    "no JSON": b"\xff",
    "deep": b"[" * 10**5,
    "empty": b"",
}


def adapt(folder: Path, case: str) -> None:
    """Puts an adapter there, with weights that are a pickle: one that would say so."""
    about = ADAPTERS[case]
    content = about if isinstance(about, bytes) else json.dumps({**PLAIN, **about}).encode()
    (folder / "adapter_config.json").write_bytes(content)
    (folder / "adapter_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {folder}/ran'\ntR.".encode())
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 8 + b"{}")


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_beside_a_model_is_refused(case, copied, pair):
    adapt(copied, case)
    assert said(pair, copied).startswith("beside the model lies an adapter_config.json")
    assert not (copied / "ran").exists()


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_alone_is_called_so(case, copied, pair):
    """It is what `student/adapter` of a run holds, and others' folders, too."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (copied / name).unlink()
    adapt(copied, case)
    line = said(pair, copied)
    assert (
        "its config.json is not there (it is an adapter, with an adapter_config.json: merge it into its model)" in line
    )
    assert not (copied / "ran").exists()


@pytest.mark.parametrize("kind", ["in a folder of its own", "weights alone", "a pipe"])
def test_an_adapter_that_nobody_reads_changes_nothing(kind, copied, pair):
    """A run's own student has one in `adapter`."""
    if kind == "weights alone":
        adapt(copied, "plain")
        (copied / "adapter_config.json").unlink()
    elif kind == "a pipe":
        os.mkfifo(copied / "adapter_config.json")
    else:
        (copied / "adapter").mkdir()
        adapt(copied / "adapter", "a rank of 2^40")
    student, _, _ = load_pair(settings({**pair, "student": str(copied)}), [], Report())
    assert not hasattr(student, "peft_config") and not list(copied.rglob("ran"))


def test_a_pattern_for_an_adapter_of_ones_own_is_a_name(pair):
    """peft searches by a pattern where it is given a text, and by the ends of names where it is given a list."""
    with pytest.raises(InputError, match=r"^--lora-target \(a\|a\)\*\$: "):
        load_pair(settings(pair, lora_rank=2, lora_target=("(a|a)*$",)), [], Report())

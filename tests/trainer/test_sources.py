"""Names of datasets and models that lead nowhere: said at once, with what is called alike."""

from __future__ import annotations

import json
import logging
import shutil
import tracemalloc
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny_pair import arguments, settings

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer import sources
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks import data
from cmdp_fast.trainer.tasks.broken import where_broken
from cmdp_fast.trainer.tasks.data import Source, _dataset_rows


@pytest.fixture
def hub(monkeypatch):
    """A hub that cannot be reached, and the requests that it was asked; with the seconds of one that waits too long."""
    asked: list[str] = []

    class Session:
        def head(self, url, timeout):
            asked.append(url if 0 < timeout <= 30 else f"{url} for {timeout} s")
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "_away", "")
    return asked


def rows_of(name: str) -> list:
    return _dataset_rows(TrainConfig(dataset=name), Source("--dataset", name, ""))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.jsonl", r"no such file or folder \(did you mean mine2.jsonl, mines.csv\?\)$"),
        ("./mine", r"no such file or folder \(did you mean mines.csv, mine2.jsonl\?\)$"),
        ("nowhere/mine.jsonl", "there is no folder nowhere$"),
        ("a/b/c", "there is no folder a/b$"),
        ("~nobody-of-that-name/x.csv", "there is no folder ~nobody-of-that-name$"),
        ("zzz.parquet", "no such file or folder$"),
        ("zzz.PARQUET", "no such file or folder$"),
        ("zzz/", "no such file or folder$"),
    ],
)
def test_a_file_that_is_not_there(name, message, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for present in ("mine2.jsonl", "mines.csv", "a\nb.jsonl"):
        Path(present).touch()
    with pytest.raises(InputError, match=f"^--dataset {name}: .*{message}"):
        rows_of(name)
    assert not hub


def test_a_home_that_the_shell_has_not_put_in(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jsonl").touch()
    with pytest.raises(InputError, match=f"did you mean {tmp_path}/mine.jsonl"):
        rows_of("~/mine.jsonl")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_is_not_there(role, pair, hub, tmp_path, capsys):
    (tmp_path / "file").touch()
    present = Path(pair[role])
    wrong = f"{present}-2"
    for name, message in (
        (wrong, f"there is no such folder (did you mean {present}"),
        ("./missing/model", "there is no folder missing"),
        (str(tmp_path / "file"), "is a file, expected a hub id or the folder of a model"),
        ("missing/", "there is no such folder"),
    ):
        assert main(arguments({**pair, role: name}, tmp_path / "runs")) == 2
        assert f"--{role} {name}" in (error := capsys.readouterr().err) and message in error
    assert not hub and not (tmp_path / "runs").exists()


def test_a_model_in_a_folder_that_may_not_be_read(pair, hub, tmp_path, monkeypatch, capsys):
    is_dir = Path.is_dir

    def refused(path: Path) -> bool:  # root may look into any
        if path.name == "model":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refused)
    assert main(arguments({**pair, "student": "/home/other/model"}, tmp_path)) == 2
    assert "--student /home/other/model cannot be read: " in capsys.readouterr().err and not hub


def test_a_hub_that_cannot_be_reached_is_asked_once(pair, hub, tmp_path, capsys):
    for words in (
        arguments({**pair, "dataset": "org/nosuch"}, tmp_path),
        arguments({**pair, "student": "o/s"}, tmp_path),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "cannot be reached (Name or service not known), and the cache does not hold it" in error
        assert error.count("\n") == 1
    assert hub == [constants.ENDPOINT] * 2


def test_a_hub_is_asked_once_in_a_load_and_again_in_the_next(hub, monkeypatch, caplog):
    log, before = logging.getLogger("huggingface_hub"), logging.INFO
    caplog.set_level(before, log.name)  # whatever tests before this one have left

    def flags() -> tuple:
        return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, sources._away, log.level

    with sources.loading():
        for name in ("org/nosuch", "org/neither"):
            with pytest.raises(InputError, match=f"--dataset {name}: .*cannot be reached"):
                rows_of(name)
        assert flags()[:2] == (True, True) and log.level == logging.ERROR
    assert hub == [constants.ENDPOINT] and flags() == (False, False, "", before)

    class There:
        def head(self, url, timeout):
            hub.append(url)

    def loaded(*_, **__):
        assert flags() == (False, False, "", before)
        return datasets.Dataset.from_list([{"prompt": "1+1=", "answer": "2"}])

    monkeypatch.setattr(huggingface_hub, "get_session", There)  # the network is back
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    with sources.loading():
        for name in ("org/nosuch", "hf://datasets/org/nosuch"):
            assert len(rows_of(name)) == 1 and len(hub) == 2
    assert len(rows_of("org/nosuch")) == 1 and len(hub) == 3


def test_a_name_with_the_hubs_own_scheme_is_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("hf://datasets/org/nosuch", "hf://datasets/org/nosuch.csv"):
        with pytest.raises(InputError, match=f"--dataset {name}: .*cannot be reached"):
            rows_of(name)
    assert len(hub) == 2


def test_an_address_is_no_name(pair, hub, tmp_path, capsys):
    expected = "that is an address; for what is on the hub give its id, owner/name"
    for address in ("https://huggingface.co/datasets/openai/gsm8k", "s3://bucket/a.jsonl"):
        with pytest.raises(InputError, match=f"^--dataset {address}: {expected}$"):
            rows_of(address)
    for address in ("https://huggingface.co/openai/gpt", "hf://openai/gpt"):
        assert main(arguments({**pair, "student": address}, tmp_path)) == 2
        assert f"--student {address}: {expected}" in capsys.readouterr().err
    assert not hub


def test_what_is_here_is_not_blamed_on_a_hub(pair, hub, tmp_path):
    """Of a file and a folder that cannot be read the reason is their own, whatever else was looked for in the load."""
    (tmp_path / "a.csv").write_text("prompt,answer\n1,2\n1,2,3\n")
    shutil.copytree(pair["student"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut off")
    with sources.loading():
        for name, away in (("org/nosuch", True), (str(tmp_path / "a.csv"), False)):
            with pytest.raises(InputError) as raised:
                rows_of(name)
            assert ("cannot be reached" in str(raised.value)) == away
        config = settings({**pair, "student": str(tmp_path / "model")})
        with pytest.raises(InputError, match="no causal language model in this folder") as raised:
            load_pair(config, [], Report())
    assert "cannot be reached" not in str(raised.value) and hub == [constants.ENDPOINT]


def test_a_model_of_a_hub_that_is_called_like_a_folder(pair, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pair["student"], tmp_path / "students")
    assert main(arguments({**pair, "student": "student"}, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "cannot be reached" in error and error.endswith("(did you mean students?)\n")


def test_a_hub_that_is_not_to_be_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"--dataset org/nosuch: .*HF_HUB_OFFLINE is set"):
        rows_of("org/nosuch")
    assert not hub


GOOD = json.dumps({"prompt": "1+1=", "answer": "2"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", f"{GOOD}\n\n{GOOD}\n{{oops\n", "line 4: Expecting property name"),
        ("late.jsonl", f"{GOOD}\n" * 60_000 + "{oops\n", "line 60001: "),  # beyond a block of the reader's
        ("a.jsonl", f"{GOOD}\n3\n", "line 2: expected an object for each row, not '3'"),
        ("a.jsonl", GOOD.encode() + b'\n{"prompt": "\xe9"}\n', "line 2 is no text in UTF-8"),
        ("a.json", f"[\n{GOOD},\n{{oops}}\n]", "line 3: Expecting property name"),
        ("a.jsonl", f"[\n{GOOD},\n{{oops}}\n]", "line 3: Expecting property name"),
        ("a.jsonl", f"\ufeff{GOOD}\n{{oops\n", "line 2: Expecting property name"),  # with a mark of the byte order
        ("a.json", "hello", "line 1: Expecting value"),
        ("a.jsonl", "[" * 100_000 + "\n", "it is too deep"),  # too deep for Python
        ("a.jsonl", "", "the file is empty"),
        ("a.csv", "", "the file is empty"),
        ("a.csv", "prompt,answer\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
        (
            "a.csv",
            "question,answer\n1,2\n",
            r"no column 'prompt' for the prompt, only question, answer \(--prompt-column",
        ),
    ],
)
def test_files_that_cannot_be_read_name_the_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"^--dataset {tmp_path / name}: .*{message}"):
        rows_of(str(tmp_path / name))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (path := tmp_path / "mine.jsonl").write_text(f"{GOOD}\n{{oops\n")

    def refused(*_):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(data, "open", refused, raising=False)  # root may read any
        with pytest.raises(InputError, match=rf"^--dataset {path} cannot be read: .*Permission denied"):
            rows_of(str(path))
    monkeypatch.setattr(data, "where_broken", refused)
    with pytest.raises(InputError, match=f"^--dataset {path}: .*JSON"):
        rows_of(str(path))


def test_a_file_of_lines_is_looked_through_one_at_a_time(tmp_path):
    line = json.dumps({"prompt": "é" * 2**15})
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line}\n" * 64 + "{oops\n", encoding="utf-8")
    where_broken(path)
    tracemalloc.start()
    try:
        assert where_broken(path).startswith("line 65: ")
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (f"\ufeff{GOOD}\n{{oops\n", "line 2: "),
        (f"\ufeff\n\n[\n{GOOD},\n{{oops}}\n]", "line 5: "),
        (f"[\n{GOOD},\n".encode() + b'{"prompt": "\xe9"}]', "line 3 is no text in UTF-8"),
    ],
)
def test_the_places_in_other_files(content, place, tmp_path):
    (path := tmp_path / "a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert where_broken(path).startswith(place)


def test_a_file_without_a_broken_place(tmp_path):
    for name, content in (("a.json", json.dumps({"prompt": "1"}, indent=1)), ("a.jsonl", f"{GOOD}\n"), ("a.csv", "x")):
        (tmp_path / name).write_text(content)
        assert where_broken(tmp_path / name) == ""

"""A place that cannot be written to is noticed before any work is done, and nothing is left there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tiny_pair import arguments, settings
from written_runs import write_run

from cmdp_fast import files
from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer import cache_teacher, evaluate_student, run
from cmdp_fast.trainer.comparison import compare
from cmdp_fast.trainer.records.run_folder import check_run_folder
from cmdp_fast.trainer.run_report import command as report_command


def full(path: Path, monkeypatch) -> Path:
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    return path


def read_only(path: Path, monkeypatch) -> Path:
    """Not by its mode, which root does not heed."""

    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refused)
    return path


def in_a_file(path: Path, _) -> Path:
    (path / "file").touch()
    return path / "file" / "runs"


def a_file(path: Path, _) -> Path:
    (path / "file").touch()
    return path / "file"


def behind_a_lost_link(path: Path, _) -> Path:
    (path / "link").symlink_to(path / "gone")
    return path / "link" / "runs"


PLACES = {
    full: "No space left on device",
    read_only: "Read-only file system",
    in_a_file: "file is a file, expected a folder",
    a_file: "file is a file, expected a folder",
    behind_a_lost_link: "link is a link to nothing",
    lambda path, _: path / ("n" * 300) / "runs": "File name too long",
    lambda path, _: path / "a\0b": "null",
    lambda path, _: Path("/proc/runs"): "No such file or directory",
}


def left(path: Path) -> set[str]:
    return {str(each.relative_to(path)) for each in path.rglob("*")}


@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_written_to(place, tmp_path, monkeypatch):
    folder = place(tmp_path, monkeypatch)
    before = left(tmp_path)
    with pytest.raises(InputError, match="^--output-dir X: .*" + PLACES[place]):
        files.check_writable(folder, "--output-dir X")
    assert left(tmp_path) == before


def test_a_place_that_is_not_there_yet(tmp_path):
    for folder in (tmp_path, tmp_path / "a" / "b", tmp_path / "a" / ".." / ".." / "b"):
        files.check_writable(folder, "--output-dir X")
    assert not left(tmp_path)


def working(*_, **__):
    pytest.fail("work is done before the place is looked at")


def test_a_run_to_be_resumed(pair, tmp_path, monkeypatch):
    folder = write_run(tmp_path / "r")
    check_run_folder(settings(pair, resume=str(folder)))
    read_only(folder, monkeypatch)
    with pytest.raises(InputError, match=f"^--resume {folder}: {folder} cannot be written to: Read-only"):
        check_run_folder(settings(pair, resume=str(folder)))


@pytest.mark.parametrize("command", ["train", "compare", "study", "evaluate", "cache-teacher", "report"])
def test_no_command_works_before_it_looks(command, pair, tmp_path, monkeypatch, capsys):
    for owner, name in (
        *((run, "load"), (evaluate_student, "load"), (cache_teacher, "load_problems")),
        *((compare, "plan"), (compare, "run_study"), (report_command, "read_runs")),
    ):
        monkeypatch.setattr(owner, name, working)
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "place"
    given = arguments(pair, place)
    words = {
        "train": given,
        "compare": ["compare", "--recipe=quickstart", f"--output-dir={place}"],
        "study": ["compare", "--study=transfer", f"--output-dir={place}"],
        "evaluate": ["evaluate", *given[1:], f"--json={tmp_path / 'file' / 'f.json'}"],
        "cache-teacher": ["cache-teacher", *given[1:], f"--output={place}"],
        "report": ["report", str(tmp_path), f"--output-dir={place}"],
    }[command]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and "Traceback" not in error

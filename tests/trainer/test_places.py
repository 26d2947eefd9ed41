"""A place that cannot be written to is noticed before any work is done, and nothing is left there."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_pair import arguments, arguments_for, settings
from written_runs import write_run

from cmdp_fast import files
from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer import cache_teacher, evaluate_student, run
from cmdp_fast.trainer.cache_teacher import CacheConfig
from cmdp_fast.trainer.comparison import compare
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.records.run_folder import Beginning, check_run_folder, make_run_folder
from cmdp_fast.trainer.run_report import command as report_command
from cmdp_fast.trainer.training import Training


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
        "evaluate": [*arguments_for(EvaluateConfig, "evaluate", pair), f"--json={tmp_path / 'file' / 'f.json'}"],
        "cache-teacher": [*arguments_for(CacheConfig, "cache-teacher", pair), f"--output={place}"],
        "report": ["report", str(tmp_path), f"--output-dir={place}"],
    }[command]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and "Traceback" not in error


def as_another_user(function) -> None:
    """In a child, which heeds the modes of files: root does not."""

    def child() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        function()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.fixture
def open_folder():
    """One that other users come to, as they do not to `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)
        os.chmod(folder, 0o777)


def test_real_permissions(pair, open_folder):
    """The first run is somebody else's, and nobody can write into it: the next one has a folder of its own."""
    first = open_folder / "quickstart"
    first.mkdir()
    os.chmod(first, 0o555)
    config = settings(pair, output_dir=str(open_folder))

    def beside() -> None:
        check_run_folder(config)
        with ExitStack() as held:
            folder = make_run_folder(config, Beginning({}, {}, 1), held, print)
            assert folder.name == "quickstart-2" and (folder / "config.json").is_file()

    def closed() -> None:
        with pytest.raises(InputError, match=f"^--output-dir {open_folder}: {open_folder} cannot be written to: Perm"):
            check_run_folder(config)

    as_another_user(beside)
    os.chmod(open_folder, 0o555)
    as_another_user(closed)
    assert left(first) == set()


@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a run"])
def test_what_has_the_name_already(kind, pair, tmp_path, monkeypatch):
    """Without --name the run has another, and what is there is left alone; with it that is said."""
    taken = tmp_path / "quickstart"
    if kind == "a file":
        taken.touch()
    elif kind == "a run":
        write_run(taken)
    else:
        taken.symlink_to(tmp_path / "gone")
    config, before, mkdir = settings(pair, output_dir=str(tmp_path)), left(tmp_path), os.mkdir

    def watched(path, *args, **options):
        assert Path(taken) not in Path(path).parents
        return mkdir(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", watched)
    check_run_folder(config)
    assert left(tmp_path) == before
    with pytest.raises(InputError, match="quickstart exists: choose another --name"):
        check_run_folder(settings(pair, output_dir=str(tmp_path), name="quickstart"))
    with ExitStack() as held:
        assert make_run_folder(config, Beginning({}, {}, 1), held, print).name == "quickstart-2"


def test_a_name_that_is_too_long(pair, tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        check_run_folder(dataclasses.replace(settings(pair), output_dir=str(tmp_path), recipe="n" * 250 + ".toml"))


def test_the_command_to_go_on_with_is_one_to_be_pasted():
    learner, config = SimpleNamespace(steps_done=1), SimpleNamespace(steps=2)
    run = SimpleNamespace(folder=Path("my runs/r"), saved=0, learner=learner, config=config)
    assert "`train --resume 'my runs/r'`" in Training._what_is_left(run)

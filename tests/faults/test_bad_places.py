"""A place that cannot be written to is noticed by every command before any work; real disks, full or read-only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults import command, in_child, make_read_only, small_disk
from tiny_pair import arguments_for, settings

from cmdp_fast import cli
from cmdp_fast.bench import command as bench_command
from cmdp_fast.trainer import cache_teacher, evaluate_student, run
from cmdp_fast.trainer.cache_teacher import CacheConfig
from cmdp_fast.trainer.comparison import compare
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.records.run_folder import Beginning, write_config
from cmdp_fast.trainer.run_report import command as report_command

WORK = [
    *((run, "load"), (evaluate_student, "load"), (cache_teacher, "find_pair"), (compare, "plan")),
    *((report_command, "read_runs"), (bench_command, "run_case")),
]
NOT_ALLOWED = 77


def commands(pair, place: Path) -> list[list[str]]:
    """Every command that writes, with what it writes in a place."""
    bench = ["bench", "budget_trace", "--shapes=tiny", "--dtype=float32", "--peers=none", "--repeat=1", "--no-memory"]
    return [
        command(pair, place),
        ["compare", "--recipe=quickstart", f"--output-dir={place}"],
        [*arguments_for(EvaluateConfig, "evaluate", pair), f"--json={place / 'f.json'}"],
        [*arguments_for(CacheConfig, "cache-teacher", pair), f"--output={place / 'cache'}"],
        ["report", str(place), f"--output-dir={place / 'report'}"],
        [*bench, f"--json={place / 'f.json'}"],
        [*bench, f"--plots={place / 'plots'}"],
    ]


def without_work(words: list[list[str]]) -> int:
    """How many of some commands end with one line and exit code 2, and nothing done before."""

    def working(*_, **__):
        raise AssertionError("work is done before the place is looked at")

    refused = 0
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in WORK:
            patch.setattr(owner, name, working)
        for each in words:
            assert cli.main(each) == 2, each
            refused += 1
    return refused


@pytest.mark.parametrize("state", ["read-only", "full"])
def test_real_disks(state, pair, tmp_path):
    place = tmp_path / "place"
    place.mkdir()

    def child() -> int:
        try:
            small_disk(place, "64k")
        except PermissionError:
            return NOT_ALLOWED
        (place / "old").mkdir()
        write_config(place / "old", settings(pair), Beginning({}, {}, 1))
        (place / "old" / ".lock").touch()  # as every run has it
        if state == "read-only":
            make_read_only(place)
        else:
            (place / "large").write_bytes(b"x" * (64 - 4 * len(list(place.rglob("*")))) * 1024)
            with pytest.raises(OSError, match="space"):
                (place / "more").write_bytes(b"x" * (1 << 16))
        words = [*commands(pair, place), ["train", f"--resume={place / 'old'}"]]
        before = sorted(map(str, place.rglob("*")))
        assert without_work(words) == len(words)
        assert sorted(map(str, place.rglob("*"))) == before
        return 0

    code = in_child(child, tmp_path / "told")
    if code == NOT_ALLOWED:
        pytest.skip("no disk of its own is allowed here")
    said = (tmp_path / "told").read_text()
    assert code == 0 and said.count("cmdp-fast: error: ") == 8 and "Traceback" not in said, said
    assert said.count("Read-only file system" if state == "read-only" else "No space left on device") == 8, said


@pytest.mark.parametrize("kind", ["a file", "a link to nothing"])
def test_what_is_no_folder(kind, pair, tmp_path, capsys):
    place = tmp_path / "place"
    if kind == "a file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "gone")
    words = commands(pair, place)
    assert without_work(words) == len(words)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(words) and all(str(place) in line for line in errors)
    assert not (tmp_path / "gone").exists() and (kind != "a file" or place.read_text() == "mine")


@pytest.mark.parametrize("name", ["n" * 255, "n" * 254, "é" * 127])
def test_a_file_whose_name_leaves_no_room_for_another_beside_it(name, pair, tmp_path, capsys):
    """What is written appears under a name that is one longer, before it is whole."""
    words = [each for each in commands(pair, tmp_path / "x") if any(word.startswith("--json") for word in each)]
    words = [[*each[:-1], f"--json={tmp_path / name}"] for each in words]
    fits = len(os.fsencode(name)) < 255
    with pytest.MonkeyPatch.context() as patch:
        for owner, function in WORK:
            patch.setattr(owner, function, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        for each in words:
            assert cli.main(each) == (130 if fits else 2)
    assert ("File name too long" in capsys.readouterr().err) != fits

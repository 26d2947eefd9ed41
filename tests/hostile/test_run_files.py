"""Every field of every file of a run that a command reads back, with every kind of value in it, under the right sha256:
anybody can compute that."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from json_changes import PARTS, changed, every_change, is_one_line
from tiny_pair import arguments
from written_runs import write_run

from cmdp_fast.cli import main
from cmdp_fast.digest import Damaged, read_sealed, write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.comparison import compare
from cmdp_fast.trainer.comparison.plan import SeededRun, training_seconds
from cmdp_fast.trainer.comparison.table import estimate
from cmdp_fast.trainer.records.checkpoint import MANIFEST
from cmdp_fast.trainer.records.ending import finished_summary
from cmdp_fast.trainer.records.form import check_records
from cmdp_fast.trainer.records.resume import read_config
from cmdp_fast.trainer.records.samples import samples_text, write_samples
from cmdp_fast.trainer.records.session import earlier
from cmdp_fast.trainer.settings.recipe import read_recipe


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory, one_thread) -> Path:
    output = tmp_path_factory.mktemp("run")
    assert main(arguments(pair, output, checkpoint_every=2)) == 0
    return output / "r"


@PARTS
def test_every_field_of_the_settings(part, run, tmp_path):
    """A run is begun again with these, or refused: nothing else."""
    path = tmp_path / "config.json"
    taken = 0
    for what, value in every_change({n: v for n, v in read_sealed(run / "config.json").items() if n != "origin"}, part):
        write_sealed(path, value)
        try:
            config = read_config(tmp_path).config
            assert config.temperature > 1e-30, what
            taken += 1
        except InputError as error:
            assert is_one_line(error), what
    assert taken


@PARTS
def test_every_field_of_the_end(part, run, tmp_path):
    """What a comparison counts with is numbers."""
    folder = Path(shutil.copytree(run, tmp_path / "r"))
    about = read_sealed(run / "summary.json")
    kept = {name: value for name, value in about.items() if name not in ("sessions", "config")}
    for what, value in every_change(kept, part):
        write_sealed(folder / "summary.json", {"config": {}, **value})
        try:
            summary = finished_summary(folder)
        except Damaged as error:
            assert is_one_line(error), what
            continue
        for who in ("teacher", "student_before", "student_after") if summary else ():
            for number in (summary[who] or {}).values():
                assert number is None or math.isfinite(estimate([number, 0.0]).error), what
        assert summary is None or math.isfinite(training_seconds(summary)), what


@PARTS
def test_every_field_of_a_checkpoint(part, run, tmp_path):
    """What is gone on with can be written at the end, after all the steps."""
    (folder,) = (run / "checkpoints").iterdir()
    state = {name: value for name, value in read_sealed(folder / MANIFEST).items() if name not in ("files", "sha256")}
    for what, value in every_change(state, part):
        try:
            check_records(value, evaluated_before=True)
        except Exception:  # all of which `Training` turns into one line
            continue
        write_samples(tmp_path / "samples.jsonl", value["samples"])
        for who, some in value["samples"].items():
            shown = samples_text([(str(who), some)])
            assert "\x1b" not in shown and shown.encode(), what
        assert math.isfinite(sum(value["seconds"].values())), what
        earlier(value.get("sessions"))


def test_a_run_goes_on_from_none_of_them(run, tmp_path, capsys):
    """A few of them all the way: what fell once."""
    for number, (place, new) in enumerate(
        {
            ("seconds", "evaluation"): 10**400,
            ("samples", "teacher", 0, "correct"): {},
            ("samples", "teacher", 0, "completion"): "\ud800",
            ("schedule", "last_epoch"): "\x1b[2J" * 1000,
            ("ppo",): {"x": "\x1b[2J" * 1000},
        }.items()
    ):
        folder = Path(shutil.copytree(run, tmp_path / str(number)))
        (folder / "summary.json").unlink()
        (checkpoint,) = (folder / "checkpoints").iterdir()
        write_sealed(checkpoint / MANIFEST, changed(read_sealed(checkpoint / MANIFEST), place, new))
        capsys.readouterr()
        code, said = main(["train", f"--resume={folder}"]), capsys.readouterr().err
        assert code in (0, 2) and (not code or said.count("\n") == 1), place
        assert "\x1b" not in said and len(said) < 1000, place


SAMPLES = {
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "null": b"null",
    "no text": b'{"who": "student_after", "prompt": "1", "completion": 5}',
    "no prompt": b'{"who": "student_after", "completion": "1"}',
    "half a character": b'{"who": "\xff"}',
    "UTF-16": '{"who": "student_after"}'.encode("utf-16"),
    "a long number": b'{"who": ' + b"1" * 5000 + b"}",
    "a deep prompt": b'{"who": "a", "completion": "1", "prompt": ' + b"[" * 900 + b"]" * 900 + b', "x": ' + b"[" * 9999,
}


@pytest.mark.parametrize("case", SAMPLES)
def test_samples_that_a_comparison_reads_back(case, tmp_path):
    write_run(tmp_path / "r", samples=[])
    (tmp_path / "r" / "samples.jsonl").write_bytes(SAMPLES[case] + b"\n")
    seeded = SeededRun.__new__(SeededRun)
    object.__setattr__(seeded, "config", type("Of", (), {"output_dir": str(tmp_path), "name": "r"}))
    with pytest.raises(InputError, match="line 1: expected a sample") as raised:
        compare.samples_of(seeded, "student_after")
    assert is_one_line(raised.value)


def test_a_hundred_thousand_samples_of_one_prompt(tmp_path, monkeypatch):
    """Each has its number without a look at all before it."""
    line = json.dumps({"who": "student_after", "prompt": "1", "completion": "2"}) + "\n"
    write_run(tmp_path / "r", samples=[line * 100_000])
    seeded = SeededRun.__new__(SeededRun)
    object.__setattr__(seeded, "config", type("Of", (), {"output_dir": str(tmp_path), "name": "r"}))
    found = compare.samples_of(seeded, "student_after")
    assert len(found) == 100_000 and found['"1"', 99_999] == "2"


TOML = {
    "UTF-16": "steps = 1".encode("utf-16"),
    "half a character": b"student = '\xff'",
    "zeros": b"\0" * 10,
    "deep": b"x = " + b"[" * 100_000,
    "deep tables": b"x" + b".x" * 100_000 + b" = 1",
    "a long number": b"steps = " + b"1" * 5000,
    "twice": b"steps = 1\nsteps = 2",
    "a date": b"steps = 1979-05-27",
    "another type": b"steps = 'many'",
    "infinity": b"budget = inf",
    "a code": b'student = "\\u001b[2J"\nx = 1',
    "a table": b"[steps]\nx = 1",
}


@pytest.mark.parametrize("case", TOML)
def test_recipes_of_somebody_else(case, tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(TOML[case])
    with pytest.raises(InputError) as raised:
        read_recipe(str(path)).validate()
    assert is_one_line(raised.value)

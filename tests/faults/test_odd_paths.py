"""Names that people give to folders and files: what is written there is found again, by every command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import SHORT, command
from tiny_pair import arguments, arguments_for

from cmdp_fast.cli import main
from cmdp_fast.trainer import cache_teacher, run
from cmdp_fast.trainer.cache_teacher import CacheConfig
from cmdp_fast.trainer.comparison import compare
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.run_report import command as report_command

NAMES = {
    "letters": "e\u0301 é 中文 😀\u200d👩 \u00a0x",  # combining, joined, a space that does not break
    "right to left": "שלום \u202eabc",
    "newline": "a\nb\tc",
    "a dash": "-rf",
    "markup": "[bold red]x[not bold] {0} %s %(x)s [link=x]",
    "quotes": "a'b\"c\\d $(x) `y` ;&|#*?=",
    "long": "n" * 230,
}


def all_commands(pair: dict[str, str], tmp: Path, name: str, settings: dict) -> list[list[str]]:
    """A run with everything in a folder of the name, which is gone on with, evaluated and reported."""
    place = tmp / name
    place.mkdir()
    shutil.copytree(pair["student"], place / f"student {name}"[:200])
    shutil.copy(pair["dataset"], place / f"{name}.jsonl")
    here = {**pair, "student": place / f"student {name}"[:200], "dataset": place / f"{name}.jsonl"}
    run = place / "out" / "r"
    return [
        [*arguments(here, place / "out", **settings), "--no-eval-before"],
        ["train", f"--resume={run}", "--steps=2"],
        ["evaluate", f"--resume={run}", f"--json={place / (name + '.json')}", "--eval-prompts=1"],
        ["report", str(run), f"--output-dir={place / ('report ' + name)[:200]}"],
    ]


def run_all(pair: dict[str, str], tmp: Path, name: str, settings: dict) -> None:
    for words in all_commands(pair, tmp, name, settings):
        assert main(words) == 0, words
    place = tmp / name
    assert len((place / "out" / "r" / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((place / f"{name}.json").read_text())["examples"] == 1
    assert len(list((place / f"report {name}"[:200]).iterdir())) == 3
    assert {path.name for path in tmp.iterdir()} == {name}  # and nothing beside it


@pytest.mark.parametrize("kind", NAMES)
def test_names(kind, pair, tmp_path, pytestconfig, monkeypatch, capfd):
    if kind not in ("letters", "markup") and not pytestconfig.getoption("--slow"):
        pytest.skip("of the names two in each run of the tests; with --slow all")
    monkeypatch.setattr(report_command, "plot_png", lambda *_: b"not drawn")
    run_all(pair, tmp_path, NAMES[kind], {**SHORT, "steps": 1, "save_student_every": 0, "eval_every": 0})
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_python_that_reads_names_as_ascii(pair, tmp_path):
    """Where somebody has switched off what makes it read them as UTF-8 even in the locale C."""
    code = "import sys; from cmdp_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    ascii_alone = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name, expected in (("é 😀", 2), ("plain", 0)):
        words = command(pair, tmp_path / name, steps=1)
        done = subprocess.run([sys.executable, "-c", code, *words], env=ascii_alone, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        assert ("with PYTHONUTF8=1" in done.stderr) == bool(expected)


def test_a_name_in_which_no_model_can_be_written(pair, tmp_path, monkeypatch, capsys):
    """Not UTF-8, which safetensors and tokenizers insist on: said before any work, and figures may go there."""
    name = os.fsdecode(b"a\xff\xfeb")
    for owner, function in ((run, "load"), (cache_teacher, "find_pair"), (compare, "plan")):
        monkeypatch.setattr(owner, function, lambda *_, **__: pytest.fail("work is done"))
    (tmp_path / name).mkdir()
    for words in (
        command(pair, tmp_path / name),
        command(pair, tmp_path / name / "new"),
        [*command(pair, tmp_path), f"--name={name}2"],
        [*arguments_for(CacheConfig, "cache-teacher", pair), f"--output={tmp_path / name}"],
        ["compare", "--recipe=quickstart", f"--output-dir={tmp_path / name}"],
    ):
        assert main(words) == 2, words
        assert "is not UTF-8, and no model can be written there" in capsys.readouterr().err
    assert not list((tmp_path / name).iterdir())
    words = arguments_for(EvaluateConfig, "evaluate", pair, eval_generations=1)
    assert main([*words, f"--json={tmp_path / name / name}"]) == 0
    assert json.loads((tmp_path / name / name).read_text())["examples"]

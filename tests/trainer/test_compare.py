"""`cmdp-fast compare`: real runs of tiny models, killed and taken up again; what is refused before anything runs."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
from forked_trainings import forking
from tiny_pair import untimed

from cmdp_fast.cli import main
from cmdp_fast.digest import read_sealed, write_sealed
from cmdp_fast.files import as_json
from cmdp_fast.terminal import ConsoleLost
from cmdp_fast.trainer.comparison import compare as compare_module
from cmdp_fast.trainer.comparison import launching
from cmdp_fast.trainer.comparison.launching import run_all
from cmdp_fast.trainer.comparison.plan import DEFAULT_METHODS, CompareConfig, parse_compare, plan, variant
from cmdp_fast.trainer.comparison.plots import plot_budgets, sweeps
from cmdp_fast.trainer.comparison.table import Estimate, TableRow, cell, columns_of, estimate, markdown
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.settings.recipe import METHOD_FILES
from cmdp_fast.trainer.settings.values import typed


@pytest.fixture(scope="module")
def undrawn() -> None:
    """Here figures are drawn."""


def words(recipe: Path, folder: Path, methods: str, seeds: str = "0 1", **options: str) -> list[str]:
    command = ["compare", "--recipe", str(recipe), "--methods", *methods.split(), "--seeds", *seeds.split()]
    command += ["--output-dir", str(folder), "--jobs", "2"]
    return command + [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


@pytest.fixture
def forked() -> Iterator[None]:
    with forking():
        yield


METHODS = "cmdp lagrangian:coefficient=0.5"


@pytest.fixture(scope="module")
def comparison(recipe, tmp_path_factory, one_thread) -> Path:
    """Two methods, two seeds; killed after the first run, with another one at work, and taken up again."""
    folder = tmp_path_factory.mktemp("comparison")
    command = words(recipe, folder, METHODS, judge="programmatic")
    program = [sys.executable, "-m", "cmdp_fast.cli", *command]
    killed = subprocess.Popen(program, stdout=subprocess.DEVNULL, start_new_session=True)
    first = folder / "runs" / "cmdp-seed0" / "summary.json"
    while not first.exists():
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    for name in folder.rglob(".lock"):  # until those that it has started are gone as well
        with open(name) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
    assert not (folder / "table.md").exists()
    (folder / "runs" / "lagrangian-coefficient=0.5-seed1").mkdir(exist_ok=True)  # what a killed run may leave
    before = first.stat().st_mtime_ns
    with forking(), redirect_stdout(StringIO()) as said:
        assert main(command) == 0
    assert first.stat().st_mtime_ns == before  # what was finished is not run again
    assert "4 runs, 0 of them" not in said.getvalue()
    return folder


def table_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as lines:
        return list(csv.DictReader(lines))


def test_every_run_is_in_the_results(comparison):
    results = table_of(comparison / "results.csv")
    assert len(results) == 4 and not any(r["failure"] for r in results)
    for r in results:
        summary = json.loads((comparison / "runs" / r["run"] / "summary.json").read_text())
        assert float(r["accuracy"]) == summary["student_after"]["accuracy"]
        assert summary["config"]["seed"] == int(r["seed"])
        assert summary["config"]["budget"] == float(r["budget"])
        for key, value in json.loads(r["changes"]).items():
            assert summary["config"][key] == value
        assert float(r["win"]) + float(r["tie"]) + float(r["loss"]) == pytest.approx(1)


def test_table_is_the_mean_over_seeds(comparison):
    results, table = table_of(comparison / "results.csv"), table_of(comparison / "table.csv")
    assert [row["method"] for row in table] == ["teacher", "student before", *METHODS.split()]
    for row in table[2:]:
        assert row["runs"] == "2"
        label = row["method"]
        changes = dict([label.partition(":")[2].split("=")]) if ":" in label else {}
        some = [r for r in results if r["method"] == label.partition(":")[0]]
        some = [r for r in some if {k: str(v) for k, v in json.loads(r["changes"]).items()} == changes]
        values = [float(r["mean_cumulative_kl"]) for r in some]
        assert len(values) == 2
        assert float(row["mean_cumulative_kl"]) == pytest.approx(sum(values) / 2)
        assert float(row["mean_cumulative_kl_stderr"]) == pytest.approx(abs(values[0] - values[1]) / 2)
    assert float(table[0]["mean_cumulative_kl"]) == pytest.approx(0, abs=1e-5)
    assert float(table[0]["prefix_satisfaction"]) <= 1


def test_a_run_is_that_of_the_command_of_its_settings(comparison, recipe, tmp_path):
    """To the last digit: the first run was forked from a process that had imported everything."""
    assert main(["train", f"--recipe={recipe}", "--method=cmdp", f"--output-dir={tmp_path}", "--name=alone"]) == 0
    run = comparison / "runs" / "cmdp-seed0"
    assert (tmp_path / "alone" / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()
    for ours, theirs in zip(metrics_of(tmp_path / "alone"), metrics_of(run), strict=True):
        assert ours == theirs


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_rows_of_what_was_not_evaluated_are_left_out(recipe, tmp_path, forked):
    assert main(words(recipe, tmp_path, "cmdp:eval_before=false", "0")) == 0
    assert [row["method"] for row in table_of(tmp_path / "table.csv")] == ["cmdp:eval_before=false"]


def test_files_for_people(comparison):
    text = (comparison / "table.md").read_text()
    assert text.startswith("    cmdp-fast compare --recipe ")
    assert "python 3" in text and "| teacher | 1 | " in text and "lagrangian:coefficient=0.5" in text
    for plot in ("comparison.png", "pareto.png"):
        assert (comparison / plot).read_bytes().startswith(b"\x89PNG")
    assert not (comparison / "budget.png").exists()


def test_finished_comparison_runs_nothing(comparison, recipe, capsys):
    before = {path: path.stat().st_mtime_ns for path in comparison.glob("runs/*/summary.json")}
    assert main(words(recipe, comparison, METHODS)) == 0
    assert "4 runs, 4 of them finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in comparison.glob("runs/*/summary.json")}


def test_finished_runs_of_other_settings_are_not_touched(comparison, recipe, tmp_path, capsys):
    other = tmp_path / "tiny.toml"
    other.write_text(recipe.read_text().replace("penalty", "").replace("steps = 2", "steps = 3"))
    assert main(words(other, comparison, "cmdp", "0")) == 2
    error = capsys.readouterr().err
    assert "was run with other settings" in error and error.count("\n") == 1
    assert (comparison / "runs" / "cmdp-seed0" / "summary.json").exists()


@pytest.mark.parametrize("what", ["problems", "teacher", "code"])
def test_runs_of_other_material_do_not_share_a_table(what, comparison, recipe, capsys):
    """They did after a file had changed between two calls."""
    command = words(recipe, comparison, METHODS)
    first, *_, other = (run.folder for run in plan(parse_compare(command[1:])))
    began = read_sealed(other / "config.json")
    origin = {**began["origin"], what: "0" * 64}
    write_sealed(
        other / "config.json", {**began, **({what: {"a.py:b": "0"}} if what == "code" else {"origin": origin})}
    )
    assert main(command) == 2
    error = capsys.readouterr().err
    if what == "code":
        assert f"{other}: its code is not in the file that it was run with: remove {other}, or" in error
    else:
        assert f"{first} and {other} had different " in error and what in error and f": remove {first}, or" in error
    write_sealed(other / "config.json", began)


def test_a_run_without_its_whole_end_is_not_finished(recipe, tmp_path, capsys, forked):
    """One that was killed is made anew; one that was finished and then damaged is named, and left as it is."""
    command, run = words(recipe, tmp_path, "cmdp", "0"), tmp_path / "runs" / "cmdp-seed0"
    assert main(command) == 0
    whole = (run / "student" / "model.safetensors").read_bytes()
    (run / "summary.json").unlink()  # it is the last file
    (run / "student" / "model.safetensors").unlink()
    assert main(command) == 0
    assert "1 runs, 0 of them finished already" in capsys.readouterr().out
    assert (run / "student" / "model.safetensors").read_bytes() == whole
    shutil.copytree(run, tmp_path / "whole")
    damages = {
        "student/model.safetensors": lambda path: path.write_bytes(whole[:-1] + b"!"),
        "samples.jsonl": lambda path: path.unlink(),
        "summary.json": lambda path: path.write_text('{"interrupted": false}'),  # as of an earlier version
    }
    for name, damage in damages.items():
        damage(run / name)
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"{run}: {name} " in error and "remove" in error and error.count("\n") == 1
        assert (run / "student" / "model.safetensors").exists()
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "whole", run)
    assert main(command) == 0


def test_two_comparisons_in_a_folder(comparison, recipe, capsys):
    with open(comparison / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(words(recipe, comparison, METHODS)) == 2
    assert "is at work here" in capsys.readouterr().err


def test_a_run_that_fails_costs_itself(recipe, tmp_path, capsys, forked):
    """The second method's learning rate takes its weights to infinity."""
    methods = "cmdp cmdp:learning_rate=1e38,max_grad_norm=1e38"
    assert main(words(recipe, tmp_path, methods, "0", judge="programmatic", judge_against="cmdp")) == 1
    output = capsys.readouterr().out
    assert "FAILED cmdp-learning_rate=1e38-max_grad_norm=1e38-seed0: exit code" in output
    good, bad = table_of(tmp_path / "results.csv")
    assert good["accuracy"] and not good["failure"] and bad["failure"] and not bad["accuracy"]
    assert [row["method"] for row in table_of(tmp_path / "table.csv")] == ["teacher", "student before", "cmdp"]


REFUSED = {
    "method": ("cmpd", "--methods cmpd: neither"),
    "setting": ("cmdp:bugdet=1", "no setting named 'bugdet'"),
    "value": ("cmdp:budget=much", "budget must be float"),
    "value out of range": ("cmdp:budget=-1", "--methods cmdp:budget=-1: --budget must be a positive number"),
    "choice": ("cmdp:baseline=mean", "--baseline must be one of"),
    "no value": ("cmdp:budget", "expected setting=value"),
    "no method": (":budget=1", "expected a method's name"),
    "another run": ("cmdp:resume=runs/a", "resume is for the comparison to choose"),
    "no run": ("cmdp:dry_run=true", "dry_run is for the comparison to choose"),
    "no weights": ("cmdp:random_weights=true", "random_weights is for the comparison to choose"),
    "unread": ("sft:penalty=2", "--methods sft:penalty=2: --penalty 2.0 would have no effect"),
    "the comparison's own": ("cmdp:seed=1", "seed is for the comparison to choose"),
    "twice": ("cmdp cmdp", "each once"),
    "same folder": ("cmdp:rollout=a:b cmdp:rollout=a:b,", "expected setting=value"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_once(case, recipe, tmp_path, capsys):
    methods, expected = REFUSED[case]
    assert main(words(recipe, tmp_path / "new", methods)) == 2
    error = capsys.readouterr().err
    assert error.startswith("cmdp-fast: error: ") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "new").exists()


LACKING = "there are no completions of a teacher that is asked, nor with --no-eval-before; expected one of "
ASKED = f"--judge-against teacher: {LACKING}student_before, cmdp"
NOT_BEFORE = f"--judge-against student_before: {LACKING}cmdp:eval_before=false"


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(judge="nobody"), "--judge nobody: neither one of programmatic nor module:function"),
        (dict(judge_against="grpo"), "--judge-against grpo: expected one of teacher, student_before, cmdp"),
        (dict(judge_against="student_before"), "--judge-against student_before would have no effect"),
        (dict(judge="programmatic", methods="cmdp:teacher=served:http://127.0.0.1:1"), ASKED),
        (dict(judge="programmatic", methods="cmdp cmdp:teacher_device=cpu"), ASKED),
        (dict(judge="programmatic", methods="cmdp:eval_before=false"), f"{LACKING}cmdp:eval_before=false"),
        (dict(judge="programmatic", methods="cmdp:eval_before=false", judge_against="student_before"), NOT_BEFORE),
        (dict(jobs="-1"), "--jobs must not be negative"),
        (dict(seeds="-1"), "--seeds must be in [0, 2147483648), not -1"),
    ],
)
def test_refused_options(options, expected, recipe, tmp_path, capsys):
    assert main(words(recipe, tmp_path / "new", **{"methods": "cmdp", **options})) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_default_comparison_is_whole():
    """Every method of the package but for other trainers' own, three multipliers, three seeds; and it could start."""
    runs = plan(CompareConfig())
    assert len(runs) == 3 * len(DEFAULT_METHODS) and len({run.folder for run in runs}) == len(runs)
    methods = {run.variant.method for run in runs}
    assert methods == {path.stem for path in METHOD_FILES.glob("*.toml")} - {"kl_reward", "kl_loss"}
    sweep = [run.config.coefficient for run in runs if run.variant.method == "lagrangian" and run.config.seed == 0]
    assert len(sweep) >= 3


def test_kl_penalties_are_compared_where_they_are_asked_for():
    runs = plan(CompareConfig(methods=("kl_reward:coefficient=0.1", "kl_loss:kl_loss_correction=true"), seeds=(0,)))
    assert [run.config.coefficient for run in runs] == [0.1, 0.04] and runs[1].config.kl_loss_correction


def test_overrides_reach_the_run_as_they_were_checked(recipe):
    found = variant("cmdp:rewards=['exact_answer'],budget_per_token=true,penalty=2,baseline=grpo", str(recipe))
    assert found.overrides == {
        "rewards": ("exact_answer",),
        "budget_per_token": True,
        "penalty": 2.0,
        "baseline": "grpo",
    }
    found = variant("pid:pid_gains=[0.2, 0.01,0.02],chat_template_kwargs={a = [1, 2], b = 3}", str(recipe))
    assert found.overrides == {"pid_gains": (0.2, 0.01, 0.02), "chat_template_kwargs": {"a": [1, 2], "b": 3}}


def test_settings_reach_the_process_that_trains():
    """As JSON, all of them, for every method."""
    for run in plan(CompareConfig(seeds=(0,))):
        assert TrainConfig(**typed(json.loads(as_json(asdict(run.config))), "")) == run.config


def test_runs_are_ended_with_the_comparison(recipe, tmp_path):
    """Whatever ends it, an interrupt for one, when the first run is over and the second at work: as one that is
    interrupted. Each has had its share of the processors, and holds the comparison's lock."""
    methods = ("cmdp:steps=50000", "cmdp")
    runs = plan(CompareConfig(recipe=str(recipe), methods=methods, seeds=(0,), output_dir=str(tmp_path)))
    with open(tmp_path / ".lock", "w") as lock:
        going = run_all([run.config for run in runs], 2, tmp_path / "logs", lock.fileno(), Report())
        assert next(going) == (runs[1].config, "")
        while not (started := runs[0].folder / "metrics.jsonl").exists() or not started.stat().st_size:
            time.sleep(0.01)
        pid = int((runs[0].folder / ".lock").read_text().split()[1])
        threads = f"OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // 2)}".encode()
        assert threads in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert str(tmp_path / ".lock") in {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
        going.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert json.loads((runs[0].folder / "summary.json").read_text())["interrupted"]


def test_one_processor_one_run(recipe, tmp_path, monkeypatch):
    """No more runs at a time than asked for, and the processors divided between them."""
    running, most = [], []

    class Counted:
        def start(self, name: str, config: TrainConfig, log: Path) -> None:
            running.append(name)
            most.append(len(running))

        def ended(self) -> tuple[str, int]:
            return running.pop(), 0

    @contextmanager
    def trainings(threads: int, *_: object, **__: object) -> Iterator[Counted]:
        assert threads == 4
        yield Counted()

    monkeypatch.setattr(launching, "trainings", trainings)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    runs = plan(CompareConfig(recipe=str(recipe), methods=("cmdp",), seeds=(0, 1, 2, 3), output_dir=str(tmp_path)))
    ended = list(run_all([run.config for run in runs], 2, tmp_path / "logs", 0, Report()))
    assert len(ended) == len(most) == 4 and max(most) == 2
    assert all(why == "exit code 0: no output" for _, why in ended)  # they have left no summary


def test_estimate():
    assert estimate([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7 / 3)))
    assert math.isnan(estimate([1.0]).error)


def test_plots_of_budgets(recipe, tmp_path):
    """Drawn for the methods that were run with several budgets, and for nothing else."""
    figures = {name: (0.5, 0.1) for name in ("accuracy", "constraint_satisfaction", "mean_cumulative_kl")}
    rows = [row(label, recipe, **figures) for label in ("pid", "cmdp", "cmdp:budget=0.5")]
    assert plot_budgets(tmp_path / "b.png", rows) and (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_budgets(tmp_path / "none.png", rows[:2]) and not (tmp_path / "none.png").exists()


def row(label: str, recipe: Path, **figures: tuple[float, float]) -> TableRow:
    v = variant(label, str(recipe))
    return TableRow(v.label, 2, v.config, {name: Estimate(*value) for name, value in figures.items()}, v)


def test_cells_and_columns(recipe):
    rows = [row("cmdp", recipe, accuracy=(0.9, 0.01), mean_cumulative_kl=(0.5, math.nan)), row("pid", recipe)]
    columns = columns_of(rows)
    assert [c.name for c in columns] == ["accuracy", "mean_cumulative_kl"]
    assert [cell(rows[0], c) for c in columns] == ["90.0 ± 1.0", "0.50"]
    assert [cell(rows[1], c) for c in columns] == ["", ""]
    assert "| cmdp | 2 | 90.0 ± 1.0 | 0.50 |" in markdown(rows, "cmdp-fast compare")


def test_the_table_is_written_before_it_is_shown_and_quotes_no_folder_of_home(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "summarise", lambda _: [row("cmdp", recipe, accuracy=(0.9, 0.01))])
    for plot in ("csv_of_results", "csv_of_rows"):
        monkeypatch.setattr(compare_module, plot, lambda _: "")
    for plot in ("plot_bars", "plot_pareto", "plot_budgets"):
        monkeypatch.setattr(compare_module, plot, lambda *_: False)
    monkeypatch.setenv("HOME", "/home/somebody")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        report = Report()
        words = ["cmdp-fast", "compare", "--recipe", "/home/somebody/x.toml", "--api-key", "abc"]
        compare_module.write(tmp_path, [], words, report)
    assert (tmp_path / "table.md").read_text().startswith("    cmdp-fast compare --recipe '~/x.toml' --api-key '***'\n")
    with pytest.raises(ConsoleLost, match="nobody reads the output any more; x"):
        report.check("x")


def test_sweeps_differ_in_one_setting(recipe):
    labels = [f"lagrangian:coefficient={c}" for c in (0.5, 0.1, 0.2)] + ["lagrangian:coefficient=0.3,gamma=0.5", "cmdp"]
    found = sweeps([row(label, recipe) for label in labels], "coefficient", lambda r: r.config.kind == "lagrangian")
    assert [[r.config.coefficient for r in curve] for curve in found] == [[0.1, 0.2, 0.5]]

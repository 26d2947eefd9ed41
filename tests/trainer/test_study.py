"""`cmdp-fast compare --study`: the trainings of a study, killed and taken up again; its lines; what is refused."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked_trainings import forking

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.comparison import launching
from cmdp_fast.trainer.comparison.plan import REFERENCES
from cmdp_fast.trainer.comparison.study import figures, lines
from cmdp_fast.trainer.comparison.study.lines import Line
from cmdp_fast.trainer.comparison.study.plan import (
    AFTER,
    STUDIES,
    Kind,
    Training,
    digest,
    plan,
    read_study,
)
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks.data import load_problems

STUDY = """
recipe = "RECIPE"
seeds = [0, 1]
[settings]
steps = 1
[[situations]]
name = "first"
[[situations]]
name = "tenfold"
[situations.settings]
reward_weights = [10]
[[situations]]
name = "wide"
[situations.settings]
budget = 4
[[methods]]
name = "cmdp"
candidates = ["cmdp"]
[[methods]]
name = "lagrangian"
candidates = ["lagrangian:coefficient=0.5", "lagrangian:coefficient=2,steps=2"]
[[methods]]
name = "gkd"
candidates = ["gkd"]
[[kinds]]
name = "low"
pattern = '^[0-4]\\+'
"""


@pytest.fixture
def study(recipe, tmp_path) -> Path:
    return written(tmp_path / "small.toml", recipe)


def written(path: Path, recipe: Path, *changes: tuple[str, str]) -> Path:
    """The study with some of its text replaced."""
    text = STUDY.replace("RECIPE", str(recipe))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


def words(study: Path, folder: Path, *more: str) -> list[str]:
    return ["compare", "--study", str(study), "--output-dir", str(folder), "--jobs", "2", *more]


# ---------------------------------------------------------------------------------------------------- the plan


def planned(study: Path) -> list[Training]:
    return plan(read_study(str(study)), Path("runs"))


def cells(training: Training) -> set[tuple[str, str]]:
    return {(wanted.line.candidate, wanted.line.situation) for wanted in training.wanted if wanted.who == AFTER}


def test_what_reads_the_same_is_trained_once(study):
    """A budget is read by cmdp alone, and the reward by all but gkd. Each situation has its own line and budget."""
    trainings = planned(study)
    some = [training for training in trainings if training.config.seed == 0]
    first, both = "lagrangian:coefficient=0.5", "lagrangian:coefficient=2,steps=2"
    assert [cells(training) for training in some] == [
        {("cmdp", "first")},
        {(first, "first"), (first, "wide")},
        {(both, "first"), (both, "wide")},
        {("gkd", "first"), ("gkd", "tenfold"), ("gkd", "wide")},
        {("cmdp", "tenfold")},
        {(first, "tenfold")},
        {(both, "tenfold")},
        {("cmdp", "wide")},
    ]
    assert [training.config.seed for training in trainings] == [0] * 8 + [1] * 8
    assert len({training.config.name for training in trainings}) == 16
    budgets = [(wanted.line.situation, wanted.line.budget) for wanted in some[3].wanted]
    assert budgets == [("first", 2.0), ("tenfold", 2.0), ("wide", 4.0)]


def test_teacher_and_student_before_stand_once_for_each_situation(study):
    """The first training of each looks at them before it; its name is the same whether it does or not."""
    trainings = planned(study)
    wanted = [(t, each) for t in trainings for each in t.wanted if each.who != AFTER]
    assert [(each.line.situation, each.line.method, each.who) for _, each in wanted] == [
        (situation, label, who) for situation in ("first", "tenfold", "wide") for who, label in REFERENCES.items()
    ]
    assert all(t.config.eval_before and t.config.seed == 0 and each.line.candidate == "" for t, each in wanted)
    assert sum(t.config.eval_before for t in trainings) == 3
    config = trainings[0].config
    assert digest(replace(config, eval_before=False)) == config.name


def test_settings_go_over_one_another(study):
    """Recipe and method, the study, the situation, the candidate."""
    by_cell = {(cell, t.config.seed): t.config for t in planned(study) for cell in cells(t)}
    config = by_cell[("lagrangian:coefficient=2,steps=2", "tenfold"), 1]
    assert (config.kind, config.coefficient, config.steps, config.reward_weights) == ("lagrangian", 2.0, 2, (10.0,))
    assert by_cell[("cmdp", "wide"), 0].budget == 4.0 and by_cell[("cmdp", "first"), 0].steps == 1
    assert not config.eval_before


def test_the_digest_is_of_what_is_read():
    """Of a setting that is the default it is the same whether there is such a setting at all."""
    config = TrainConfig(algorithm="gkd")
    assert digest(config) == digest(replace(config, name="a", recipe="b", method="gkd", penalty=3.0, budget_steps=5))
    assert digest(config) != digest(replace(config, seed=1))
    assert digest(config) != digest(replace(config, steps=config.steps + 1))
    assert digest(TrainConfig()) != digest(TrainConfig(budget=3.0))
    assert digest(TrainConfig(kind="worst_case")) == digest(TrainConfig(kind="worst_case", budget=3.0))


BAD = {
    "TOML": ('recipe = "', "recipe = ", "not valid TOML"),
    "nested without end": (
        "budget = 4",
        f"task_args = {{a = {'[' * 9999}}}",
        "not valid TOML: ",
    ),
    "a number of many digits": ("budget = 4", f"budget = {'9' * 5000}", "not valid TOML: "),
    "a number beyond all floats": (
        "budget = 4",
        f"budget = {'9' * 400}",
        "--budget must be a finite number, not inf",
    ),
    "a weight beyond all floats": ("[10]", f"[-{'9' * 400}]", "a finite number for each of the 1 --rewards, not -inf"),
    "what JSON has not": ("budget = 4", "task_args = {a = 1979-05-27}", "task_args must be a table of what JSON has"),
    "a candidate of two lines": ('["gkd"]', r'["gkd:jsd_beta=0.1\nseed=1"]', "must be a list of str, each once"),
    "many digits of a candidate": ('["gkd"]', f'["gkd:steps={"9" * 5000}"]', "steps must be int, not '999"),
    "unknown key": ("seeds =", "seed =", "there is no seed, only feasible, kinds"),
    "unknown key of a method": ('name = "gkd"', 'name = "gkd"\nbudget = 3', "methods 'gkd': there is no budget"),
    "seeds": ("[0, 1]", "[0, 0]", "seeds must be a list of int, each once, not [0, 0]"),
    "seed out of range": ("[0, 1]", "[-1]", "seeds must be in [0, 2147483648), not -1"),
    "feasible": ("seeds", "feasible = 2\nseeds", "feasible must be a share above 0, up to 1, not 2"),
    "unknown setting": ("budget = 4", "bugdet = 4", "situations 'wide', settings: there is no setting named 'bugdet'"),
    "value of a setting": ("steps = 1", 'steps = "one"', "settings: steps must be int, not 'one'"),
    "a setting of the study's own": ("budget = 4", "eval_before = true", "eval_before is for the study to choose"),
    "two of one name": ('"tenfold"', '"first"', "two of the situations have the name 'first'"),
    "a method of a reference's name": ('name = "gkd"', 'name = "teacher"', "methods 'teacher': the name is that of"),
    "no name": ('name = "gkd"', "", "methods 3: name must be a line of text, not None"),
    "no candidate": ('candidates = ["gkd"]', "candidates = []", "candidates must be a list of str, each once, not []"),
    "no situations": (
        STUDY[STUDY.index("[[situations]]") : STUDY.index("[[methods]]")],
        "",
        "needs its [[situations]]",
    ),
    "pattern": ("^[0-4]", "(", "pattern '(\\\\+': "),
    "recipe": ("tiny.toml", "no.toml", "methods 'cmdp', 'cmdp' in 'first': --recipe"),
    "method": ('["gkd"]', '["gdk"]', "methods 'gkd', 'gdk' in 'first': --method gdk: neither"),
    "not read": ('["gkd"]', '["gkd:penalty=2"]', "'gkd:penalty=2' in 'first': --penalty 2.0 would have no effect"),
    "a budget per token": ("budget = 4", "budget_per_token = true", "'cmdp' in 'wide': a study has one budget in nats"),
    "not in one situation": ("[10]", "[10, 10]", "'cmdp' in 'tenfold': --reward-weights must be a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_at_once(case, recipe, tmp_path, capsys):
    old, new, expected = BAD[case]
    study = written(tmp_path / "bad.toml", recipe, (old, new))
    assert main(words(study, tmp_path / "new")) == 2
    error = capsys.readouterr().err
    assert error.startswith("cmdp-fast: error: --study ") and error.count("\n") == 1 and expected in error
    assert "bad" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--recipe", "quickstart"], "--recipe would have no effect: --study"),
        (["--methods", "cmdp"], "--methods would have no effect: --study"),
        (["--judge", "programmatic"], "--judge would have no effect: --study"),
        (["--seeds", "1", "1"], "--seeds must be each once, not 1 1"),
    ],
)
def test_options_that_a_study_decides_about(more, expected, study, tmp_path, capsys):
    assert main(words(study, tmp_path / "new", *more)) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_no_such_study(tmp_path, capsys):
    assert main(["compare", "--study", "no"]) == 2
    assert "--study no: neither a TOML file nor one of the package's studies (" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_studies_of_the_package_could_start(path):
    study = read_study(path.stem)
    trainings = plan(study, Path("runs"))
    candidates = sum(len(method.candidates) for method in study.methods)
    count = sum(wanted.who == AFTER for training in trainings for wanted in training.wanted)
    assert count == len(study.seeds) * len(study.situations) * candidates >= len(trainings)
    if study.kinds:
        prompts = [row["prompt"] for row in load_problems(trainings[0].config).held_out]
        assert {next(k.name for k in study.kinds if re.search(k.pattern, prompt)) for prompt in prompts} == {
            kind.name for kind in study.kinds
        }


# ---------------------------------------------------------------------------------------------------- figures

SAMPLES: list[dict[str, Any]] = [
    {"prompt": "1+8=", "correct": True, "reward": 1.2, "length": 4, "sound": True, "cumulative_kl": 0.5},
    {"prompt": "2+7=", "correct": True, "reward": 1.1, "length": 5, "sound": False, "cumulative_kl": 3.0},
    {"prompt": "7+2=", "correct": False, "reward": 0.2, "length": 8, "sound": None, "cumulative_kl": 2.0},
    {
        "prompt": [{"role": "user", "content": "9+0="}],
        "correct": None,
        "reward": None,
        "length": 33,
        "sound": None,
        "cumulative_kl": 8.5,
    },
]


def test_figures_of_samples():
    """By hand. Exactly on the budget is within it; of four completions the worst tenth is a part of the last."""
    assert figures.figures_of(SAMPLES, 2.0, unit=2.0) == {
        "accuracy": 0.5,
        "within": 0.5,
        "right_and_within": 0.25,
        "reward_within": pytest.approx((1.2 + 0.2) / 2 / 4),
        "reasoning_success": 0.5,
        "mean_kl": 3.5,
        "cvar_kl": 8.5,
        "mean_length": 12.5,
        "examples": 4,
    }
    assert "reasoning_success" not in figures.figures_of(SAMPLES[2:], 2.0)
    quantiles = figures.kl_quantiles(SAMPLES)
    assert len(quantiles) == 21 and (quantiles[0], quantiles[10], quantiles[20]) == (0.5, 2.5, 8.5)
    assert quantiles[1] == pytest.approx(0.5 + 3 * 0.05 * 1.5)


def test_figures_by_kind_and_length():
    kinds = (Kind("low", r"^[0-4]\+"), Kind("with 7", "7"), Kind("none", "x"))
    low = {"share": 0.5, "accuracy": 1.0, "within": 0.5, "mean_kl": 1.75}
    with_7 = {"share": 0.25, "accuracy": 0.0, "within": 1.0, "mean_kl": 2.0}
    assert figures.by_kind(SAMPLES, 2.0, kinds) == {"low": low, "with 7": with_7}  # the first that fits
    by_length = figures.by_length(SAMPLES, 2.0)
    assert {name: part["share"] for name, part in by_length.items()} == {"1-4": 0.25, "5-8": 0.5, "33-64": 0.25}
    assert by_length["5-8"] == {"share": 0.5, "accuracy": 0.5, "within": 0.5, "mean_kl": 2.5}


# ---------------------------------------------------------------------------------------------------- lines

LINE = Line(
    "0123456789ab",
    "first",
    "cmdp",
    "cmdp",
    0,
    2.0,
    dict.fromkeys(sorted(lines.FIGURES), 1.0) | {"accuracy": 1 / 3},
    (*[0.0] * 20, 123456.7),
    {},
    {"1-4": dict.fromkeys(sorted(lines.PART), 0.5)},
)
FAILED = replace(LINE, seed=1, figures={}, kl_quantiles=(), lengths={}, failure="exit code 2: no")


def test_lines_are_read_as_they_were_written(tmp_path):
    """To five digits; the head is no line. Of a failure and what came after it the last counts."""
    path = tmp_path / "runs.jsonl"
    assert lines.read_lines(path) == []
    lines.append_lines(path, [LINE, FAILED], {"study": "small"})
    rounded = replace(LINE, figures=LINE.figures | {"accuracy": 0.33333}, kl_quantiles=(*[0.0] * 20, 123460.0))
    assert lines.read_lines(path) == [rounded, FAILED]
    lines.append_lines(path, [replace(rounded, seed=1)])
    assert lines.read_lines(path) == [rounded, replace(rounded, seed=1)]
    assert path.read_text().count('"study"') == 1


def test_a_line_is_of_its_budget(tmp_path):
    """A method that reads no budget has the same training for all of them, and other figures. A line is the one that
    was asked for, though it has fewer digits of its budget."""
    path, third = tmp_path / "runs.jsonl", replace(LINE, budget=1 / 3)
    lines.append_lines(path, [LINE, third, replace(LINE, budget=0.5)])
    assert [line.budget for line in lines.read_lines(path)] == [2.0, 0.33333, 0.5]
    assert lines.read_lines(path)[1].key == third.key


def test_a_line_that_is_not_whole_is_dropped_and_replaced(tmp_path):
    path, said = tmp_path / "runs.jsonl", []
    lines.append_lines(path, [LINE])
    whole = path.read_text()
    path.write_text(whole + whole[:-1])
    assert len(lines.read_lines(path, said.append)) == 1 and "the last line is not whole" in said[0]
    lines.append_lines(path, [FAILED])
    assert path.read_text().startswith(whole) and lines.read_lines(path)[1:] == [FAILED]


DAMAGES = {
    "not JSON": lambda value: "{",
    "a list": lambda value: "[]",
    "a number": lambda value: "3",
    "unknown key": lambda value: json.dumps({**value, "a": 1}),
    "no seed": lambda value: json.dumps({key: item for key, item in value.items() if key != "seed"}),
    "text for a number": lambda value: json.dumps({**value, "budget": "2"}),
    "a number for text": lambda value: json.dumps({**value, "training": 2}),
    "text": lambda value: '"study"',
    "nested without end": lambda value: "[" * 100_000,
    "a number of many digits": lambda value: json.dumps(value).replace("2.0", "9" * 400),
    "a figure is missing": lambda value: json.dumps({**value, "figures": {"accuracy": 1.0}}),
    "a figure of a part is missing": lambda value: json.dumps({**value, "kinds": {"low": {"share": 1.0}}}),
    "no length": lambda value: json.dumps({**value, "lengths": {"short": value["lengths"]["1-4"]}}),
    "quantiles": lambda value: json.dumps({**value, "kl_quantiles": [1.0]}),
    "not finite": lambda value: json.dumps({**value, "figures": {**value["figures"], "accuracy": math.nan}}),
    "nothing": lambda value: json.dumps({**value, "figures": {}}),
    "parts": lambda value: json.dumps({**value, "kinds": [1]}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_lines_are_named(damage: Callable[[dict[str, Any]], str], tmp_path):
    path = tmp_path / "runs.jsonl"
    lines.append_lines(path, [LINE])
    whole = path.read_text()
    path.write_text(whole + damage(json.loads(whole)) + "\n" + whole)
    with pytest.raises(InputError, match=r"runs\.jsonl, line 2: not a line of a study: ") as error:
        lines.read_lines(path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- the whole


def run(command: list[str]) -> int:
    with forking():
        return main(command)


def test_a_study_that_is_killed_goes_on(recipe, tmp_path, capsys):
    """Killed with one training behind it and others at work; what has a line is not run again, and all others are."""
    study = written(tmp_path / "small.toml", recipe, ("[0, 1]", "[0]"))
    folder = tmp_path / "out"
    path = folder / "runs.jsonl"

    def child() -> None:
        os.setsid()
        run(words(study, folder))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    while not path.exists() or path.read_bytes().count(b"\n") < 2:
        assert process.exitcode is None
        time.sleep(0.01)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    before = path.read_text()
    with open(path, "a") as file:
        file.write(before.splitlines()[1][:40])
    capsys.readouterr()
    assert run(words(study, folder)) == 0
    output = capsys.readouterr().out
    done = 8 - int(output.partition("running ")[2].split()[0])
    assert done >= 1 and f"8 trainings, {done} of them finished already" in output and "not whole" in output
    text = path.read_text()
    assert text.startswith(before) and text.endswith("\n")
    of_all = lines.read_lines(path)
    assert {line.key for line in of_all} == {wanted.line.key for t in planned(study) for wanted in t.wanted}
    assert len(of_all) == text.count("\n") - 1 == 12 + 2 * 3  # and teacher and student before of each situation
    assert not [*folder.glob("runs/*")] and not [*folder.glob("logs/*")]
    by_cell = {(line.candidate, line.situation, line.seed): line for line in of_all}
    narrow, wide = by_cell["gkd", "first", 0], by_cell["gkd", "wide", 0]
    assert narrow.training == wide.training and narrow.kl_quantiles == wide.kl_quantiles
    assert (narrow.budget, wide.budget) == (2.0, 4.0) and narrow.figures["within"] <= wide.figures["within"]
    assert narrow.figures["examples"] == 3 and sum(part["share"] for part in narrow.lengths.values()) == 1.0
    head = json.loads(text.splitlines()[0])
    assert head["study"] == "small" and len(head["sha256"]) == 64 and "torch" in head["machine"]
    assert run(words(study, folder)) == 0
    assert "8 trainings, 8 of them finished already" in capsys.readouterr().out and path.read_text() == text


def test_lines_of_other_settings_are_not_taken(recipe, tmp_path, capsys):
    """Those of the same settings are, whatever the file says beside them."""
    methods = STUDY[STUDY.index('[[methods]]\nname = "lagrangian"') : STUDY.index("[[kinds]]")]
    study = written(tmp_path / "small.toml", recipe, (methods, ""), ("[0, 1]", "[0]"))
    assert run(words(study, tmp_path / "out")) == 0
    before = (tmp_path / "out" / "runs.jsonl").read_text()
    other = written(tmp_path / "other.toml", recipe, (methods, ""), ("[0, 1]", "[0]"), ("budget = 4", "budget = 5"))
    capsys.readouterr()
    assert run(words(other, tmp_path / "out")) == 0
    assert "3 trainings, 2 of them finished already" in capsys.readouterr().out
    after = (tmp_path / "out" / "runs.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") + 1 + 2  # its references too
    assert json.loads(after.splitlines()[-1])["budget"] == 5.0


def test_a_training_that_fails_costs_itself_and_is_run_again(recipe, tmp_path, capsys):
    """The learning rate takes the weights to infinity; the folder and the log stay."""
    rest = STUDY[STUDY.index('[[situations]]\nname = "tenfold"') : STUDY.index("[[methods]]")]
    mended = ("lagrangian:coefficient=2,steps=2", "lagrangian:learning_rate=1e38,max_grad_norm=1e38")
    study = written(tmp_path / "small.toml", recipe, (rest, ""), ("[0, 1]", "[0]"), mended)
    path = tmp_path / "out" / "runs.jsonl"
    assert run(words(study, tmp_path / "out")) == 1
    output = capsys.readouterr().out
    assert "FAILED " in output and "(lagrangian:learning_rate=1e38,max_grad_norm=1e38 in first, seed 0): exit" in output
    [bad] = [line for line in lines.read_lines(path) if line.failure]
    assert bad.failure.startswith("exit code ") and not bad.figures
    assert (tmp_path / "out" / "logs" / f"{bad.training}.log").exists()
    assert [folder.name for folder in tmp_path.glob("out/runs/*")] in ([], [bad.training])
    assert run(words(study, tmp_path / "out")) == 1
    assert "4 trainings, 3 of them finished already" in capsys.readouterr().out
    assert len(lines.read_lines(path)) == 4 + 2


def test_why_a_training_failed_is_readable(tmp_path):
    """The last line of its log may be anything: it becomes one short line without control codes."""
    log = tmp_path / "log"
    log.write_text("first\n\x1b[2Jlost " + "x" * 1000 + "\n\n")
    why = launching._failure(TrainConfig(output_dir=str(tmp_path), name="r"), 3, log)
    assert why.startswith("exit code 3: ?[2Jlost xxx") and why.isprintable() and len(why) < 400

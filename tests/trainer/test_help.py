"""What `--help` shows of each command, and what a misspelt word is answered."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch

from cmdp_fast import reference
from cmdp_fast.bench.command import parser
from cmdp_fast.cli import main, overview
from cmdp_fast.trainer.cache_teacher import CacheConfig
from cmdp_fast.trainer.command_line.options import first_sentence, read_sections, sections_of
from cmdp_fast.trainer.command_line.screens import Screen
from cmdp_fast.trainer.comparison.plan import CompareConfig
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.run_report.settings import ReportConfig
from cmdp_fast.trainer.serve_teacher import ServeSettings
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.settings.recipe import METHOD_FILES, RECIPES, read_recipe
from cmdp_fast.trainer.settings.units import Unit

KINDS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "cache-teacher": CacheConfig,
    "compare": CompareConfig,
    "report": ReportConfig,
    "teacher": ServeSettings,
}
LONGEST = 70  # lines of a first screen; 60 of `train`


def screen(command: str, width: int = 80) -> Screen:
    kind = KINDS[command]
    default = kind(**vars(read_recipe("quickstart"))) if issubclass(kind, TrainConfig) else None
    return Screen(f"cmdp-fast {command}", "What it does.", kind, default, width)


@pytest.mark.parametrize("command", KINDS)
def test_every_number_has_its_unit(command: str) -> None:
    """Or says that it has none (units.py), and help names it beside the default."""
    shown = screen(command)
    hints = get_type_hints(shown.kind, include_extras=True)
    read = {option.name for section in read_sections(shown.kind, None, command) for option in section.options}
    for field in (field for field in dataclasses.fields(shown.kind) if field.name in read):
        extras = getattr(hints[field.name], "__metadata__", ())
        unit = next((extra for extra in extras if isinstance(extra, Unit)), None)
        value = field.default if shown.default is None else getattr(shown.default, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(type(number) in (int, float) for number in numbers):
            assert unit is not None, f"{field.name} is a number without a unit"
        if unit is not None and unit.many and value:
            text = " ".join(" ".join(shown.lines(f"--{field.name}")).split())
            assert text.endswith((f" {unit.one or unit.many})", f" {unit.many})")), text


def sections(command: str) -> list:
    shown = screen(command)
    return read_sections(shown.kind, shown.default, command)


@pytest.mark.parametrize("command", KINDS)
def test_help_fits_the_terminal(command: str) -> None:
    """Words are whole: only one that is longer than its line sticks out."""
    for width in (40, 80):
        for topic in ("", "all", *(section.name for section in sections(command))):
            for line in screen(command, width).lines(topic):
                assert len(line) <= width or (width == 40 and len(line.split()) == 1), line
    assert len(screen(command).lines()) <= (60 if command == "train" else LONGEST)
    narrow, wide = (" ".join(" ".join(screen(command, width).lines("all")).split()) for width in (40, 100))
    assert narrow == wide


def test_the_other_screens_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (40, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        for text in (overview(width), parser().format_help()):
            assert all(len(line) <= width or len(line.split()) == 1 for line in text.splitlines())


def test_options_stand_in_their_sections() -> None:
    names = [section.name for section in sections("train")]
    assert names[:3] == ["run", "model", "task"] and "budget" in names and len(names) == len(set(names))
    every = [option.name for section in sections_of(EvaluateConfig, None, "evaluate") for option in section.options]
    assert sorted(every) == sorted(field.name for field in dataclasses.fields(EvaluateConfig))
    own = sections("evaluate")[0]
    assert own.name == "evaluate" and {o.name for o in own.options} == {
        *("temperature", "held_out", "resume", "seeds", "json")
    }
    said = "\n".join(screen("train").lines("budget"))
    assert "--budget-price REWARD" in said and "--learning-rate" not in said
    assert "\n".join(screen("train").lines("--no-fast")).startswith("  --fast, --no-fast")
    short = "\n".join(screen("train").lines())
    assert all(f"\n  {name} " in short for name in names) and "--gae-lambda" not in short
    said = " ".join(" ".join(screen("evaluate").lines("all")).split())
    assert "refused here: sections step, optimizer; --name, " in said and "--seed N " not in said


def test_names_of_the_package_are_all_named() -> None:
    options = {option.name: option.says for section in sections("train") for option in section.options}
    for name, folder in (("recipe", RECIPES), ("method", METHOD_FILES)):
        assert all(re.search(rf"\b{re.escape(path.stem)}\b", options[name]) for path in folder.glob("*.toml"))


def test_a_sentence_ends_where_it_ends() -> None:
    assert first_sentence("Take `a.b`, 0.95 of it. Then more.") == "Take `a.b`, 0.95 of it"
    assert first_sentence("See `x`. More.") == "See `x`" and first_sentence("Only one.") == "Only one"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train", "gkd, minillm, sft, kd (default: empty = the recipe's own)"),
        ("train", "(default: empty = the recipe's name, numbered if taken)"),
        ("train", "Train an adapter of this rank, and not all weights (default: 0 = train all weights)"),
        ("train", "Arithmetic of the models (default: no = float32)"),
        ("compare", "(default: empty = 0, 1 and 2, or those of the study)"),
        ("compare", "(default: 0 runs = one per processor, or one where there is a GPU)"),
    ],
)
def test_defaults_that_are_nothing_are_explained(command: str, said: str) -> None:
    text = " ".join(" ".join(screen(command).lines()).split())
    assert said in text


def test_the_first_screens_leave_no_number_in_the_dark() -> None:
    assert "0: no such schedule" in " ".join(" ".join(screen("train").lines("--budget-start")).split())
    assert "reward units, not per nat" in " ".join(" ".join(screen("train").lines("--coefficient")).split())


def test_formulas_of_costs_are_those_that_are_computed() -> None:
    p, q = torch.tensor([0.3, 0.6, 0.9]).double(), torch.tensor([0.5, 0.6, 0.01]).double()
    nothing = torch.zeros_like(p)
    stats = reference.TokenStats(*(nothing,) * len(reference.TokenStats._fields))
    stats = stats._replace(logprob=p.log(), teacher_logprob=q.log())
    text = " ".join(" ".join(screen("train").lines("--cost")).split())
    formulas = dict(re.findall(r"(k1|k3|nll) is `([^`]+)`", text))
    assert set(formulas) == {"k1", "k3", "nll"}
    for cost, formula in formulas.items():
        value = eval(formula, {"log": torch.log, "p": p, "q": q})
        torch.testing.assert_close(value, reference.token_cost(stats, cost), msg=cost)


WRONG = {
    "option": (
        ["train", "--learning-rat", "1"],
        "--learning-rat: there is no such option, did you mean --learning-rat",
    ),
    "its value in one word": (["train", "--buget=3"], "--buget=3: there is no such option, did you mean --budget?"),
    "initials": (["train", "--mnt", "1"], "did you mean --max-new-tokens?"),
    "a setting that is not read": (["evaluate", "--help", "seed"], "`cmdp-fast train --help seed` tells of, and none"),
    "one hyphen": (["train", "-steps", "1"], "-steps: there is no such option, did you mean --steps?"),
    "like nothing": (["train", "--zzz"], "--zzz: there is no such option (cmdp-fast train --help-all lists all)"),
    "a word too many": (["train", "--steps", "3", "4"], "4: expected an option, which begins with --"),
    "no value": (["train", "--steps"], "--steps: expected a whole number (steps)"),
    "no recipe": (["train", "--recipe"], "--recipe: expected one argument"),
    "no number": (["train", "--budget", "two"], "--budget two: expected a number (nats)"),
    "no integer": (["compare", "--seeds", "1", "x"], "--seeds 1 x: expected whole numbers"),
    "not JSON": (["train", "--task-args", "{"], "--task-args {: expected a JSON object"),
    "choice": (
        ["train", "--cost", "revers_kl"],
        "expected one of reverse_kl, forward_kl, jsd, k1, k3, nll, did you mean",
    ),
    "one of several": (
        ["train", "--trackers", "wandbb"],
        "expected some of tensorboard, wandb, trackio, did you mean wa",
    ),
    "recipe": (
        ["train", "--recipe", "quickstrat"],
        "--recipe quickstrat: neither a TOML file nor one of the package's",
    ),
    "method": (["train", "--method", "kl-los"], "did you mean kl_loss?"),
    "methods": (["compare", "--methods", "cmpd"], "--methods cmpd: neither a TOML file nor"),
    "setting of a method": (
        ["compare", "--methods", "cmdp:budgt=3"],
        "there is no setting named 'budgt', did you mean bu",
    ),
    "study": (["compare", "--study", "transfr"], "did you mean transfer?"),
    "command": (["trian"], "unknown command 'trian', did you mean train?"),
    "operation": (["bench", "token_stas"], "did you mean token_stats?"),
    "option of bench": (["bench", "--reapeat", "3"], "--reapeat: there is no such option, did you mean --repeat?"),
    "info": (["info", "nonsense"], "info takes no arguments, given: nonsense"),
    "doctor": (["doctor", "--fix"], "doctor takes no arguments, given: --fix"),
    "help of a training's section": (["compare", "--help", "budget"], "`cmdp-fast train --help budget` tells of"),
    "help of a training's option": (["teacher", "--help", "--lora_rank"], "`cmdp-fast train --help lora-rank` tells"),
    "help": (["train", "--help", "optimzer"], "--help optimzer: neither a section (run, "),
    "dataset of a recipe with a task": (
        ["train", "--dataset", "m.jsonl"],
        "--recipe pair --student MODEL --teacher MODEL",
    ),
    "of one with other models": (["train", "--recipe", "smollm2", "--dataset", "m"], "(writing): add --task= to leave"),
    "task of a recipe with a dataset": (
        ["train", "--recipe", "qwen2.5-math", "--task", "a"],
        "add --dataset= to leave",
    ),
    "both": (["train", "--task", "a", "--dataset", "b"], "--task a and --dataset b: give exactly one of"),
    "neither": (
        ["train", "--recipe", "pair", "--student", "a", "--teacher", "b"],
        "give exactly one of --task and --data",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = WRONG[case]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("cmdp-fast: error: ") and said.err.count("\n") == 1 and not said.out
    assert expected in said.err


def test_a_dataset_in_place_of_a_task() -> None:
    from cmdp_fast.trainer.parse import parse

    config = parse(["--recipe", "smollm2", "--task=", "--dataset", "mine.jsonl"])
    assert (config.task, config.dataset) == ("", "mine.jsonl")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    import cmdp_fast

    for words in (["train", "--help"], ["compare", "-h"], ["report", "--help-all"], ["bench", "--help"]):
        with pytest.raises(SystemExit) as ending:
            main(words)
        assert ending.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: cmdp-fast {words[0]}")
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "pair", "--help", "budget"])
    assert "(default: 20 nats)" in capsys.readouterr().out
    for words, whose in (
        ([], "the recipe quickstart."),
        (["--recipe=pair", "--method=sft"], "the recipe pair with the method sft."),
    ):
        with pytest.raises(SystemExit):
            main(["train", *words, "--help"])
        assert f"Defaults are those of {whose}" in " ".join(capsys.readouterr().out.split())
    assert main(["info", "--help"]) == 0 and "usage: cmdp-fast info" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"cmdp-fast {cmdp_fast.__version__}\n"


HELP = """
import runpy, sys
for words in (["train", "--help"], ["compare", "--help-all"], ["evaluate", "--help"], ["report", "--help"], ["--help"]):
    sys.argv = ["cmdp-fast", *words]
    try:
        runpy.run_module("cmdp_fast", run_name="__main__")
    except SystemExit as ending:
        assert not ending.code, words
large = {"transformers", "datasets", "matplotlib", "accelerate", "pandas", "tensorboard"} & {*sys.modules}
assert not large, large
"""


def test_help_imports_nothing_large() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: cmdp-fast ") == 5

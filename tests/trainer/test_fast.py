"""The quick form of a recipe, `--fast`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.comparison.plan import folder_of, parse_compare, plan, spec_of
from cmdp_fast.trainer.parse import parse
from cmdp_fast.trainer.settings.recipe import read_recipe

BASE = 'student = "a"\nteacher = "b"\ntask = "chain_sum"\nsteps = 60\neval_prompts = 64\nmethod = "cmdp"\n'


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(BASE + "[fast]\nsteps = 12\nlearning_rate = 1\npenalty = 3\n")
    return str(path)


def test_its_table_goes_over_the_recipe_and_under_all_else(recipe, tmp_path):
    plain, quick = parse(["--recipe", recipe]), parse(["--recipe", recipe, "--fast"])
    assert (plain.fast, plain.steps, plain.eval_prompts) == (False, 60, 64)
    assert (quick.fast, quick.steps, quick.eval_prompts, quick.learning_rate) == (True, 12, 64, 1.0)
    assert quick.penalty == 1.0  # the method's
    assert parse(["--recipe", recipe, "--fast", "--steps", "3"]).steps == 3
    last = parse(["--recipe", recipe, "--fast", "--no-fast"])
    assert (last.fast, last.steps) == (False, 60)


def test_a_recipe_without_one_has_no_quick_form(capsys):
    assert main(["train", "--recipe", "tempting", "--fast", "--dry-run"]) == 2
    assert "--fast: the recipe tempting has no [fast] table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fast = true", "fast must be a table of settings, not True"),
        ("[fast]", "fast must be a table of settings, not {}"),
        ("[fast]\nstep = 3", r"\[fast\]: there is no setting named 'step'"),
        ('[fast]\nsteps = "3"', r"\[fast\]: steps must be int"),
        ('[fast]\nmethod = "pid"', "method is for the command line"),
        ("[fast]\nfast = true", "fast is for the command line"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(text, said, tmp_path):
    """Whether it is asked for or not."""
    path = tmp_path / "mine.toml"
    path.write_text(BASE + text)
    with pytest.raises(InputError, match=said):
        read_recipe(str(path))


def test_a_method_has_none(tmp_path):
    (tmp_path / "m.toml").write_text("fast = true")
    with pytest.raises(InputError, match="fast is for the command line, a method cannot set it"):
        read_recipe("quickstart", str(tmp_path / "m.toml"))


def test_it_is_for_the_command_line_to_choose():
    with pytest.raises(InputError, match="fast is for the comparison to choose"):
        spec_of("cmdp:fast=true", "--methods cmdp")


def test_a_comparison_may_be_of_the_quick_form(recipe):
    config = parse_compare(["--recipe", recipe, "--fast", "--methods", "cmdp", "grpo:steps=3", "--seeds", "0"])
    quick, changed = (run.config for run in plan(config))
    assert (quick.fast, quick.steps, quick.learning_rate) == (True, 12, 1.0) and changed.steps == 3
    name = Path(recipe).stem
    assert [folder_of(parse_compare(["--recipe", recipe, *fast])) for fast in ([], ["--fast"])] == [
        Path("comparisons") / name,
        Path("comparisons") / f"{name}-fast",  # a run of the other form would be refused there
    ]


def test_a_comparison_of_a_recipe_without_a_quick_form_is_refused(capsys):
    assert main(["compare", "--fast", "--methods", "cmdp"]) == 2
    assert "--fast: the recipe tempting has no [fast] table" in capsys.readouterr().err
    assert main(["compare", "--fast", "--study", "transfer"]) == 2
    assert "--fast would have no effect: --study transfer decides about it" in capsys.readouterr().err

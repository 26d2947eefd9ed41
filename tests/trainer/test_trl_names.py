"""What TRL's options are called here, in an error and in the guide."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from cmdp_fast.cli import main
from cmdp_fast.nearest import nearest
from cmdp_fast.trainer.command_line.trl_names import HERE, flags_in, option_here
from cmdp_fast.trainer.settings.config import TrainConfig

PAGE = Path(__file__).parents[2] / "cmdp_fast" / "guide" / "from_trl.md"
FLAGS = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig)]


def page() -> list[tuple[str, list[str]]]:
    """Each setting that a table of the page begins a line with, and the options that begin one of its other cells."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("| `") else [""]
        if name := re.match(r"`([a-z_0-9]+)(?:=[^`]*)?`", cells[0]):
            found.append((name[1], [flag for cell in cells[1:] if cell.startswith("`--") for flag in flags_in(cell)]))
    return found


def test_the_guide_says_the_same() -> None:
    said = [(name, flags) for name, flags in page() if flags]
    assert len(said) > 30
    for name, flags in said:
        own = f"--{name.replace('_', '-')}"
        if own in FLAGS:
            assert own in flags and name not in HERE
        elif name != "max_new_tokens":  # which is ours too
            assert name in HERE, f"{name} is on the page and not in the table"
    for name, here in HERE.items():
        of_page = {flag for other, flags in said if other == name for flag in flags}
        assert not of_page or of_page <= set(flags_in(here)), f"{name}: {of_page} on the page, {here} in the table"


def test_what_the_table_names_is_there() -> None:
    for name, here in HERE.items():
        assert (
            here.startswith("--") and set(flags_in(here)) <= set(FLAGS) and f"--{name.replace('_', '-')}" not in FLAGS
        )
    assert option_here("save-steps", ["--steps"]) == ""  # a command without that option


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--max-completion-length=5", "what TRL calls so is here --max-new-tokens"),
        ("--num_iterations=1", "is here --epochs"),
        ("--save-steps=1", "is here --checkpoint-every"),
        ("--beta=0.1", "--coefficient, or --jsd-beta"),
        ("--epsilon=0.2", "is here --clip-low and --clip-high"),
        ("--bf16", "is here --mixed-precision bf16"),
        ("--adam-beta2=0.9", "there is no such option (cmdp-fast train --help-all lists all)"),
        ("--steps-per-gen=0.9", "there is no such option (cmdp-fast train --help-all lists all)"),
    ],
)
def test_an_option_of_trl_is_answered_with_ours(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", given]) == 2
    assert said in capsys.readouterr().err


def test_names_that_are_little_alike_are_not_suggested() -> None:
    assert nearest("adam-beta2", ["jsd-beta"]) == [] and nearest("learning-rat", ["learning-rate"]) == ["learning-rate"]


@pytest.mark.parametrize(
    ("given", "known", "meant"),
    [
        ("max", ["eval-every", "max-new-tokens", "max-rows"], ["max-new-tokens"]),  # the first that begins so
        ("m", ["max-rows"], []),  # a letter begins too many
        ("Eval_prompt", ["eval-prompts-of-others", "eval-prompts"], ["eval-prompts"]),  # spelt alike, before a longer
        ("lr", ["lrs", "learning-rate", "lora_rank"], ["learning-rate", "lora_rank"]),  # initials before all
        ("x", [], []),
    ],
)
def test_what_was_meant(given: str, known: list[str], meant: list[str]) -> None:
    assert nearest(given, known) == meant

"""What TRL's options are called here, in an error and in the guide."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from cmdp_fast.cli import main
from cmdp_fast.nearest import nearest
from cmdp_fast.trainer.command_line.trl_names import HERE, OTHERS, flags_in, option_here
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
    assert option_here("save-steps", ["--steps"]).text == ""  # a command without that option


def test_names_of_others_lead_to_options_of_a_command() -> None:
    for name, texts in OTHERS.items():
        assert f"--{name.replace('_', '-')}" not in FLAGS and name not in HERE
        assert set(flags_in(texts[0])) <= set(FLAGS), name
        assert all(text.startswith("--") for text in texts)


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
        ("--eval-step=1", "what TRL calls so is here --eval-every"),
        ("--reward-func=a", "what TRL calls so is here --rewards"),
        ("--lmbda=1", "what TRL calls so is here --method gkd"),
        ("--lambda=1", "did you mean --coefficient, the multiplier of lagrangian"),
        ("--kl-penalty=1", "did you mean --coefficient with --method kl_reward or kl_loss"),
        ("--kl=1", "did you mean --budget, or --coefficient"),
        ("--max-length=1", "did you mean --max-new-tokens"),
        ("--lr=1", "did you mean --learning-rate?"),
        ("--batch-size=1", "did you mean --prompts-per-step, --minibatch-size or --micro-batch-size?"),
    ],
)
def test_an_option_of_trl_is_answered_with_ours(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("evaluate --batch-size 4", "did you mean --micro-batch-size or --rollout-batch-size?"),
        ("evaluate --output x", "did you mean --json?"),
        ("evaluate --out x", "did you mean --json?"),
        ("evaluate --lr 1", "there is no such option (--learning-rate is for cmdp-fast train)"),
        ("evaluate --minibatch-siz 1", "there is no such option (--minibatch-size is for cmdp-fast train)"),
        ("evaluate --eval-step 1", "(--eval-every is for cmdp-fast train)"),
        ("evaluate --kl-coef 1", "(--coefficient is for cmdp-fast train)"),
        ("evaluate --kl 1", "did you mean --budget?"),
        ("cache-teacher --out x", "did you mean --output?"),
        ("compare --budget 3", "did you mean --methods cmdp:budget=3?"),
        ("compare --learning_rate=1e-4", "did you mean --methods cmdp:learning_rate=1e-4?"),
        ("compare --buget", "did you mean --methods cmdp:budget=...?"),
        ("compare --lr 1", "did you mean --methods cmdp:learning_rate=1?"),
        ("compare --seed 1", "did you mean --seeds?"),
        ("compare --method grpo", "did you mean --methods?"),
        ("teacher --batch-size 1", "did you mean --batch-tokens?"),
        ("report --steps 1", "(--steps is for cmdp-fast train)"),
    ],
)
def test_what_a_command_does_not_read_is_not_suggested(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
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

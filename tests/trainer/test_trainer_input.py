"""Bad input, and the configuration."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pair import PROBLEMS, arguments, learner_of, settings, tiny_model

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.masking import told
from cmdp_fast.trainer.command_line.options import sections_of
from cmdp_fast.trainer.parse import parse
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.settings.constraint import warning_of_scale
from cmdp_fast.trainer.settings.recipe import METHOD_FILES, RECIPES, read_recipe

BAD_INPUT = {
    "budget 0": (dict(budget=0), "--budget must be a positive number, not 0.0"),
    "budget below 0": (dict(budget=-1), "--budget must be a positive number"),
    "budget not a number": (dict(budget="nan"), "--budget must be a finite number, not nan"),
    "a penalty that is endless": (dict(penalty="inf"), "--penalty must be a finite number, not inf"),
    "student path": (dict(student="./no/such/model"), "--student ./no/such/model"),
    "teacher path": (dict(teacher="./no/such/model"), "--teacher ./no/such/model"),
    "a folder without a model": (dict(student="{tmp}"), "no causal language model"),
    "built-in model": (dict(student="builtin:poet"), "there is no model builtin:poet"),
    "built-in model for other problems": (dict(student="builtin:arithmetic-student"), "that are sums"),
    "task": (dict(task="basic_aritmetic", dataset=""), "did you mean basic_arithmetic"),
    "task argument": (
        dict(task="chain_sum", dataset="", task_args='{"terms": 3}'),
        "chain_sum has no terms, did you mean min_terms?",
    ),
    "type of a task argument": (
        dict(task="chain_sum", dataset="", task_args='{"min_terms": "x"}'),
        '--task-args {"min_terms": "x"}: min_terms of chain_sum is \'x\', expected one like its default 2',
    ),
    "value of a task argument": (
        dict(task="chain_sum", dataset="", task_args='{"min_terms": -1}'),
        '--task-args {"min_terms": -1}: min_terms must be',
    ),
    "a task argument that JSON has no tuple for": (
        dict(task="countdown", dataset="", task_args='{"operators": ["+", "-"], "max_numbers": 3}'),
        '"max_numbers": 3}: max_numbers must be >= min_numbers',
    ),
    "a task argument beside one that JSON has no tuple for": (
        dict(task="countdown", dataset="", task_args='{"operators": ["+", "-"], "max_numbers": "x"}'),
        "max_numbers of countdown is 'x'",
    ),
    "a task argument whose own words are another's": (
        dict(task="chain_sum", dataset="", task_args='{"min_terms": 2.0, "max_terms": 1}'),
        '"max_terms": 1}: max_terms must be',
    ),
    "task arguments": (
        dict(task="chain_sum", dataset="", task_args="[1]"),
        "--task-args must be a JSON object, not [1]",
    ),
    "template arguments": (dict(chat_template_kwargs="3"), "--chat-template-kwargs must be a JSON object, not 3"),
    "task and dataset": (dict(task="chain_sum"), "exactly one of --task and --dataset"),
    "dataset": (dict(dataset="./no/such.jsonl"), "--dataset ./no/such.jsonl"),
    "prompt column": (dict(prompt_column="question"), "there is no column 'question'"),
    "answer column": (dict(answer_column="solution"), "there is no column 'solution' for the answer"),
    "no answer column": (dict(dataset="{bare}"), "--rewards exact_answer needs the column 'answer'"),
    "template": (dict(prompt_template="{question}"), "--prompt-template"),
    "reward": (dict(rewards="no_such_reward"), "--rewards no_such_reward"),
    "reward function": (dict(rewards="math:no_such_function"), "math has no function 'no_such_function'"),
    "answer pattern": (dict(answer_pattern="("), "--answer-pattern"),
    "tokenizers": (dict(teacher="{other_tokenizer}"), "must share a tokenizer"),
    "too long": (dict(max_new_tokens=62), "do not fit the 64 positions"),
    "existing folder": (dict(name="taken"), "choose another --name"),
    "recipe": (dict(recipe="slowstart"), "--recipe slowstart"),
    "one completion a prompt": (dict(num_generations=1), "--num-generations"),
    "seed below 0": (dict(seed=-1), "--seed must be in [0, 2147483648), not -1"),
    "steps beyond all numbers": (dict(steps="9" * 23), "--steps must be at most 2147483647, not 999"),
    "prompts beyond 32 bits": (dict(prompts_per_step=2**31), "--prompts-per-step must be at most 2147483647, not 21"),
    "seed beyond all numbers": (dict(seed="9" * 400), "--seed must be in [0, 2147483648), not 999"),
    "long name": (dict(name="a" * 300), "--name is the name of a folder, of up to 200 bytes"),
    "zero in a name": (dict(name="a\0"), "--name is the name of a folder"),
    "a file as a folder": (dict(output_dir="{bare}"), "is a file, expected a folder"),
    "worst case of a divergence": (dict(kind="worst_case"), "--cost nll"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changes, expected = BAD_INPUT[case]
    runs = tmp_path / "runs"
    (runs / "taken").mkdir(parents=True)
    other = tiny_model(tmp_path / "other", seed=1, alphabet="=+9876543210;A?")
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in PROBLEMS))
    changes = {
        name: value.format(tmp=tmp_path, other_tokenizer=other, bare=bare)
        if name in ("student", "teacher", "dataset", "output_dir")
        else value
        for name, value in changes.items()
    }
    capsys.readouterr()  # what saving the models above printed
    assert main(arguments(pair, runs, **changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("cmdp-fast: error: ") and error.count("\n") == 1
    assert expected in error
    assert [path.name for path in runs.iterdir()] == ["taken"] and not list((runs / "taken").iterdir())
    assert not (tmp_path / "cache" / "cmdp_fast").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--fast=true"], "--fast true: expected nothing: it is on where it is named"),
        (["--no-fast=1"], "--fast 1: expected nothing: it is on where it is named"),
        (["--", "--steps", "3"], "--steps: it stands behind a --, which ends the options: leave the -- out"),
        (["--", "--stops"], "--stops: there is no such option"),
    ],
)
def test_words_in_the_wrong_place(words, said, capsys):
    assert main(["train", *words]) == 2
    assert capsys.readouterr().err.startswith(f"cmdp-fast: error: {said}")


SECRET = "hunter2SECRET"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--teacher", f"served:http://user:{SECRET}@127.0.0.1:9"],
        ["train", "--teacher", f"served:http://127.0.0.1:9/?key={SECRET}"],
        ["train", "--rollout", "vllm", "--rollout-url", f"http://127.0.0.1:9/?token={SECRET}"],
        ["train", "--dataset", f"https://user:{SECRET}@127.0.0.1:9/x.jsonl?sig={SECRET}", "--task="],
        ["train", f"--api-key={SECRET}"],
        ["train", "--task-args", f'{{"api_key": "{SECRET}"}}', "--dry-run"],
        ["bench", f"--token={SECRET}"],
        ["doctor", "--token", SECRET],
        [f"--token={SECRET}"],
    ],
)
def test_errors_show_no_secrets(words, capsys, monkeypatch):
    """Logs of CI keep them."""
    monkeypatch.setenv("CMDP_FAST_TRACEBACK", "1")  # of which the same is true
    assert main(words) == 2
    said = capsys.readouterr()
    assert SECRET not in said.err + said.out and "cmdp-fast: error: " in said.err


def test_errors_stay_legible():
    options = [option for section in sections_of(TrainConfig, None, "train") for option in section.options]
    assert len(options) > 100
    for option in options:
        for value in ("3", "abc", '{"a": 1}', "https://host:80/x", "runs/a"):
            for text in (
                f"cmdp-fast: error: {option.flag} {value}: expected {option.expected}",
                f"{option.flag} must be a positive number, not {value}",
                f"{option.flag}={value}: there is no such option, did you mean {option.flag}?",
            ):
                assert told(text) == text


def test_settings_that_are_empty_lists_by_default(tmp_path):
    """The type of their items stands in their field alone."""
    recipe = tmp_path / "mine.toml"
    needed = 'student = "a"\nteacher = "b"\ntask = "chain_sum"\n'
    recipe.write_text(needed + 'stop_strings = ["###"]\nstop_tokens = ["<|im_end|>"]')
    config = read_recipe(str(recipe))
    assert config.stop_strings == ("###",) and config.stop_tokens == ("<|im_end|>",)
    again = parse(["--recipe", str(recipe), "--stop-strings", "a", "b"])
    assert again.stop_strings == ("a", "b")
    recipe.write_text("stop_strings = [3]")
    with pytest.raises(InputError, match=r"stop_strings must be a list of str, not \[3\]"):
        read_recipe(str(recipe))


def test_commands(capsys):
    assert main(["--help"]) == 0
    assert "train" in (text := capsys.readouterr().out) and "info" in text
    assert main(["dance"]) == 2
    assert "unknown command 'dance'" in capsys.readouterr().err


def test_without_the_extra():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('datasets', 'transformers', 'tyro', 'rich')));"
    code = blocked + "from cmdp_fast.cli import main; main(['info']); sys.exit(main(['train']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "[train]'" in done.stderr
    assert "torch" in done.stdout  # info needs nothing of the extra


def test_command_line_over_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('student = "a"\nteacher = "b"\ntask = "chain_sum"\nbudget = 5\nsteps = 7\nrewards = ["x", "y"]')
    config = parse(["--recipe", str(recipe), "--steps", "9"])
    assert (config.steps, config.budget, config.rewards) == (9, 5.0, ("x", "y"))
    assert config.temperature == TrainConfig().temperature
    assert config.run_name == "mine"
    assert parse(["--recipe", str(recipe), "--task-args", '{"max_terms": 3}']).task_args == {"max_terms": 3}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_recipes_of_the_package(recipe):
    first = (RECIPES / f"{recipe}.toml").read_text().splitlines()[0]
    assert first.startswith("# cmdp-fast train")  # how it is launched
    models = ("--student=a", "--teacher=b", "--dataset=c") if recipe == "pair" else ()
    assert parse([f"--recipe={recipe}", *models]).recipe == recipe


@pytest.mark.parametrize("method", sorted(path.stem for path in METHOD_FILES.glob("*.toml")))
def test_methods_of_the_package(method, pair, tmp_path):
    """Each is described, goes over the recipe and under the command line, and trains."""
    first = (METHOD_FILES / f"{method}.toml").read_text().splitlines()[0]
    assert first.startswith(f"# cmdp-fast train --method {method}")
    changes = {"method": method, "minibatch_size": 5, "prefix_budget": 1.0}
    config = parse(arguments(pair, tmp_path, **changes)[1:])
    assert (config.method, config.minibatch_size, config.budget) == (method, 5, 2.0)
    assert config.algorithm == method or (config.kind == method) != (method in ("grpo", "kl_reward"))
    assert main(arguments(pair, tmp_path, **changes)) == 0


def test_other_task_of_reasoning_gym(pair, tmp_path, isolation):
    """A task of words, judged by itself, with the pair's recipe."""
    student = tiny_model(tmp_path / "s", seed=1, alphabet="".join(map(chr, range(33, 127))), positions=512)
    teacher = tiny_model(tmp_path / "t", seed=2, alphabet="".join(map(chr, range(33, 127))), positions=512)
    command = (
        f"train --recipe=pair --student={student} --teacher={teacher} --task=spell_backward --task-size=30 --steps=1"
    )
    command += f" --rewards=reasoning_gym --max-new-tokens=4 --prompts-per-step=2 --output-dir={tmp_path / 'runs'}"
    assert main(command.split()) == 0
    assert (tmp_path / "runs" / "pair" / "summary.json").exists()


@pytest.mark.parametrize(
    "line, expected",
    [
        ("stepps = 1", "no setting named 'stepps'"),
        ('steps = "many"', "steps must be int"),
        ("budget = true", "budget must be float"),
        ("steps =", "not valid TOML"),
        ('baseline = "none"', "--baseline must be one of rloo"),
        ('rewards = "exact_answer"', "rewards must be a list, not 'exact_answer'"),
        ('resume = "runs/a"', "resume is for the command line, a recipe cannot set it"),
    ],
)
def test_recipe_errors(line, expected, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'student = "a"\nteacher = "b"\ntask = "chain_sum"\n{line}')
    with pytest.raises(InputError, match=re.escape(expected)):
        parse(["--recipe", str(recipe)])


def test_every_field_is_documented(capsys):
    with pytest.raises(SystemExit):
        parse(["--help-all"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    source = "".join(Path(sys.modules[part.__module__].__file__).read_text() for part in TrainConfig.__mro__[:-1])
    for field in dataclasses.fields(TrainConfig):
        assert re.search(rf'^    {field.name}: .*\n    """', source, re.M), field.name


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"baseline": "grpo"}, True),
        ({"baseline": "grpo", "kind": "hinge", "discrepancy_weight": 0.0}, True),  # by its price
        ({"baseline": "grpo", "kind": "hinge", "discrepancy_weight": 0.0, "budget_price": 0.0}, False),
        ({"baseline": "grpo", "kind": "pid"}, True),
        ({"baseline": "grpo", "kind": "lagrangian"}, False),  # --method grpo: a multiplier of 0
        ({"baseline": "grpo", "kind": "lagrangian", "coefficient": 0.1}, True),
        ({"baseline": "grpo", "cost": "k1"}, False),
        ({"baseline": "grpo", "algorithm": "gkd"}, False),
        ({"baseline": "rloo"}, False),
    ],
)
def test_a_divisor_that_the_direct_term_shares_is_told(changes, expected):
    warning = warning_of_scale(TrainConfig(**changes))
    assert bool(warning) == expected
    assert not warning or "--baseline rloo keeps what penalty and discrepancy_weight mean" in warning


def test_the_divisor_forgets_the_discrepancy_weight(pair):
    """The reason for the warning: with equal task rewards and no penalty the weight changes nothing at all."""
    targets = []
    for weight in (1.0, 100.0):
        config = settings(pair, kind="hinge", baseline="grpo", budget=0.5, discrepancy_weight=weight)
        learner, rows, prompts = learner_of(config, nothing=lambda completions, **_: [0.0] * len(completions))
        rows, prompts = ([item for item in items for _ in range(4)] for items in (rows, prompts))
        constraint = learner.constraint()
        targets.append(learner.method.targets(learner.method.collect(rows, prompts, constraint), constraint))
    for name in ("advantage", "direct"):
        torch.testing.assert_close(targets[1][name], targets[0][name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [{"pad_token_id": 99}, {"hidden_size": "a"}, {"num_attention_heads": 0}])
def test_a_model_s_damaged_configuration_is_one_line(change, pair, tmp_path):
    folder = tiny_model(tmp_path, 0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=f"--student {folder}: no causal language model in this folder: .") as raised:
        learner_of(settings({**pair, "student": folder}))
    assert len(str(raised.value).splitlines()) == 1

"""The trainer, on a pair of random models small enough for a step to take milliseconds."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tyro")

from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cmdp_fast.cli import main
from cmdp_fast.trainer import builtin, data, rewards
from cmdp_fast.trainer.checkpoint import as_json, save_student
from cmdp_fast.trainer.config import RECIPES, TrainConfig, parse, read_recipe
from cmdp_fast.trainer.errors import InputError
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.models import load_pair
from cmdp_fast.trainer.ppo import PPO, at_last_token
from cmdp_fast.trainer.report import Clock, Report
from cmdp_fast.trainer.rollout import completion_mask, encode_prompts, generate
from cmdp_fast.trainer.run import make_ppo, shuffled

PROBLEMS = [{"prompt": f"{i}+{9 - i}=", "answer": "9", "note": i} for i in range(10)]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(
    folder: Path,
    seed: int,
    layers: int = 1,
    alphabet: str = "0123456789+=;A",
    family: str = "llama",
    spare: int = 0,
    positions: int = 64,
) -> str:
    """A random model with a character tokenizer; `spare` columns of its logits belong to no token."""
    tokenizer = builtin._tokenizer([alphabet])
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer) + spare,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=positions,
        initializer_range=0.3,  # far enough from uniform for the two to differ
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pair")
    problems = root / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return {
        "student": tiny_model(root / "student", seed=1),
        "teacher": tiny_model(root / "teacher", seed=2, layers=2),
        "dataset": str(problems),
    }


def settings(pair: dict[str, str], **changes) -> TrainConfig:
    base = TrainConfig(
        **pair,
        holdout_fraction=0.3,
        steps=2,
        prompts_per_step=3,
        num_generations=4,
        max_completion_length=6,
        minibatch_size=6,
        micro_batch_size=5,
        learning_rate=1e-2,
        budget=2.0,
        eval_generations=3,
        baseline="position_rloo",
    )
    config = dataclasses.replace(base, **changes)
    config.validate()
    return config


def arguments(pair: dict[str, str], output: Path, **changes) -> list[str]:
    """A command line that says the same as `settings`, over the quickstart recipe."""
    values = {
        **pair,
        "task": "",
        "prompt_template": "",
        "answer_pattern": "",
        "holdout_fraction": 0.3,
        "steps": 2,
        "prompts_per_step": 3,
        "num_generations": 4,
        "max_completion_length": 6,
        "minibatch_size": 6,
        "micro_batch_size": 5,
        "learning_rate": 1e-2,
        "eval_generations": 3,
        "eval_every": 1,
        "output_dir": output,
        "name": "r",
        **changes,
    }
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]


def ppo_of(config: TrainConfig, **reward_functions) -> tuple[PPO, list, list]:
    problems = data.load_problems(config)
    student, teacher, tokenizer = load_pair(config, problems.train, Report())
    functions = reward_functions or rewards.load_rewards(config, problems.train[0])
    AcceleratorState._reset_state(reset_partial_state=True)  # or the first precision of the process would stay
    ppo = make_ppo(config, student, teacher, tokenizer, functions)
    rows = problems.train[: config.prompts_per_step]
    return ppo, rows, encode_prompts(rows, tokenizer)


def untimed(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name != "step_time"}


# --------------------------------------------------------------------------------------------------------------
# From the command line to the files


@pytest.fixture(scope="session")
def finished_run(pair, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    assert main(arguments(pair, output)) == 0
    return output / "r"


def test_run_folder_is_complete(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {"summary.json", "metrics.jsonl", "tensorboard", "curves.png", "samples.txt", "student"}
    assert list((finished_run / "tensorboard").glob("events.out.tfevents.*"))
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (finished_run / "samples.txt").read_text()
    assert all(who in text for who in ("teacher", "student_before", "student_after"))


def test_summary_is_consistent(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["budget"] == 2.0 and summary["steps"] == 2 and summary["interrupted"] is False
    held_out = [p for p in PROBLEMS if data.is_held_out(p["prompt"], 0.3)]
    for who in ("teacher", "student_before", "student_after"):
        result = summary[who]
        assert {"accuracy", "constraint_satisfaction", "mean_cumulative_kl", "mean_length", "examples"} <= result.keys()
        assert result["examples"] == 3 * len(held_out)
        assert 0 <= result["accuracy"] <= 1 and 0 <= result["constraint_satisfaction"] <= 1
        assert 1 <= result["mean_length"] <= 6
    assert summary["teacher"]["mean_cumulative_kl"] == pytest.approx(0, abs=1e-5)
    assert summary["teacher"]["constraint_satisfaction"] == 1
    assert summary["student_before"]["mean_cumulative_kl"] > 0.1
    seconds = summary["seconds"]
    assert seconds.keys() == {"rollout", "scoring", "update", "evaluation", "kernels"}
    assert all(value > 0 for value in seconds.values())
    assert seconds["kernels"] < seconds["scoring"] + seconds["update"]
    step = seconds["rollout"] + seconds["scoring"] + seconds["update"]
    assert summary["kernel_share_of_step"] == pytest.approx(seconds["kernels"] / step, abs=1e-3)


def test_metrics_have_the_names_of_trl_and_ours(finished_run):
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        trl = "reward reward_std kl entropy loss grad_norm learning_rate num_tokens step_time clip_ratio/region_mean"
        trl += " completions/mean_length completions/clipped_ratio rewards/exact_answer/mean"
        ours = "constraint_satisfaction mean_excess cvar accuracy cumulative_kl cumulative_k1 cumulative_k3"
        assert {*trl.split(), *(f"cmdp/{name}" for name in ours.split())} <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
        # a token's mean times the tokens is a completion's mean times the completions
        assert line["kl"] * line["completions/mean_length"] == pytest.approx(line["cmdp/cumulative_kl"], rel=1e-5)


def test_saved_student_stands_alone(finished_run, pair):
    student = AutoModelForCausalLM.from_pretrained(finished_run / "student")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "student")
    before = AutoModelForCausalLM.from_pretrained(pair["student"])
    assert tokenizer("1+8=")["input_ids"] == AutoTokenizer.from_pretrained(pair["student"])("1+8=")["input_ids"]
    changed = [not torch.equal(a, b) for a, b in zip(student.parameters(), before.parameters(), strict=True)]
    assert all(changed)
    assert student.generation_config.to_dict() == before.generation_config.to_dict()
    assert student(torch.tensor([[3, 4]])).logits.isfinite().all()


def test_same_seed_same_metrics(pair, finished_run, tmp_path):
    assert main(arguments(pair, tmp_path)) == 0
    assert main(arguments(pair, tmp_path, name="other", seed=1)) == 0
    first, again, other = (
        [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (finished_run, tmp_path / "r", tmp_path / "other")
    )
    assert first == again
    assert first != other


def test_unnamed_runs_are_numbered(pair, tmp_path):
    for _ in range(2):
        assert main(arguments(pair, tmp_path, name="", steps=1)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart", "quickstart-2"]


REWARD_THAT_INTERRUPTS = """
import signal
calls = 0
def reward(completions, **columns):
    global calls
    calls += 1
    if calls == {at}:
        signal.raise_signal(signal.SIGINT)
    return [1.0] * len(completions)
"""


def test_interrupt_leaves_a_usable_folder(pair, tmp_path, capsys):
    # the reward is called for the two evaluations and then once a step: the fourth call is the second step's
    (tmp_path / "mine.py").write_text(REWARD_THAT_INTERRUPTS.format(at=4))
    assert main(arguments(pair, tmp_path / "runs", steps=50, rewards=f"{tmp_path / 'mine.py'}:reward")) == 130
    folder = tmp_path / "runs" / "r"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == 1
    assert summary["student_before"]["examples"] > 0 and summary["student_after"] is None
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert (folder / "curves.png").stat().st_size > 0 and (folder / "samples.txt").stat().st_size > 0
    AutoModelForCausalLM.from_pretrained(folder / "student")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_interrupt_before_the_first_step_leaves_nothing(pair, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD_THAT_INTERRUPTS.format(at=1))
    assert main(arguments(pair, tmp_path / "runs", rewards=f"{tmp_path / 'mine.py'}:reward")) == 130
    assert not (tmp_path / "runs").exists()


# --------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing written


BAD_INPUT = {
    "budget 0": (dict(budget=0), "--budget must be a positive number, not 0.0"),
    "budget below 0": (dict(budget=-1), "--budget must be a positive number"),
    "budget not a number": (dict(budget="nan"), "--budget must be a positive number"),
    "student path": (dict(student="./no/such/model"), "--student ./no/such/model"),
    "teacher path": (dict(teacher="./no/such/model"), "--teacher ./no/such/model"),
    "a folder without a model": (dict(student="{tmp}"), "no causal language model"),
    "built-in model": (dict(student="builtin:poet"), "there is no model builtin:poet"),
    "built-in model for other problems": (dict(student="builtin:arithmetic-student"), "that are sums"),
    "task": (dict(task="basic_aritmetic", dataset=""), "did you mean basic_arithmetic"),
    "task argument": (dict(task="chain_sum", dataset="", task_args='{"terms": 3}'), "--task chain_sum"),
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
    "too long": (dict(max_completion_length=62), "do not fit the 64 positions"),
    "existing folder": (dict(name="taken"), "choose another --name"),
    "recipe": (dict(recipe="slowstart"), "--recipe slowstart"),
    "one completion a prompt": (dict(num_generations=1), "--num-generations"),
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
        if name in ("student", "teacher", "dataset")
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


def test_option_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--no-such-option=1"])
    assert exit_.value.code == 2


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
    assert done.stderr.count("\n") == 1 and "cmdp_fast[train]" in done.stderr
    assert "torch" in done.stdout  # info needs nothing of the extra


# --------------------------------------------------------------------------------------------------------------
# Configuration


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
    models = () if recipe == "quickstart" else ("--student=a", "--teacher=b", "--dataset=c")
    assert parse([f"--recipe={recipe}", *models]).recipe == recipe


def test_other_task_of_reasoning_gym(pair, tmp_path):
    """A task of words, judged by itself, with the pair's recipe."""
    student = tiny_model(tmp_path / "s", seed=1, alphabet="".join(map(chr, range(33, 127))), positions=512)
    teacher = tiny_model(tmp_path / "t", seed=2, alphabet="".join(map(chr, range(33, 127))), positions=512)
    command = (
        f"train --recipe=pair --student={student} --teacher={teacher} --task=spell_backward --task-size=30 --steps=1"
    )
    command += (
        f" --rewards=reasoning_gym --max-completion-length=4 --prompts-per-step=2 --output-dir={tmp_path / 'runs'}"
    )
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
    ],
)
def test_recipe_errors(line, expected, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'student = "a"\nteacher = "b"\ntask = "chain_sum"\n{line}')
    with pytest.raises(InputError, match=re.escape(expected)):
        parse(["--recipe", str(recipe)])


def test_every_field_is_documented(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    source = Path(sys.modules[TrainConfig.__module__].__file__).read_text()
    for field in dataclasses.fields(TrainConfig):
        assert re.search(rf'^    {field.name}: .*\n    """', source, re.M), field.name


# --------------------------------------------------------------------------------------------------------------
# Problems and rewards


def test_held_out_problems_are_never_trained_on():
    recipe = read_recipe("quickstart")
    problems = data.load_problems(recipe)
    train, held_out = ({row["prompt"] for row in part} for part in problems)
    assert not train & held_out and len(train) == len(problems.train) and len(held_out) == len(problems.held_out)
    assert len(held_out) * recipe.eval_generations >= 500
    # the split knows neither the order nor the seed
    again = data.load_problems(dataclasses.replace(recipe, task_args={**recipe.task_args, "seed": 5}, seed=9))
    assert not {row["prompt"] for row in again.train} & held_out


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet", "folder", "saved"])
def test_local_datasets(form, pair, tmp_path):
    import datasets

    table = datasets.Dataset.from_list(PROBLEMS)
    path = tmp_path / f"problems.{form}"
    if form == "saved":
        table.save_to_disk(path)
    elif form == "folder":
        path.mkdir()
        table.to_json(path / "train.jsonl")
    else:
        getattr(table, "to_json" if form == "jsonl" else f"to_{form}")(path)
    if form == "json":
        path.write_text(json.dumps(PROBLEMS))
    problems = data.load_problems(settings(pair, dataset=str(path)))
    assert sorted(str(row["prompt"]) for part in problems for row in part) == [p["prompt"] for p in PROBLEMS]
    assert {str(row["answer"]) for row in problems.train} == {"9"}


def test_split_of_its_own_is_kept_out_of_training(pair, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS[:3]))
    problems = data.load_problems(settings(pair, dataset=str(tmp_path), eval_split="test"))
    assert {row["note"] for row in problems.held_out} == {0, 1, 2}
    assert {row["note"] for row in problems.train} == set(range(3, 10))


def test_reward_gets_the_arguments_of_trl(pair):
    seen = {}

    def odd(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return [1.0 if note % 2 else None for note in columns["note"]]

    def half(completions, **_):
        return [0.5] * len(completions)

    config = settings(pair)
    ppo, rows, prompts = ppo_of(config, odd=odd, half=half)
    metrics = ppo.step(rows, prompts)
    size = config.prompts_per_step * config.num_generations
    assert seen["prompts"] == [row["prompt"] for row in rows for _ in range(4)]
    assert seen["columns"] == {
        "answer": ["9"] * size,
        "note": [row["note"] for row in rows for _ in range(4)],
    }
    for text, ids in zip(seen["completions"], seen["completion_ids"], strict=True):
        assert text == ppo.tokenizer.decode(ids, skip_special_tokens=True) and 1 <= len(ids) <= 6
    odd_share = sum(row["note"] % 2 for row in rows) / len(rows)
    assert 0 < odd_share < 1  # or the test would show nothing
    assert metrics["rewards/odd/mean"] == 1.0 and metrics["rewards/half/mean"] == 0.5
    assert metrics["reward"] == pytest.approx(0.5 + odd_share)


def test_chat_prompts(pair, tmp_path):
    """Messages go through the chat template, and the reward gets a message back, as from TRL."""
    chat = tmp_path / "chat.jsonl"
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROBLEMS]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = {}

    def remember(prompts, completions, **_):
        seen.update(prompts=prompts, completions=completions)
        return [0.0] * len(completions)

    with pytest.raises(InputError, match="no chat template"):
        ppo_of(settings(pair, dataset=str(chat)), remember=remember)
    tokenizer = AutoTokenizer.from_pretrained(pair["student"])
    tokenizer.chat_template = "{% for m in messages %}A{{ m['content'] }}{% endfor %}{{ ';' if add_generation_prompt }}"
    student = tmp_path / "student"
    shutil.copytree(pair["student"], student)
    tokenizer.save_pretrained(student)
    ppo, rows, prompts = ppo_of(settings(pair, dataset=str(chat), student=str(student)), remember=remember)
    ppo.step(rows, prompts)
    assert prompts[0] == tokenizer(f"A{rows[0]['prompt'][0]['content']};")["input_ids"]
    assert seen["prompts"][0] == rows[0]["prompt"]
    assert [message["role"] for message in seen["completions"][0]] == ["assistant"]


def test_reward_of_the_wrong_length(pair):
    ppo, rows, prompts = ppo_of(settings(pair), short=lambda **_: [1.0])
    with pytest.raises(InputError, match="short returned 1 rewards for 12 completions"):
        ppo.step(rows, prompts)


def test_built_in_rewards():
    exact = rewards.exact_answer(re.compile(r"A(-?\d+)$"))
    completions = ["1+2=3;A3", "A3;", "A4", "x", "A3A5"]
    assert exact(completions=completions, answer=["3"] * 4 + ["5"]) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert rewards.exact_answer(re.compile(""))(completions=[" 9 ", "9."], answer=[9, 9]) == [1.0, 0.0]
    chat = [[{"role": "assistant", "content": "A7"}]]
    assert exact(completions=chat, answer=["7"]) == [1.0]
    judge = rewards.reasoning_gym_judge(re.compile(r"A(-?\d+)$"))
    row = data.reasoning_gym_rows("chain_sum", {}, 1)[0]
    wrong, right = judge(
        completions=["A99999", f"A{row['answer']}"], answer=[row["answer"]] * 2, metadata=[row["metadata"]] * 2
    )
    assert wrong < right == 1.0


def test_math_verify_reward():
    pytest.importorskip("math_verify")
    completions = [r"so it is $\frac{1}{2}$", "it is 0.5", "it is $0.6$"]
    assert rewards.math_verify(completions=completions, answer=["$1/2$"] * 3) == [1.0, 1.0, 0.0]


# --------------------------------------------------------------------------------------------------------------
# The built-in models


def random_sum(rng: random.Random) -> str:
    text = str(rng.randint(-9, 20))
    for _ in range(rng.randint(1, 4)):
        text += f" {rng.choice('+-')} {rng.randint(-9, 20)}"
    return text


def checked_steps(solution: str) -> tuple[list[bool], list[int], int]:
    """(which steps are right, their results, the final answer) of a worked solution."""
    *steps, answer = solution.split(";")
    right, results, carried = [], [], None
    for step in steps:
        left, result = step.split("=")
        right.append(eval(left) == int(result))
        # a step goes on from the result of the one before
        assert carried is None or re.match(rf"{carried}[+-]", left)
        carried = int(result)
        results.append(carried)
    assert answer.startswith("A")
    return right, results, int(answer[1:])


def test_worked_solutions():
    rng = random.Random(0)
    for _ in range(300):
        expression = random_sum(rng)
        right, results, answer = checked_steps(builtin.worked_solution(expression))
        assert all(right) and results[-1] == answer == eval(expression)
        assert builtin.worked_solution(expression, "direct", rng) == f"A{eval(expression)}"
        right, results, answer = checked_steps(builtin.worked_solution(expression, "slip", rng))
        assert right.count(False) == 1 and results[-1] == answer != eval(expression)
    assert builtin.worked_solution("3 + 4 + 2") == "3+4=7;7+2=9;A9"
    assert builtin.worked_solution("3 - -4") == "3--4=7;A7"


@pytest.mark.parametrize("expression", ["3", "3 * 4", "3 +", "(3 + 4) + 2", ""])
def test_only_sums_have_a_worked_solution(expression):
    with pytest.raises(InputError):
        builtin.worked_solution(expression)


def test_quickstart_in_small(tmp_path, monkeypatch, capsys):
    """The whole of the default recipe with models that have hardly been trained, twice: the cache is used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = {name: dataclasses.replace(r, steps=3, width=16, heads=2) for name, r in builtin.RECIPES.items()}
    monkeypatch.setattr(builtin, "RECIPES", small)
    command = ["train", "--steps=1", "--eval-prompts=8", f"--output-dir={tmp_path / 'runs'}"]
    assert main(command) == 0
    assert capsys.readouterr().out.count("first run: training") == 2
    assert main(command) == 0
    assert "first run" not in capsys.readouterr().out
    assert len(list((tmp_path / "cache" / "cmdp_fast").iterdir())) == 2
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"quickstart", "quickstart-2"}


def test_interrupted_warm_up_leaves_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "track", interrupted)
    assert main(["train", f"--output-dir={tmp_path / 'runs'}"]) == 130
    assert not list((tmp_path / "cache" / "cmdp_fast").iterdir()) and not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart_distils(seed, tmp_path):
    """What the default recipe promises, on problems that were never trained on."""
    assert main(["train", f"--seed={seed}", f"--output-dir={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    before, after = summary["student_before"], summary["student_after"]
    assert after["examples"] >= 500
    assert after["accuracy"] >= before["accuracy"] + 0.10
    assert after["constraint_satisfaction"] >= 0.9


# --------------------------------------------------------------------------------------------------------------
# Rollout and step


def test_completion_mask():
    eos = (2, 7)
    tokens = torch.tensor([[5, 2, 2, 2], [5, 6, 5, 6], [2, 2, 2, 2], [5, 6, 5, 7], [7, 5, 5, 2]])
    mask, finished = completion_mask(tokens, eos)
    assert mask.sum(1).tolist() == [2, 4, 1, 4, 1]  # the end counts, what follows does not
    assert (mask.long().diff(dim=1) <= 0).all()
    assert finished.tolist() == [True, False, True, True, True]


def test_at_last_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    placed = at_last_token(torch.tensor([1.0, 2.0, 3.0]), mask)
    assert placed.tolist() == [[0, 1, 0], [0, 0, 2], [3, 0, 0]]


def test_shuffled_visits_everything_equally():
    batches = shuffled(10, 4, seed=0)
    seen = [i for _ in range(5) for i in next(batches)]
    assert sorted(seen) == sorted([*range(10)] * 2)
    assert sorted(seen[:10]) == list(range(10))
    assert len(next(shuffled(3, 8, seed=0))) == 8


def alone(model, prompt: list[int], completion: torch.Tensor, width: int, temperature: float) -> torch.Tensor:
    """Log-probabilities [T, V] of a completion by itself: no batch, no padding, plain `model(...).logits`."""
    ids = torch.cat([torch.tensor(prompt), completion])[None]
    logits = model(ids).logits[0, len(prompt) - 1 : -1, :width]
    return torch.log_softmax(logits / temperature, -1)


FAMILIES = ["llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "opt"]


@pytest.fixture(params=FAMILIES)
def family_pair(request, pair, tmp_path) -> dict[str, str]:
    """Student and teacher of a family; the teacher pads its vocabulary, as Qwen2.5's larger models do."""
    return {
        **pair,
        "student": tiny_model(tmp_path / "s", seed=1, family=request.param),
        "teacher": tiny_model(tmp_path / "t", seed=2, family=request.param, layers=2, spare=6),
    }


def experience_of(config: TrainConfig, repeat: int = 4):
    """A step's experience on prompts of several lengths."""
    ppo, rows, _ = ppo_of(config)
    rows = [row for row in rows for _ in range(config.num_generations)] * repeat
    prompts = [ids * (1 + i % 3) for i, ids in enumerate(encode_prompts(rows, ppo.tokenizer))]
    experience = ppo.experience(ppo.student, rows, prompts, Clock(), keep_logits=True)
    lengths = experience.rollout.mask.sum(1).tolist()
    assert len(set(lengths)) > 1 and experience.rollout.finished.any()
    completions = [tokens[:n] for tokens, n in zip(experience.rollout.tokens, lengths, strict=True)]
    return ppo, experience, prompts, completions


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_models_own(temperature, family_pair):
    """Padding on both sides and batching change nothing: a completion alone has the same log-probabilities."""
    config = settings(family_pair, temperature=temperature, max_completion_length=12)
    ppo, experience, prompts, completions = experience_of(config)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        n = len(completion)
        with torch.no_grad():
            p, w = (
                alone(model, prompt, completion, ppo.vocab_size, temperature).double()
                for model in (ppo.student, ppo.teacher)
            )
        # float32 logits of size about 10 that went through another order of sums: some 10 roundings of 1e-6
        for ours, theirs in (
            (experience.stats.logprob[i], p.gather(1, completion[:, None])[:, 0]),
            (experience.stats.teacher_logprob[i], w.gather(1, completion[:, None])[:, 0]),
            (experience.stats.reverse_kl[i], (p.exp() * (p - w)).sum(1)),
        ):
            torch.testing.assert_close(ours[:n].double(), theirs, atol=1e-5, rtol=1e-5)
        assert all((value[i, n:] == 0).all() for value in experience.stats)
        total = (p.exp() * (p - w)).sum()
        torch.testing.assert_close(experience.trace.cumulative[i, n - 1].double(), total, atol=1e-4, rtol=1e-5)


def test_gradient_of_a_step(family_pair):
    """The update's gradient against the formula, written out for each completion alone."""
    config = settings(family_pair, max_completion_length=12, kind="hinge", temperature=0.9, budget=0.5)
    ppo, experience, prompts, completions = experience_of(config)
    size = len(prompts)
    torch.manual_seed(0)
    advantage, direct = torch.randn(experience.rollout.mask.shape), torch.rand(experience.rollout.mask.shape)
    loss, _, logits = ppo.loss(experience, advantage, direct, torch.arange(size), size)
    ppo.backward(loss, logits)
    ours = {name: p.grad.clone() for name, p in ppo.student.named_parameters() if p.grad is not None}
    ppo.student.zero_grad()
    expected = torch.zeros(())
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        n = len(completion)
        p = alone(ppo.student, prompt, completion, ppo.vocab_size, 0.9)
        w = alone(ppo.teacher, prompt, completion, ppo.vocab_size, 0.9)
        score = (p.gather(1, completion[:, None])[:, 0] * advantage[i, :n]).sum()
        expected = expected - score + (direct[i, :n] * (p.exp() * (p - w)).sum(1)).sum()
    (expected / size).backward()
    theirs = {name: p.grad for name, p in ppo.student.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name in ours:  # float32 sums over some 400 tokens, and ratios that are 1 up to rounding
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5 * largest, rtol=2e-4)


def test_rollout_samples_the_whole_softmax(pair):
    """The model's own top-k or penalties would make the sampled distribution another than the one that is scored.

    The vocabulary is wider than the 50 columns to which `generate` restricts itself if nothing is said.
    """
    ppo, _, prompts = ppo_of(settings(pair))
    ppo.student.resize_token_embeddings(120, mean_resizing=False)
    own = ppo.student.generation_config
    own.top_k, own.repetition_penalty, own.do_sample = 1, 3.0, True
    torch.manual_seed(0)
    rollout = generate(ppo.student, prompts[:1] * 8000, dataclasses.replace(ppo.sampling, max_length=1))
    assert ppo.student.generation_config is own and own.top_k == 1
    counts = torch.bincount(rollout.tokens[:, 0], minlength=120)
    with torch.no_grad():
        p = ppo.student(torch.tensor(prompts[:1])).logits[0, -1].softmax(-1)
    assert p.sort(descending=True).values[50:].sum() > 0.05  # or a top-k of 50 would not show
    # counts are binomial: 5 deviations at each column
    assert ((counts - 8000 * p).abs() <= 5 * (8000 * p * (1 - p)).sqrt() + 1).all()


def test_columns_that_the_teacher_lacks_are_not_sampled(pair):
    ppo, _, prompts = ppo_of(settings(pair))
    ppo.student.resize_token_embeddings(40, mean_resizing=False)
    with torch.no_grad():
        ppo.student.get_output_embeddings().weight[20:] = ppo.student.get_output_embeddings().weight[5]
    sampling = dataclasses.replace(ppo.sampling, suppress=tuple(range(20, 40)))
    assert generate(ppo.student, prompts * 50, sampling).tokens.max() < 20


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("cmdp", {}),
        ("cmdp", {"cost": "forward_kl"}),
        ("cmdp", {"cost": "k1"}),
        ("cmdp", {"baseline": "grpo"}),
        ("cmdp", {"mixed_precision": "bf16"}),
        ("hinge", {"baseline": "rloo"}),
        ("saute", {"cost": "k3"}),
        ("lagrangian", {"coefficient": 0.5}),
        ("pid", {"coefficient": 0.1}),
        ("barrier", {"coefficient": 0.5}),
        ("worst_case", {"cost": "nll", "budget": 3.0}),
    ],
)
def test_a_step_of_every_kind(kind, changes, pair):
    ppo, rows, prompts = ppo_of(settings(pair, kind=kind, **changes))
    before = [p.clone() for p in ppo.student.parameters()]
    metrics = ppo.step(rows, prompts)
    assert all(math.isfinite(value) for value in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, ppo.student.parameters(), strict=True))
    assert all(p.grad is None for p in ppo.teacher.parameters())
    direct = metrics["loss/direct"]
    assert direct > 0 if kind in ("cmdp", "hinge", "lagrangian", "barrier") and "k1" not in changes.values() else True
    if ppo.config.action_dependent:
        assert direct == 0
    assert ("cmdp/lambda" in metrics) == (kind in ("lagrangian", "pid"))
    assert ("cmdp/prefix_satisfaction" in metrics) == (kind == "worst_case")


def test_pid_moves_its_multiplier(pair):
    ppo, rows, prompts = ppo_of(settings(pair, kind="pid", coefficient=0.1, budget=0.5))
    metrics = ppo.step(rows, prompts)
    assert metrics["cmdp/lambda"] == pytest.approx(0.1) and metrics["cmdp/mean_cumulative"] > 0.5
    assert ppo.coefficient > 0.1


def test_direct_term_is_divided_like_the_advantage(pair, monkeypatch):
    ppo, rows, prompts = ppo_of(settings(pair, kind="lagrangian", coefficient=0.5, baseline="grpo", epochs=1))
    rows, prompts = ([item for item in items for _ in range(4)] for items in (rows, prompts))
    experience = ppo.experience(ppo.student, rows, prompts, Clock())
    advantage, scale = ppo.advantage(experience)
    given = []
    loss = ppo.loss
    monkeypatch.setattr(ppo, "loss", lambda e, a, direct, *rest: given.append(direct) or loss(e, a, direct, *rest))
    ppo.update(experience, advantage, scale)
    expected = torch.where(experience.rollout.mask, 0.5 / scale[:, None], 0.0)
    torch.testing.assert_close(given[0], expected)
    returns = experience.reward.sum(1).view(3, 4)
    deviation = returns.std(1, keepdim=True) + 1e-4
    torch.testing.assert_close(scale.view(3, 4), deviation.expand(3, 4))
    torch.testing.assert_close(advantage[:, 0].view(3, 4), (returns - returns.mean(1, keepdim=True)) / deviation)


def test_failed_save_keeps_the_earlier_student(pair, tmp_path):
    ppo, _, _ = ppo_of(settings(pair))
    save_student(ppo.student, ppo.tokenizer, tmp_path)

    class Broken:
        def save_pretrained(self, _):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_student(ppo.student, Broken(), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").eos_token == "."
    save_student(ppo.student, ppo.tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_json_has_no_nan():
    assert json.loads(as_json({"a": [math.nan, (1.0, -math.inf)], "b": {"c": 0.5}})) == {
        "a": [None, [1.0, None]],
        "b": {"c": 0.5},
    }


def test_first_pass_has_ratio_one(pair):
    """Scoring and update see the same policy: were dropout or a cache in the way, the ratio would show it."""
    ppo, rows, prompts = ppo_of(settings(pair, epochs=1, minibatch_size=12, clip_low=1e-4, clip_high=1e-4))
    metrics = ppo.step(rows, prompts)
    assert metrics["approx_kl"] < 1e-9  # half the square of a log-ratio that is rounding alone
    assert metrics["clip_ratio/region_mean"] == 0


def test_seed_reaches_the_sampling(pair):
    tokens = []
    for seed in (0, 0, 1):
        ppo, _, prompts = ppo_of(settings(pair, seed=seed))
        tokens.append(generate(ppo.student, prompts * 8, ppo.sampling).completion_ids())
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"teacher_cache_mb": 0}])
def test_memory_settings_change_no_result(change, pair):
    """One optimizer step, since Adam's first update is a sign: the norm of the gradient shows any difference."""
    results = []
    for changes in ({"micro_batch_size": 12}, change):
        config = settings(pair, epochs=1, minibatch_size=12, **changes)
        ppo, rows, prompts = ppo_of(config)  # seeds the random numbers
        results.append(untimed(ppo.step(rows, prompts)))
    first, second = results
    assert first.keys() == second.keys() and first["grad_norm"] > 0.1
    for name in first:
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5), name


def test_evaluation_leaves_the_random_state_alone(pair):
    ppo, rows, _ = ppo_of(settings(pair))
    state = torch.get_rng_state()
    clock = Clock()
    first, _ = evaluate(ppo, ppo.student, rows, clock)
    assert torch.equal(state, torch.get_rng_state())
    assert evaluate(ppo, ppo.student, rows, clock)[0] == first
    assert clock.seconds.keys() == {"evaluation"}


def test_pure_divergence_loss_brings_the_student_closer(pair):
    """With nothing to earn and no budget left, steps only reduce the divergence."""
    config = settings(
        pair, kind="lagrangian", coefficient=1.0, steps=20, num_generations=16, minibatch_size=48, micro_batch_size=48
    )
    ppo, rows, prompts = ppo_of(config, nothing=lambda completions, **_: [0.0] * len(completions))
    kl = [ppo.step(rows, prompts)["cmdp/cumulative_kl"] for _ in range(20)]
    assert sum(kl[-3:]) < 0.6 * sum(kl[:3])

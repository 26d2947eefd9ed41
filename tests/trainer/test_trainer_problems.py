"""Problems, rewards and the built-in models."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from tiny_pair import PROBLEMS, learner_of, settings
from transformers import AutoTokenizer

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer import distributed
from cmdp_fast.trainer.models import builtin
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.settings.recipe import read_recipe
from cmdp_fast.trainer.tasks import data, rewards
from cmdp_fast.trainer.tasks.sums import worked_solution


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
    learner, rows, prompts = learner_of(config, odd=odd, half=half)
    metrics = learner.step(rows, prompts)
    size = config.prompts_per_step * config.num_generations
    assert seen["prompts"] == [row["prompt"] for row in rows for _ in range(4)]
    told = {name: seen["columns"].pop(name) for name in ("trainer_state", "log_metric", "log_extra")}
    assert told["trainer_state"].global_step == 0 and told["trainer_state"].max_steps == config.steps
    assert seen["columns"] == {
        "answer": ["9"] * size,
        "note": [row["note"] for row in rows for _ in range(4)],
    }
    for text, ids in zip(seen["completions"], seen["completion_ids"], strict=True):
        assert text == learner.collector.tokenizer.decode(ids, skip_special_tokens=True) and 1 <= len(ids) <= 6
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
        learner_of(settings(pair, dataset=str(chat)), remember=remember)
    tokenizer = AutoTokenizer.from_pretrained(pair["student"])
    tokenizer.chat_template = "{% for m in messages %}A{{ m['content'] }}{% endfor %}{{ ';' if add_generation_prompt }}"
    student = tmp_path / "student"
    shutil.copytree(pair["student"], student)
    tokenizer.save_pretrained(student)
    learner, rows, prompts = learner_of(settings(pair, dataset=str(chat), student=str(student)), remember=remember)
    learner.step(rows, prompts)
    assert prompts[0] == tokenizer(f"A{rows[0]['prompt'][0]['content']};")["input_ids"]
    assert seen["prompts"][0] == rows[0]["prompt"]
    assert [message["role"] for message in seen["completions"][0]] == ["assistant"]


def test_reward_of_the_wrong_length(pair):
    learner, rows, prompts = learner_of(settings(pair), short=lambda **_: [1.0])
    with pytest.raises(InputError, match="short returned 1 rewards for 12 completions"):
        learner.step(rows, prompts)


def test_built_in_rewards():
    exact = rewards.exact_answer(re.compile(r"A(-?\d+)$"))
    completions = ["1+2=3;A3", "A3;", "A4", "x", "A3A5"]
    assert exact(completions=completions, answer=["3"] * 4 + ["5"]) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert rewards.exact_answer(re.compile(""))(completions=[" 9 ", "9."], answer=[9, 9]) == [1.0, 0.0]
    chat = [[{"role": "assistant", "content": "A7"}]]
    assert exact(completions=chat, answer=["7"]) == [1.0]


def test_the_judge_of_the_task(isolation):
    judge = rewards.reasoning_gym_judge(re.compile(r"A(-?\d+)$"), 10.0)
    row = data.reasoning_gym_rows("chain_sum", {}, 1)[0]
    wrong, right = judge(
        completions=["A99999", f"A{row['answer']}"], answer=[row["answer"]] * 2, metadata=[row["metadata"]] * 2
    )
    assert wrong < right == 1.0


def test_a_task_that_draws_from_sets_is_the_same_in_every_process():
    """Under another hash seed than this process has."""
    code = "import json, reasoning_gym as r; d = r.create_dataset('ransom_note', seed=1, size=3); "
    code += "print(json.dumps([e['question'] for e in d]))"
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, check=True
    )
    rows = data.reasoning_gym_rows("ransom_note", {}, 3)
    assert [row["prompt"] for row in rows] == json.loads(elsewhere.stdout)


def test_processes_have_the_same_problems(monkeypatch):
    two = SimpleNamespace(num_processes=2)
    for others, alike in (("aa", True), ("ab", False)):
        all_of_them = [{"problems": each} for each in others]
        monkeypatch.setattr("accelerate.utils.gather_object", lambda given, found=all_of_them: found)
        with nullcontext() if alike else pytest.raises(InputError, match="process 1 has other problems"):
            distributed.check_alike({"problems": "a"}, two)


def test_math_verify_reward():
    pytest.importorskip("math_verify")
    completions = [r"so it is $\frac{1}{2}$", "it is 0.5", "it is $0.6$"]
    anywhere = rewards.math_verify(re.compile(""), 10.0)
    assert anywhere(completions=completions, answer=["$1/2$"] * 3) == [1.0, 1.0, 0.0]
    assert anywhere(completions=["you ask for 4 + 7"], answer=["11"]) == [1.0]  # which is why there is a pattern
    last_number = rewards.math_verify(re.compile(r"(-?\d+)"), 10.0)
    assert last_number(completions=["you ask for 4 + 7", "4 + 7 = 11", "no"], answer=["11"] * 3) == [0.0, 1.0, 0.0]


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
        right, results, answer = checked_steps(worked_solution(expression))
        assert all(right) and results[-1] == answer == eval(expression)
        assert worked_solution(expression, "direct", rng) == f"A{eval(expression)}"
        right, results, answer = checked_steps(worked_solution(expression, "slip", rng))
        assert right.count(False) == 1 and results[-1] == answer != eval(expression)
    assert worked_solution("3 + 4 + 2") == "3+4=7;7+2=9;A9"
    assert worked_solution("3 - -4") == "3--4=7;A7"


@pytest.mark.parametrize("expression", ["3", "3 * 4", "3 +", "(3 + 4) + 2", ""])
def test_only_sums_have_a_worked_solution(expression):
    with pytest.raises(InputError):
        worked_solution(expression)


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
    assert len([path for path in (tmp_path / "cache" / "cmdp_fast").iterdir() if path.name != ".lock"]) == 2
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"quickstart", "quickstart-2"}


def test_interrupted_warm_up_leaves_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "track", interrupted)
    assert main(["train", f"--output-dir={tmp_path / 'runs'}"]) == 130
    assert [path.name for path in (tmp_path / "cache" / "cmdp_fast").iterdir()] == [".lock"]
    assert not (tmp_path / "runs").exists()


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

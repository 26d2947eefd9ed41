"""TRL's whole signature of a reward function in `cmdp-fast train`: its forms, what they are told, what they log."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
import reward_forms
from tiny_pair import arguments, learner_of, settings

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.tasks.data import load_problems
from cmdp_fast.trainer.tasks.judge import programmatic
from cmdp_fast.trainer.tasks.rewards import load_rewards

FILE = Path(reward_forms.__file__)


def with_rewards(pair, *names, **changes):
    return settings(pair, rewards=tuple(f"{FILE}:{name}" for name in names), **changes)


@pytest.mark.parametrize("form", reward_forms.FORMS)
def test_every_form_trains(form, pair):
    learner, rows, prompts = learner_of(with_rewards(pair, form))
    metrics = learner.step(rows, prompts)
    assert metrics["longest"] == int(metrics["longest"]) > 0
    assert 0 < metrics[f"rewards/{form}/mean"] <= metrics["longest"] / 10
    plain, rows, prompts = learner_of(with_rewards(pair, "lengths"))
    assert plain.step(rows, prompts)["reward"] == metrics["reward"]  # the same form by form
    assert learner.step(rows, prompts)["reward"] >= 0  # and again, in the same loop


def test_several_of_them_together_and_where_a_loop_runs(pair):
    names = list(reward_forms.FORMS)

    async def notebook():
        learner, rows, prompts = learner_of(with_rewards(pair, *names))
        return learner.step(rows, prompts)

    metrics = asyncio.run(notebook())
    first = metrics["rewards/lengths/mean"]
    assert [metrics[f"rewards/{name}/mean"] for name in names] == [first] * len(names)
    assert metrics["reward"] == pytest.approx(first * len(names), rel=0.5)  # a mean over those that are not None


def test_the_state_is_that_of_the_training(pair, tmp_path):
    """By a run that stops and goes on: a reward of the number of the step."""
    seen = tmp_path / "seen"
    (tmp_path / "mine.py").write_text(
        "from transformers import TrainerState\n"
        "def reward(completions, trainer_state, **_):\n"
        "    assert isinstance(trainer_state, TrainerState) and trainer_state.is_world_process_zero\n"
        f"    with open({str(seen)!r}, 'a') as lines:\n"
        "        print(trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch, file=lines)\n"
        "    return [float(trainer_state.global_step)] * len(completions)\n"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+{9 - i}=", "answer": "9"}) + "\n" for i in range(10)))
    task = {"dataset": rows, "rewards": f"{tmp_path / 'mine.py'}:reward", "eval_every": 0, "lr_schedule": "constant"}
    command = arguments(pair, tmp_path / "runs", checkpoint_every=1, **task)
    assert main(command) == 0
    on = ["train", f"--resume={tmp_path / 'runs' / 'r'}", "--steps=4", f"--rewards={task['rewards']}"]
    assert main(on) == 0
    lines = (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward"] for line in lines] == [0.0, 1.0, 2.0, 3.0]
    told = [tuple(map(float, line.split())) for line in seen.read_text().splitlines()]
    before, after = [(0, 2, 0)] * 2, [(2, 2, 6 / 9)]  # evaluations; 3 of 9 problems in a step
    assert told == [*before, (0, 2, 0), (1, 2, 3 / 9), *after, (2, 4, 6 / 9), (3, 4, 1), (4, 4, 12 / 9)]


def test_it_is_0_where_nothing_is_trained(pair):
    config = with_rewards(pair, "steps", correct_at=0.5)
    problem = load_problems(config).train[0]
    judge = programmatic(config, problem)
    columns = {name: value for name, value in problem.items() if name != "prompt"}
    assert judge(problem["prompt"], "11", "1", **columns) == "second"  # neither is right, the shorter wins


def test_extra_columns_are_in_the_samples(pair):
    learner, rows, _ = learner_of(with_rewards(pair, "lengths", "steps"))
    _, samples = evaluate(learner.collector, learner.student, rows, Clock())
    assert [sample["extra"] for sample in samples] == [{"text": f"<{sample['completion']}>"} for sample in samples]
    quiet, rows, _ = learner_of(with_rewards(pair, "steps"))
    _, samples = evaluate(quiet.collector, quiet.student, rows, Clock())
    assert not any("extra" in sample for sample in samples)


def test_a_run_writes_whatever_is_logged(pair, tmp_path):
    """Values and names of a completion's making: too deep, too long, half a character, codes that a terminal obeys."""
    (tmp_path / "mine.py").write_text(
        "import itertools, math\n"
        "deep = []\n"
        "for _ in range(100_000):\n"
        "    deep = [deep]\n"
        "hostile = itertools.cycle([deep, 10**5000, '\\ud800', '\\x1b[2J', math.nan, {1: deep}])\n"
        "async def reward(completions, log_extra, log_metric, **_):\n"
        "    log_extra('any\\ud800', [next(hostile) for _ in completions])\n"
        "    log_metric('odd\\ud800\\x1b', math.inf)\n"
        "    return [0.0] * len(completions)\n"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+{9 - i}=", "answer": "9"}) + "\n" for i in range(10)))
    task = {"dataset": rows, "rewards": f"{tmp_path / 'mine.py'}:reward", "checkpoint_every": 1}
    assert main(arguments(pair, tmp_path / "runs", **task)) == 0
    run = tmp_path / "runs" / "r"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    values = {json.dumps(sample["extra"]["any\\ud800"]) for sample in samples}
    assert values == {'"<list>"', '"<int>"', '"\\\\ud800"', '"\\u001b[2J"', "null", '"<dict>"'}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [step["odd\\ud800\x1b"] for step in steps] == [None, None]  # infinity is no JSON


@pytest.mark.parametrize("name", ["failing", "failing_later"])
def test_an_exception_names_the_function(name, pair):
    learner, rows, prompts = learner_of(with_rewards(pair, "lengths", name))
    with pytest.raises(InputError, match=rf"^reward function {name} raised LookupError: no such judge \({FILE}:\d+\)$"):
        learner.step(rows, prompts)


def test_results_of_the_wrong_length_are_named(pair):
    learner, rows, prompts = learner_of(with_rewards(pair, "short"))
    with pytest.raises(InputError, match="reward function short returned 1 rewards for 12 completions"):
        learner.step(rows, prompts)


def test_a_metric_of_ours_is_not_logged_over(pair):
    for name in ("reward", "grad_norm", "step_time", "step"):
        reward = lambda completions, log_metric, name=name, **_: log_metric(name, 1.0) or [0.0] * len(completions)  # noqa: E731
        learner, rows, prompts = learner_of(settings(pair), mine=reward)
        with pytest.raises(InputError, match=rf"log_metric\('{name}', ...\): a step has a metric of that name"):
            learner.step(rows, prompts)


def test_no_opinion_is_not_in_a_metric_s_mean(pair):
    def some(completions, log_metric, **_):
        log_metric("none", math.nan)
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    learner, rows, prompts = learner_of(settings(pair), some=some)
    metrics = learner.step(rows, prompts)
    assert metrics["rewards/some/mean"] == 1.0 and math.isnan(metrics["none"])


def test_two_rewards_of_one_name_are_refused(pair, tmp_path):
    """One of them was lost."""
    (tmp_path / "other.py").write_text("def lengths(completions, **_):\n    return [1.0] * len(completions)\n")
    config = settings(pair, rewards=(f"{FILE}:lengths", f"{tmp_path / 'other.py'}:lengths"))
    with pytest.raises(InputError, match="there is a reward 'lengths' already"):
        load_rewards(config, {"prompt": "", "answer": ""})


def test_a_built_in_reward_takes_no_other_s_name(pair, tmp_path):
    """The user's was lost."""
    (tmp_path / "other.py").write_text("def exact_answer(completions, **_):\n    return [1.0] * len(completions)\n")
    config = settings(pair, rewards=(f"{tmp_path / 'other.py'}:exact_answer", "exact_answer"))
    with pytest.raises(InputError, match="there is a reward 'exact_answer' already"):
        load_rewards(config, {"prompt": "", "answer": ""})

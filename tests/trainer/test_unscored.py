"""Completions on which no reward has an opinion, the weights of rewards, and the one that says what is right."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny_pair import arguments, learner_of, settings

from cmdp_fast import credit, objective
from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.evaluate import evaluate, of_several
from cmdp_fast.trainer.micro_batches import lengths_of, split
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.records.samples import samples_text
from cmdp_fast.trainer.settings.values import typed, words
from cmdp_fast.trainer.tasks.data import load_problems
from cmdp_fast.trainer.tasks.judge import programmatic
from cmdp_fast.trainer.tasks.rewards import call_rewards, check_columns, load_rewards, trainer_state

BASELINES = ("rloo", "grpo", "position_rloo", "gae")
# Groups of four: one failed judge; two opinions of four; a single one; none.
GIVEN = [-5.0, -5.0, -5.0, None, 1.0, math.nan, 0.0, None, None, 2.0, None, None, None, None, None, None]
SCORED = torch.tensor([value is not None and not math.isnan(value) for value in GIVEN])


def given(completions, **_):
    return (GIVEN * len(completions))[: len(completions)]


def nothing(completions, **_):
    return [math.nan] * len(completions)


def shaping(completions, **_):
    """Of eight completions three reach 1 with this alone."""
    return [float(i % 8 < 3) for i in range(len(completions))]


def exact(completions, **_):
    return [0.0] * len(completions)


def collected(pair, reward=given, **changes):
    """A learner, its constraint, and four groups of four completions, whose last token is not always the first."""
    learner, rows, prompts = learner_of(settings(pair, prompts_per_step=4, **changes), reward=reward)
    group = ([item for item in items for _ in range(4)] for items in (rows, prompts))
    constraint = learner.constraint()
    return learner, constraint, learner.method.collect(*group, constraint)


# ---------------------------------------------------------------------------------------------------- no opinion


@pytest.mark.parametrize(("baseline", "gamma"), [*((name, 1.0) for name in BASELINES), ("rloo", 0.7), ("grpo", 0.7)])
@pytest.mark.parametrize("unit", ["one", "range"])
def test_a_completion_without_an_opinion_is_worth_nothing_to_the_task(pair, baseline, gamma, unit):
    """Its advantage was +5 in the first group, and those of the others were -1.67. With a discount, a shorter or longer
    one than the others had the difference."""
    learner, constraint, experience = collected(pair, baseline=baseline, gamma=gamma, budget=1e9, reward_unit=unit)
    targets = learner.method.targets(experience, constraint)
    advantage = targets["advantage"]
    assert torch.equal(experience.scored, SCORED) and len(set(experience.rollout.mask.sum(1).tolist())) > 1
    assert not advantage[~SCORED].any()  # 0, and not nearly so
    assert advantage[SCORED].isfinite().all() and advantage[4].any()
    if baseline in ("rloo", "grpo") and gamma == 1:
        assert not advantage[:3].any()  # three that are equal
    if baseline == "rloo" and gamma == 1:
        known = experience.task_reward[SCORED]
        width = float(known.max() - known.min()) if unit == "range" else 1.0
        assert advantage[[4, 6], 0].tolist() == pytest.approx([1.0 / width, -1.0 / width])


@pytest.mark.parametrize("unit", ["one", "range"])
@pytest.mark.parametrize("baseline", ["rloo", "grpo"])
def test_a_missing_end_of_the_others_says_nothing_of_it(baseline, unit, pair):
    """The penalty was taken from the others' rewards alone, so that a failed judge was worth up to 0.6."""
    changes = {"baseline": baseline, "reward_unit": unit, "budget": 1e9, "missing_eos_penalty": 0.6}
    learner, constraint, experience = collected(pair, **changes)
    penalised = ~experience.rollout.finished
    assert penalised[SCORED].any() and penalised[~SCORED].any()
    advantage = learner.method.targets(experience, constraint)["advantage"]
    assert not advantage[~SCORED].any()
    given = torch.tensor([0.0 if value is None or math.isnan(value) else value for value in GIVEN])
    torch.testing.assert_close(experience.task_reward[SCORED], (given - 0.6 * penalised)[SCORED])
    reward = experience.task_reward.view(4, 4)
    means = (torch.where(SCORED.view(4, 4), reward, 0.0).sum(1) / SCORED.view(4, 4).sum(1).clamp(min=1))[:, None]
    assert torch.equal(reward[~SCORED.view(4, 4)], means.expand(4, 4)[~SCORED.view(4, 4)])


@pytest.mark.parametrize("algorithm", ["ppo", "minillm"])
def test_it_tells_no_group_of_equal_rewards_apart(algorithm, pair):
    """Its mean, 0.8999999 of three 0.9, or for minillm 0, counted as a reward of its own: a share of 0."""
    learner, rows, prompts = learner_of(
        settings(pair, algorithm=algorithm, teacher_mix=0.0, baseline="rloo"),
        reward=lambda completions, **_: [0.9, 0.9, 0.9, None] * 2 + [None] * 4,
    )
    assert learner.step(rows, prompts)["frac_reward_zero_std"] == 1.0


@pytest.mark.parametrize("algorithm", ["ppo", "gkd", "minillm", "sft"])
def test_its_modified_reward_is_logged_alike_by_all_methods(algorithm, pair):
    """That of minillm, sft and kd counted its task reward as 0, and not as its group's mean."""
    config = settings(pair, algorithm=algorithm, teacher_mix=0.0, budget=1e9)
    learner, rows, prompts = learner_of(config, reward=lambda completions, **_: [2.0, None, None, 4.0] * 3)
    assert learner.step(rows, prompts)["cmdp/modified_reward"] == 3.0


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("kind", ["cmdp", "lagrangian"])
def test_the_constraint_acts_on_it(pair, baseline, kind):
    """As if its task reward were the mean of its group's, and by what the constraint makes of that alone."""
    settled = {"coefficient": 0.5} if kind == "lagrangian" else {"penalty": 0.7}
    learner, constraint, experience = collected(pair, baseline=baseline, kind=kind, budget=2.0, **settled)
    mask, found = experience.rollout.mask, learner.method.targets(experience, constraint)["advantage"]
    assert experience.trace.violated[~SCORED].any()
    returns = experience.reward.sum(1)
    score = credit.score(experience.reward, experience.last_reward, experience.trace, constraint, mask=mask)
    assert experience.task_reward[[3, 5, 8, 12]].tolist() == [-5.0, 0.5, 2.0, 0.0]
    by_constraint = torch.where(mask, score - experience.task_reward[:, None], 0.0)
    for first in range(0, 16, 4):
        group = slice(first, first + 4)
        compared = SCORED[group] if SCORED[group].any() else torch.ones(4, dtype=torch.bool)
        unscored = ~SCORED[group] & compared.any()
        if baseline in ("rloo", "grpo"):
            others = returns[group][compared]
            scale = others.std() + 1e-4 if baseline == "grpo" and len(others) > 1 else 1.0
            whole = compared.all()  # none is scored: each is compared with the others
            factor = 4 / 3 if whole and baseline == "rloo" else 1.0
            expected = torch.where(mask[group], factor * (returns[group] - others.mean())[:, None] / scale, 0.0)
        elif baseline == "position_rloo":
            expected = objective.position_rloo(by_constraint[group], 4, mask[group], scored=SCORED[group])
        else:
            expected = objective.position_rloo(by_constraint[group], 4, mask[group])
        torch.testing.assert_close(found[group][unscored], expected[unscored], atol=1e-5, rtol=1e-5)
    assert found[~SCORED].any()


def test_a_value_head_learns_nothing_from_it(pair):
    """Its target was the return of a task reward of 0."""
    learner, constraint, experience = collected(pair, baseline="gae", budget=1e9, value_learning_rate=0.1)
    targets = learner.method.targets(experience, constraint)
    for rows, learns in ((SCORED, True), (~SCORED, False)):
        chosen = torch.arange(16)[rows].tolist()
        (some,) = split(chosen, lengths_of(experience.rollout), count=16)
        part, target = experience.rows(some), {name: some.of(value) for name, value in targets.items()}
        loss = learner.method.loss(part, target, constraint, float(len(chosen)))
        assert (loss.metrics["loss/value"] > 0) == learns
    silent, constraint, experience = collected(pair, nothing, baseline="gae", budget=1e9)
    metrics = silent.update(experience, silent.method.targets(experience, constraint), constraint)
    assert metrics["loss/value"] == metrics["loss/score"] == 0
    assert math.isnan(metrics["value/explained_variance"])


def test_means_are_of_those_with_an_opinion(pair):
    learner, constraint, experience = collected(pair)
    metrics = learner.collector.measure(experience, constraint)
    opinions = torch.tensor([value for value in GIVEN if value is not None and not math.isnan(value)])
    assert metrics["reward"] == pytest.approx(opinions.mean().item())
    assert metrics["reward_std"] == pytest.approx(opinions.std().item())
    assert metrics["rewards/reward/mean"] == pytest.approx(opinions.mean().item())
    assert metrics["cmdp/accuracy"] == 2 / 16 and metrics["cmdp/unjudged"] == 10 / 16


def test_a_sample_without_an_opinion_is_neither_right_nor_wrong(pair):
    """It was wrong."""
    config = settings(pair, eval_generations=4)
    learner, rows, _ = learner_of(config, reward=lambda completions, **_: [1.0, 0.0, None, math.nan])
    figures, samples = evaluate(learner.collector, learner.student, rows[:1], Clock())
    assert [sample["correct"] for sample in samples] == [True, False, None, None]
    assert [sample["reward"] for sample in samples] == [1.0, 0.0, None, None]
    verdicts = [line.split("[")[-1].split(",")[0] for line in samples_text([("", samples)]).splitlines()[2:]]
    assert verdicts == ["right", "wrong", "not judged", "not judged"]
    assert figures["accuracy"] == of_several(samples, 4)["mean@4"] == 0.25 and figures["unjudged"] == 0.5


def test_no_reference_is_no_opinion(pair):
    """A completion of the text `None` was right."""
    config = settings(pair, rewards=("exact_answer", "brevity"))
    rows = [{"prompt": "", "answer": answer} for answer in (None, "None", "9", math.nan)]
    texts = ["None", "None", "None", "nan"]
    judged = call_rewards(load_rewards(config, rows[0]), rows, texts, [[1]] * 4, trainer_state(config))
    exact, brief = judged.rewards.values()
    assert all(math.isnan(values[i]) for values in (exact, brief) for i in (0, 3))
    assert exact[1:3] == [1.0, 0.0] and brief[1] > brief[2] == 0


def test_a_table_with_gaps_holds_numbers_with_a_point(pair, tmp_path):
    """Every answer was wrong: a column of whole numbers is one of floats where a row has none."""
    path = tmp_path / "gaps.csv"
    path.write_text("prompt,answer\n1+1=,2\n1+2=,\n1+3=,4\n" + "".join(f"{i}+5=,{i + 5}\n" for i in range(9)))
    config = settings(pair, dataset=str(path))
    rows = [row for part in load_problems(config) for row in part]
    texts = ["9" if row["answer"] is None else f"{row['answer']:.0f}" for row in rows]
    judged = call_rewards(load_rewards(config, rows[0]), rows, texts, [[1]] * 12, trainer_state(config))
    values = [value for value in judged.rewards["exact_answer"] if not math.isnan(value)]
    assert values == [1.0] * 11
    rows = [{"prompt": "", "answer": answer} for answer in (2.0, 2.0, 2.5, 2, math.nan)]
    texts = ["2.0", "3", "2", "2.0", "nan"]
    judged = call_rewards(load_rewards(config, rows[0]), rows, texts, [[1]] * 5, trainer_state(config))
    assert judged.rewards["exact_answer"][:4] == [1.0, 0.0, 0.0, 0.0]
    assert math.isnan(judged.rewards["exact_answer"][4])


@pytest.mark.parametrize("reward", ["exact_answer", "brevity", "math_verify"])
def test_answers_that_nothing_can_equal_are_refused(pair, reward):
    config = settings(pair, rewards=(reward,))
    functions = load_rewards(config, {"prompt": "", "answer": ""})
    for answer, expected in (
        (["3"], "holds a list"),
        ({"value": "3"}, "holds a dict"),
        (None, "empty in all 2 rows"),
        (1e20, r"holds 1e\+20, of which digits may be lost: write such numbers as texts"),  # JSON's of 2**64 and more
        (math.inf, "holds inf, of which"),
    ):
        rows = [{"prompt": "", "answer": answer}] * 2
        with pytest.raises(InputError, match=f"--rewards {reward}.* of a.jsonl.* {expected}"):
            check_columns(config, functions, rows, "a.jsonl")
    rows = [{"prompt": "", "answer": answer} for answer in (None, "3", 2.0**53 - 1, math.nan)]
    check_columns(config, functions, rows, "a.jsonl")


def test_of_several_functions_those_with_an_opinion_are_added_up(pair):
    def some(completions, **_):
        return [None if i % 4 == 1 else float(i % 4) for i in range(len(completions))]

    learner, rows, prompts = learner_of(settings(pair), shaping=shaping, some=some)
    learner.collector.weights = torch.tensor([10.0, -0.5])
    found = learner.collector.complete(learner.student, rows * 4, prompts * 4, Clock())
    expected = [10.0 * (i % 8 < 3) - 0.5 * (i % 4) * (i % 4 != 1) for i in range(12)]
    assert found.task_reward.tolist() == expected and found.scored.all()


def test_a_reward_without_any_opinion_is_said_once(pair, caplog, tmp_path):
    """The whole of a run, which goes on after a checkpoint; the constraint alone is learned from."""
    (tmp_path / "mine.py").write_text("def silent(completions, **_):\n    return [None] * len(completions)\n")
    spec = f"{tmp_path / 'mine.py'}:silent"
    assert main(arguments(pair, tmp_path / "runs", checkpoint_every=1, rewards=spec, lr_schedule="constant")) == 0
    said = [record.getMessage() for record in caplog.records if "has no opinion" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(
        "the reward silent has no opinion (None or NaN) on any of 3 completions"
    )
    run = tmp_path / "runs" / "r"
    assert main(["train", f"--resume={run}", "--steps=3", f"--rewards={spec}"]) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["reward"] for step in steps] == [None] * 3 and all(step["grad_norm"] > 0 for step in steps)
    after = json.loads((run / "summary.json").read_text())["student_after"]
    assert after["accuracy"] == 0.0 and after["unjudged"] == 1.0


@pytest.mark.parametrize("value", ["math.inf", "-math.inf", "1e39"])
def test_an_infinite_reward_is_named(pair, tmp_path, value):
    """It was the learning rate's fault."""
    (tmp_path / "mine.py").write_text(
        f"import math\ndef endless(completions, **_):\n    return [0.5, *[{value}] * (len(completions) - 1)]\n"
    )
    learner, rows, prompts = learner_of(settings(pair, rewards=(f"{tmp_path / 'mine.py'}:endless",)))
    with pytest.raises(InputError, match=r"reward function endless returned a reward of size .*, infinite in float32"):
        learner.step(rows, prompts)


def test_weights_that_make_a_reward_infinite(pair):
    learner, rows, prompts = learner_of(settings(pair), shaping=lambda completions, **_: [3e38] * len(completions))
    learner.collector.weights *= 2
    with pytest.raises(InputError, match="the weighted rewards of a completion add up to infinity"):
        learner.step(rows, prompts)


# ---------------------------------------------------------------------------------------------------- what is right


def test_accuracy_is_that_of_one_reward(pair):
    """It was the share whose sum reached 1: 0.375 where no answer was right."""
    learner, rows, prompts = learner_of(settings(pair, prompts_per_step=2), exact=exact, shaping=shaping)
    metrics = learner.step(rows, prompts)
    assert metrics["reward"] == 3 / 8
    assert metrics["cmdp/accuracy"] == metrics["cmdp/correct_and_feasible"] == 0.0
    figures, samples = evaluate(learner.collector, learner.student, rows * 2, Clock())
    assert figures["accuracy"] == 0.0 and not any(sample["correct"] for sample in samples)


def test_accuracy_may_be_another_reward_s(pair, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def exact(completions, **_):\n    return [0.0] * len(completions)\n"
        "def shaping(completions, **_):\n    return [0.6 * (i % 8 < 3) for i in range(len(completions))]\n"
    )
    names = tuple(f"{tmp_path / 'mine.py'}:{name}" for name in ("exact", "shaping"))
    config = settings(
        pair, prompts_per_step=2, rewards=names, reward_weights=(1.0, 0.5), accuracy_reward="shaping", correct_at=0.5
    )
    learner, rows, prompts = learner_of(config)
    metrics = learner.step(rows, prompts)
    assert metrics["reward"] == pytest.approx(0.3 * 3 / 8)
    assert metrics["cmdp/accuracy"] == 3 / 8  # by the reward itself, not by its weighted part
    assert metrics["cmdp/correct_and_feasible"] <= 3 / 8
    [problem] = load_problems(config).train[:1]
    judge = programmatic(dataclasses.replace(config, accuracy_reward="exact"), problem)
    assert judge(first="11", second="1", **problem) == "second"  # neither is right: the shorter
    with pytest.raises(InputError, match="--accuracy-reward must be one of exact, shaping, not mine"):
        settings(pair, rewards=names, accuracy_reward="mine")


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0), (1.0, math.nan), (math.inf, 1.0), (1e39, 1.0)])
def test_weights_are_one_finite_number_each(pair, weights):
    with pytest.raises(InputError, match="--reward-weights must be a finite number for each of the 2 --rewards, not"):
        settings(pair, rewards=("exact_answer", "brevity"), reward_weights=weights)


def test_weights_in_a_file_and_as_words():
    assert typed({"reward_weights": [1, 0.5]}, "recipe")["reward_weights"] == (1.0, 0.5)
    assert typed({"reward_weights": []}, "recipe")["reward_weights"] == ()
    assert words("reward_weights", (1.0, -0.5)) == ["--reward-weights", "1.0", "-0.5"]
    with pytest.raises(InputError, match="recipe: reward_weights must be a list of float"):
        typed({"reward_weights": ["1"]}, "recipe")

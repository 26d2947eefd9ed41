"""TRL's on-policy distillation on our operations: where it is TRL's, and what a reward and a budget change."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

import torch
from reward_forms import FORMS, failing, failing_later, lengths, steps
from test_trl_grpo import ROUNDING, dense_logits, one_batch
from tiny_pair import tiny_model
from trl.trainer.utils import nanstd
from trl_pair import digits, distillation, grpo, logged, prompts, student, trained

import cmdp_fast as cf
from cmdp_fast import objective
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.trl import CMDPDistillationConfig, CMDPDistillationTrainer
from cmdp_fast.integrations.trl.completions_table import add_columns, table_rows
from cmdp_fast.reward_functions import RewardError


def dense_divergence(student_logits, teacher_logits, beta, mask):
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    return cf.reference.divergence(student_logits, teacher_logits, kind, beta=beta, mask=mask)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.0},
        {"beta": 1.0},
        {"beta": 0.5},
        {"beta": 0.2, "temperature": 0.7},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"beta": 0.5, "gradient_checkpointing": True},
        {"trainer": "adapter", "gradient_checkpointing": True},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_with_trls_settings_it_is_trls_step_by_step(pair, tmp_path, changes):
    changes = {"learning_rate": 1e-3, "max_steps": 20, **changes}
    if "trainer" in changes:
        from peft import LoraConfig

        adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
        changes |= {"trainer": {"peft_config": adapter}, "learning_rate": 1e-2}
    theirs = trained(distillation, pair, tmp_path, plain=True, **changes)
    ours = trained(distillation, pair, tmp_path, **changes)
    for name in ("loss", "grad_norm", "entropy", "completions/mean_length"):
        expected = logged(theirs, name)
        assert len(expected) == 20
        assert logged(ours, name) == pytest.approx(expected, **ROUNDING), name
    kl = logged(ours, "cmdp/cumulative_kl")
    assert len(kl) == 20
    if ours.beta == 1.0:
        loss = [total / length for total, length in zip(kl, logged(ours, "completions/mean_length"), strict=True)]
        assert loss == pytest.approx(logged(ours, "loss"), rel=1e-4)
    assert "cmdp/constraint_satisfaction" not in ours.state.log_history[0]


@pytest.mark.parametrize(("ours", "theirs"), [(3, 0), (0, 5)], ids=["wider student", "wider teacher"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_vocabularies_of_different_width(tmp_path, ours, theirs, beta):
    pair = {
        "student": tiny_model(tmp_path / "s", seed=1, spare=ours),
        "teacher": tiny_model(tmp_path / "t", seed=2, spare=theirs),
    }
    with pytest.raises(ValueError, match="requires a shared vocabulary"):
        distillation(pair, tmp_path, plain=True)
    trainer = distillation(pair, tmp_path, beta=beta, per_device_train_batch_size=8)
    width = len(trainer.processing_class)
    batch = one_batch(trainer)
    assert int(batch["completion_ids"].max()) < width
    mask, copy = batch["completion_mask"].bool(), student(pair["student"])
    x, y = (dense_logits(model, batch, width) for model in (copy, trainer.teacher_model))
    expected = dense_divergence(x, y.detach(), beta, mask).sum() / mask.sum()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for value in (loss, expected):
        value.backward()
    for (name, parameter), other in zip(trainer.model.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=2e-6, rtol=2e-4, msg=name)
    trainer.train()


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("budget", [2.0, 0.3, None])
def test_rewards_and_a_budget_are_those_of_the_objective(pair, tmp_path, beta, budget):
    trainer = distillation(
        pair,
        tmp_path,
        beta=beta,
        budget=budget,
        penalty=0.5,
        discrepancy_weight=2.0,
        num_generations=4,
        per_device_train_batch_size=8,
        trainer={"reward_funcs": digits},
    )
    batch = one_batch(trainer)
    mask = batch["completion_mask"].bool()
    copy = student(pair["student"])
    x, y = (dense_logits(model, batch) for model in (copy, trainer.teacher_model))
    cost = dense_divergence(x, y.detach(), beta, mask)
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    task = torch.zeros(mask.shape)
    task[torch.arange(8), mask.sum(1) - 1] = torch.tensor(digits(texts))
    reward, direct = task, torch.full(mask.shape, 2.0)
    if budget is not None:
        constraint = cf.Constraint(budget=budget, penalty=0.5, discrepancy_weight=2.0)
        trace = cf.budget_trace(cost, constraint=constraint, mask=mask)
        reward = cf.modified_reward(task, cost.detach(), trace, constraint=constraint, mask=mask)
        direct = objective.direct_coefficient(trace, constraint, mask=mask)
        torch.testing.assert_close(batch["direct"], direct)
        torch.testing.assert_close(batch["modified_reward"], reward, atol=1e-5, rtol=1e-5)
    advantage = torch.where(mask, objective.rloo(reward.sum(1), 4)[:, None], 0.0)
    torch.testing.assert_close(batch["advantages"], advantage, atol=1e-5, rtol=1e-5)
    assert advantage.any()

    logprob = x.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    (torch.where(mask, direct * cost - advantage * logprob, 0.0).sum() / mask.sum()).backward()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch).backward()
    for (name, parameter), other in zip(trainer.model.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_a_budget_leaves_room_for_the_reward_that_distillation_does_not(pair, tmp_path):
    """The same run from the same seed without a budget and with one of 4 nats: the last ten of forty steps."""
    changes = {"num_generations": 4, "per_device_train_batch_size": 16, "max_steps": 40, "kind": "hinge"}
    runs = [
        trained(distillation, pair, tmp_path, budget=budget, trainer={"reward_funcs": digits}, **changes)
        for budget in (None, 4.0)
    ]
    (free_kl, free), (kl, reward) = (
        [sum(logged(run, name)[-10:]) / 10 for name in ("cmdp/cumulative_kl", "reward")] for run in runs
    )
    assert free_kl < 2.5 < kl < 4.0
    assert reward > free + 0.1
    within = logged(runs[1], "cmdp/constraint_satisfaction")
    assert sum(within[-10:]) / 10 > 0.75 > 0.3 > sum(within[:3]) / 3
    entry = runs[1].state.log_history[0]
    assert {"cmdp/modified_reward", "cmdp/budget", "cmdp/mean_excess", "rewards/digits/mean", "reward_std"} <= set(
        entry
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_reward_function(pair, tmp_path, form):
    function, name = FORMS[form]
    changes = {"num_generations": 2, "max_steps": 2}
    run, plain = (
        trained(distillation, pair, tmp_path, trainer={"reward_funcs": each}, **changes) for each in (function, lengths)
    )
    for ours, theirs in ((f"rewards/{name}/mean", "rewards/lengths/mean"), ("longest", "longest"), ("loss", "loss")):
        assert logged(run, ours) == logged(plain, theirs) and len(logged(run, ours)) == 2


def test_rewards_are_logged_as_grpo_logs_them(pair, tmp_path):
    """The same functions on the same completions, in TRL's hands and in ours; several of them have one name."""

    def some(completions, log_metric, trainer_state, **_):
        log_metric("step", trainer_state.global_step)
        log_metric("step", trainer_state.max_steps)
        return [None if len(text) < 4 else len(text) for text in completions]

    functions = [*(function for function, _ in FORMS.values()), some, steps]
    trainers = [
        make(pair, tmp_path, num_generations=4, trainer={"reward_funcs": list(functions)}, **changes)
        for make, changes in ((distillation, {}), (grpo, {"plain": True}))
    ]
    ours, theirs = trainers
    for trainer in trainers:
        trainer.state.global_step, trainer.state.max_steps = 3, 7
    texts = ["12", "", "345678", "3456"]
    ids = [ours.processing_class.encode(text) for text in texts]
    inputs = [{"prompt": f"{i // 4}=", "answer": "9"} for i in range(4)]
    width = max(map(len, ids))
    batch = {
        "completion_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
        "completion_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
    }
    ours.model.train()
    ours._task_rewards(inputs, batch, 4)
    rewards = theirs._calculate_rewards(inputs, [row["prompt"] for row in inputs], texts, ids)
    metrics, names = ours._metrics["train"], theirs.reward_func_names
    for i, name in enumerate(names):
        place = names[:i].count(name)  # functions of one name log under it in turn
        assert metrics[f"rewards/{name}/mean"][place] == pytest.approx(rewards[:, i].nanmean().item())
        assert metrics[f"rewards/{name}/std"][place] == pytest.approx(nanstd(rewards[:, i]).item(), nan_ok=True)
    for name, values in theirs._pending_metrics.items():
        assert metrics[name] == pytest.approx([sum(values) / len(values)])
    assert metrics["step"] == [5.0]
    total = rewards.nansum(1)
    assert metrics["reward"] == pytest.approx([total.mean().item()])
    assert metrics["reward_std"] == pytest.approx([total.std().item()])


def test_a_completion_without_an_opinion_is_not_in_the_reward_that_is_logged(pair, tmp_path):
    """As TRL: rewards 1, None, None, None have the mean 1 and no deviation."""

    def first(completions, **_):
        return [None if i else 1.0 for i in range(len(completions))]

    run = trained(distillation, pair, tmp_path, num_generations=4, trainer={"reward_funcs": first})
    theirs = trained(grpo, pair, tmp_path, plain=True, trainer={"reward_funcs": first})
    for name in ("reward", "reward_std", "rewards/first/mean", "rewards/first/std"):
        assert logged(run, name) == logged(theirs, name), name
    assert logged(run, "reward") == [1.0] * 3


def test_the_table_of_completions_has_rewards_and_what_they_log(pair, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    hostile = itertools.cycle([1, "a", None, "\ud800", True, 2.5, [[]]])

    def mixed(completions, log_extra, **_):
        log_extra("mixed", [next(hostile) for _ in completions])
        log_extra("completion", ["not this one"] * len(completions))
        return [None if i == 0 else 1.0 for i in range(len(completions))]

    functions = {"reward_funcs": [mixed, lengths], "eval_dataset": prompts()}
    run = trained(distillation, pair, tmp_path, trainer=functions, num_generations=4, max_steps=2, log_completions=True)
    run.evaluate()
    tables = sorted((tmp_path / "completions").glob("*.parquet"))
    assert len(tables) == 2
    for path in tables:
        table = pandas.read_parquet(path)
        assert list(table.columns[:3]) == ["step", "prompt", "completion"]
        assert {"mixed", "text", "lengths"} < set(table.columns)
        for row in table.to_dict("records"):
            assert row["text"] == f"<{row['completion']}>"
            assert row["lengths"] == pytest.approx(len(row["completion"]) / 10) or not row["completion"]
        assert len(set(map(type, table["mixed"])) - {type(None)}) == 1  # what a column can hold


def test_a_column_of_several_types_is_one_of_texts(tmp_path):
    """Parquet has no other, and TRL's GRPO ends there."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    path, texts = tmp_path / "table.parquet", ["x", "y", "z"]
    pandas.DataFrame({"completion": texts}).to_parquet(path)
    rows = table_rows({"reward": [1.0, math.nan, 0.5]}, [{"a": 1, "b": 1, "c": True}, {"a": "1"}, {"b": 0.5, "c": 2}])
    add_columns(path, deque(rows))
    table = pandas.read_parquet(path)
    columns = {name: [None if pandas.isna(v) else v for v in table[name]] for name in table}
    assert columns == {
        "completion": texts,
        "a": ["1", "1", None],
        "b": [1.0, None, 0.5],
        "c": ["True", None, "2"],
        "reward": [1.0, None, 0.5],
    }


def test_a_table_that_cannot_be_written_again_is_as_it_was(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    path = tmp_path / "table.parquet"
    pandas.DataFrame({"completion": ["x"]}).to_parquet(path)
    before = path.read_bytes()

    def half(frame, to):
        Path(to).write_bytes(before[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(pandas.DataFrame, "to_parquet", half)
    with pytest.raises(InputError, match=r"table\.parquet could not be written: no space left"):
        add_columns(path, deque([{"reward": 1.0}]))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", [failing, failing_later])
def test_a_reward_function_that_raises_is_named(pair, tmp_path, function):
    trainer = distillation(pair, tmp_path, num_generations=2, trainer={"reward_funcs": [lengths, function]})
    with pytest.raises(RewardError, match=f"reward function {function.__name__} raised LookupError: no such judge"):
        trainer.train()


def test_where_a_loop_runs_already(pair, tmp_path):
    async def notebook():
        return trained(
            distillation, pair, tmp_path, num_generations=2, max_steps=1, trainer={"reward_funcs": FORMS["later"][0]}
        )

    assert len(logged(asyncio.run(notebook()), "rewards/later/mean")) == 1


def test_prompts_are_repeated_for_their_group(pair, tmp_path):
    seen = []

    def note(prompts, completions, completion_ids, trainer_state, answer, note, **_):
        seen.append((prompts, note))
        assert trainer_state.global_step >= 0 and set(answer) == {"9"}
        assert all(ids for ids in completion_ids)
        return [None] * len(completions)

    changes = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = trained(
        distillation, pair, tmp_path, trainer={"reward_funcs": [note], "eval_dataset": prompts()}, **changes
    )
    assert len(seen) == 2
    for given, notes in seen:
        assert given[0] == given[1] != given[2] == given[3] and notes[0] == notes[1]
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 2.0}, "a budget needs completions to compare: num_generations must be at least 2, got 1"),
        ({"budget": -2.0, "num_generations": 2}, "budget must be at least 0 nats"),
        ({"kind": "saute"}, "kind must be 'cmdp' or 'hinge', got 'saute'"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"num_generations": 3}, "num_generations=3 must divide the 4 completions of an optimizer step"),
        ({"discrepancy_weight": -1.0}, "discrepancy_weight must be finite and not negative"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        CMDPDistillationConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, **changes)
    assert message in str(caught.value)


def test_what_does_not_fit_is_refused_before_anything_is_trained(pair, tmp_path):
    def refused(message, changes, **settings):
        with pytest.raises(InputError, match=message):
            distillation(pair, tmp_path, trainer=changes, **settings)

    refused("rewards need completions to compare", {"reward_funcs": digits})
    refused("must be functions here, got 'a/reward-model'", {"reward_funcs": "a/reward-model"}, num_generations=2)
    refused("must be functions here, got Linear", {"reward_funcs": torch.nn.Linear(1, 1)}, num_generations=2)
    refused("teacher_model is missing", {"teacher_model": None})
    refused("no causal language model there", {"teacher_model": str(tmp_path / "nothing")})
    with pytest.raises(InputError, match="args must be a CMDPDistillationConfig"):
        CMDPDistillationTrainer(pair["student"], pair["teacher"], train_dataset=prompts())

    def short(completions, **_):
        return [0.0]

    trainer = distillation(pair, tmp_path, num_generations=2, trainer={"reward_funcs": short})
    with pytest.raises(InputError, match="reward function short returned 1 rewards for 4 completions"):
        trainer.train()

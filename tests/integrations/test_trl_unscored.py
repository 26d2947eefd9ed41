"""Completions that no reward function has an opinion on: TRL's baseline and loss without a budget, the constraint alone
with one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from trl_pair import digits, distillation, grpo, logged, trained
from two_processes import in_two_processes

from cmdp_fast import objective
from cmdp_fast.credit import task_rewards
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.trl.advantage import position_advantages, sequence_advantages
from cmdp_fast.integrations.trl.scoring import TRLScoring

ROUNDING = {"abs": 1e-5, "rel": 1e-5}  # that of test_trl_grpo.py
SCALES = ("group", "batch", "none")
ALONE = SimpleNamespace(num_processes=1, process_index=0)
NOTHING = {"budget": math.inf}
# Two groups have all kinds of members; one has a single scored one, one has none.
GIVEN = [1.0, 0.0, 0.0, None, 0.5, None, 0.25, None, None, 2.0, None, None, None, None, None, None]


def pattern(completions, **_):
    return [GIVEN[i % len(GIVEN)] for i in range(len(completions))]


def other(completions, **_):
    """An opinion on some completions that `pattern` has none on, and none on some on which it has one."""
    return [None if i % 3 else 1.0 - i for i in range(len(completions))]


def seldom(completions, **_):
    """By what was sampled, so the groups have any number of scored members."""
    return [None if "A" in text[:2] else digits([text])[0] for text in completions]


def first_letter(completions, **_):
    return [None if text[:1].isdigit() else float(len(text)) for text in completions]


FUNCTIONS = {
    "one": ({"reward_funcs": pattern}, {}),
    "two": ({"reward_funcs": [pattern, other]}, {"reward_weights": [2.0, -0.5]}),
}


def generated(make, pair, folder, functions, **changes):
    """A trainer and its first batch."""
    arguments, settings = functions
    trainer = make(pair, folder, trainer=arguments, **{"per_device_train_batch_size": 16, **settings, **changes})
    trainer.model.train()
    return trainer, trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_advantages_metrics_and_table_are_trls(pair, tmp_path, scale, functions):
    theirs, expected = generated(grpo, pair, tmp_path, functions, plain=True, scale_rewards=scale)
    ours, found = generated(grpo, pair, tmp_path, functions, scale_rewards=scale, **NOTHING)
    mask = found["completion_mask"].bool()
    advantages = expected["advantages"]
    assert torch.equal(found["completion_ids"], expected["completion_ids"])
    assert advantages.any() and not advantages.all()
    torch.testing.assert_close(found["advantages"], torch.where(mask, advantages[:, None], 0.0), atol=1e-5, rtol=1e-5)
    assert torch.equal(found["advantages"].any(1), advantages != 0)  # 0, and not nearly so
    assert list(ours._logs["advantages"]) == pytest.approx(list(theirs._logs["advantages"]), **ROUNDING)
    for name, values in theirs._metrics["train"].items():
        if "reward" in name:
            assert ours._metrics["train"][name] == pytest.approx(values, nan_ok=True), name


@pytest.mark.parametrize(("scale", "best"), [("group", 1.1545005), ("batch", None), ("none", 2 / 3)])
def test_rewards_of_1_0_0_and_none(pair, tmp_path, scale, best):
    """The deviation of 1, 0, 0 is 1/sqrt(3), and that of their double repetition sqrt(4/15)."""
    best = 2 / 3 / (math.sqrt(4 / 15) + 1e-4) if best is None else best
    given = {"reward_funcs": lambda completions, **_: [[1.0, 0.0, 0.0, None][i % 4] for i in range(len(completions))]}
    settings = {"per_device_train_batch_size": 8, "scale_rewards": scale, **NOTHING}
    _, batch = generated(grpo, pair, tmp_path, (given, {}), **settings)
    expected = torch.tensor([best, -best / 2, -best / 2, 0.0] * 2)
    torch.testing.assert_close(batch["advantages"][:, 0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("functions", [[seldom], [seldom, first_letter]], ids=["one", "two"])
@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["TRL's loss", "ours"])
@pytest.mark.parametrize("scale", SCALES)
def test_training_is_trls_step_by_step(pair, tmp_path, scale, weight, functions):
    changes = {"scale_rewards": scale, "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    changes |= {"trainer": {"reward_funcs": functions}, "reward_weights": [1.0, -0.3][: len(functions)]}
    theirs = trained(grpo, pair, tmp_path, plain=True, **changes)
    ours = trained(grpo, pair, tmp_path, discrepancy_weight=weight, **NOTHING, **changes)
    for name in ("loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std"):
        expected = logged(theirs, name)
        assert len(expected) == 8, name
        assert logged(ours, name) == pytest.approx(expected, **ROUNDING), name
    assert any(map(abs, logged(ours, "loss")))


def test_position_by_position_an_unscored_completion_is_worth_nothing(pair, tmp_path):
    _, batch = generated(
        grpo, pair, tmp_path, FUNCTIONS["one"], scale_rewards="none", baseline="position_rloo", **NOTHING
    )
    scored = torch.tensor([value is not None for value in GIVEN])
    alone = torch.tensor([value == 2.0 for value in GIVEN])
    assert not batch["advantages"][~scored | alone].any()
    mask = batch["completion_mask"].bool()
    score = torch.where(mask, torch.tensor([value or 0.0 for value in GIVEN])[:, None], 0.0)
    expected = objective.position_rloo(score[:3], 3, mask[:3])
    torch.testing.assert_close(batch["advantages"][:3], expected)


@pytest.mark.parametrize("scale", SCALES)
def test_under_a_budget_the_constraint_acts_on_an_unscored_completion(pair, tmp_path, monkeypatch, scale):
    """It is compared with the modified returns of the scored ones, its own task reward being their mean."""
    accounts = []
    account = TRLScoring.account
    monkeypatch.setattr(
        TRLScoring, "account", lambda *given, **named: accounts.append(account(*given, **named)) or accounts[0]
    )
    _, batch = generated(grpo, pair, tmp_path, FUNCTIONS["one"], scale_rewards=scale)
    returns, violated = accounts[0].reward.sum(1), accounts[0].trace.violated.any(1)
    scored = torch.tensor([value is not None for value in GIVEN])
    assert violated[~scored].any() and not violated.all()
    all_scored = returns[scored]
    for first in range(0, 16, 4):
        group = slice(first, first + 4)
        compared = scored[group] if scored[group].any() else torch.ones(4, dtype=torch.bool)
        chosen = returns[group][compared]
        divisor = {
            "group": chosen.std() + 1e-4 if len(chosen) > 1 else torch.tensor(1.0),
            "batch": all_scored.std() + 1e-4,
            "none": torch.tensor(1.0),
        }[scale]
        expected = (returns[group] - chosen.mean()) / divisor
        torch.testing.assert_close(batch["advantages"][group, 0], expected, atol=1e-5, rtol=1e-5)
        direct = batch["direct"][group, 0] * divisor
        torch.testing.assert_close(direct, violated[group].float(), atol=1e-5, rtol=1e-5)
    assert batch["advantages"].isfinite().all()
    assert batch["advantages"][~scored].any()


def test_the_distillation_trainer_leaves_them_out_too(pair, tmp_path):
    changes = {"num_generations": 4, "per_device_train_batch_size": 16}
    trainer, batch = generated(distillation, pair, tmp_path, FUNCTIONS["one"], **changes)
    expected = torch.tensor([1.0, -0.5, -0.5, 0.0, 0.25, 0.0, -0.25] + [0.0] * 9)
    torch.testing.assert_close(batch["advantages"][:, 0], expected)
    scored = torch.tensor([value for value in GIVEN if value is not None])
    assert trainer._metrics["train"]["reward"] == pytest.approx([scored.mean().item()])
    assert trainer._metrics["train"]["reward_std"] == pytest.approx([scored.std().item()])


# ------------------------------------------------------------------------------------- groups over processes


def compared(accelerator, rows: slice) -> list[torch.Tensor]:
    """The advantages of some of the completions of GIVEN, in groups within a process and in one spread over all."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([[math.nan if value is None else value] for value in GIVEN])
    score = torch.randn(16, 5, generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (16, 1), generator=generator)
    found: list[torch.Tensor] = []
    for size in (4, 16):
        task = task_rewards(rewards, torch.ones(1), size)
        given = score[rows].sum(1), task.scored, mask[rows], size, accelerator
        for scale in SCALES:
            found += sequence_advantages(*given, baseline="grpo", scale_rewards=scale)
        found += sequence_advantages(*given, baseline="rloo")
        found.append(position_advantages(score[rows], task, mask[rows], size, accelerator))
    return found


def same_as_alone(expected: list[torch.Tensor]) -> None:
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    rows = slice(8 * accelerator.process_index, 8 * accelerator.process_index + 8)
    for ours, whole in zip(compared(accelerator, rows), expected, strict=True):
        assert torch.equal(ours, whole[rows])


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo")
def test_two_processes_agree_with_one():
    try:
        in_two_processes(same_as_alone, compared(ALONE, slice(0, 16)))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", [grpo, distillation])
def test_an_infinite_reward_is_refused(kind, pair, tmp_path):
    """Advantages of its group, and with `scale_rewards="batch"` of the whole batch, were NaN."""

    def infinite(completions, **_):
        return [-math.inf, *[1.0] * (len(completions) - 1)]

    trainer = kind(pair, tmp_path, trainer={"reward_funcs": infinite}, num_generations=4)
    with pytest.raises(InputError, match="returned an infinite reward"):
        trainer.train()

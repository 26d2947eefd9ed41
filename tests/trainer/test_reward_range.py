"""The unit of what the constraint charges: a run learns the same whatever the task's reward is multiplied by."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pair import learner_of, settings

from cmdp_fast.trainer.reward_range import RewardRange
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.settings.constraint import price_within, training_constraint
from cmdp_fast.trainer.settings.unread import READERS

ALONE = SimpleNamespace(gather=lambda ends: ends)
MEASURED = {"reward_unit": "auto", "budget_price": 0.5}
BUDGETED = ("cmdp", "hinge", "saute", "barrier", "pid", "worst_case")


def seen(*batches: list[float], accelerator=ALONE) -> RewardRange:
    found = RewardRange()
    for batch in batches:
        found.see(torch.tensor(batch), accelerator)
    return found


# ------------------------------------------------------------------------------------- the range


def test_it_grows_and_does_not_shrink():
    found = seen([1.0, 3.0], [], [2.0])
    assert (found.low, found.high) == (1.0, 3.0)
    assert found.share(torch.tensor([1.0, 2.0, 3.0])).tolist() == [0.0, 0.5, 1.0]
    found.see(torch.tensor([-1.0]), ALONE)
    assert found.share(torch.tensor([-1.0, 1.0, 3.0])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("batches", [[[]], [[7.0, 7.0]], [[7.0, 7.000001]]])
def test_equal_rewards_are_worth_nothing(batches):
    assert seen(*batches).share(torch.tensor([7.0, 7.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ends", [(-3e38, 3e38), (0.0, 1e-44), (1e8, 1e8 + 8192)])
def test_a_range_of_any_size(ends):
    rewards = torch.tensor([*ends, ends[0]])
    assert seen(rewards.tolist()).share(rewards).tolist() == [0.0, 1.0, 0.0]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2), st.sampled_from([2.0**-9, 0.5, 4.0, 2.0**11]))
def test_a_scale_changes_no_share(rewards, scale):
    """Of a power of two to the last bit: a float's exponent is all that it changes. Subnormal numbers lose theirs."""
    rewards = [0.0 if abs(r) < 1e-30 else r for r in rewards]
    share = seen(rewards).share(torch.tensor(rewards))
    assert ((share >= 0) & (share <= 1)).all()
    if max(rewards) - min(rewards) > 1e-4 * max(map(abs, rewards)):
        assert share.min() == 0.0 and share.max() == 1.0
    scaled = torch.tensor(rewards) * scale
    assert torch.equal(seen(scaled.tolist()).share(scaled), share)


def test_all_processes_have_one_range():
    """Each sees its own completions, and gathers the ends of all."""
    ends = [torch.tensor([0.5, -0.75]), torch.tensor([-2.0, -0.25])]
    found = seen([0.5, 0.75], accelerator=SimpleNamespace(gather=lambda own: torch.cat([own, ends[1]])))
    assert (found.low, found.high) == (-2.0, 0.75)


def test_it_is_the_same_after_a_checkpoint():
    for found in (RewardRange(), seen([1.0, 3.0])):
        again = RewardRange()
        again.load_state_dict(found.state_dict())
        assert (again.low, again.high) == (found.low, found.high)


# ------------------------------------------------------------------------------------- in a run


def lengths(prompts, completions, **kwargs) -> list[float]:
    return [float(len(text)) - 40.0 for text in completions]


def trained(pair, **changes) -> tuple[list[torch.Tensor], list[dict]]:
    """The student's parameters after two steps, and their metrics; the rewards are negative and differ."""
    config = settings(pair, **(MEASURED | {"budget": 2.0, "max_grad_norm": 1e9} | changes))
    torch.manual_seed(3)
    learner, rows, prompts = learner_of(config, lengths=lengths)
    metrics = [learner.step(rows, prompts) for _ in range(2)]
    return [p.detach().clone() for p in learner.student.parameters()], metrics


def of_kind(kind: str) -> dict:
    changes: dict = {"kind": kind}
    if kind == "worst_case":
        changes |= {"cost": "nll", "prefix_budget": 3.0}
    if kind == "barrier":
        changes |= {"coefficient": 0.3}
    return changes


@pytest.mark.parametrize("kind", BUDGETED)
def test_a_run_is_the_same_whatever_the_reward_is_multiplied_by(kind, pair):
    plain, metrics = trained(pair, **of_kind(kind))
    large, of_large = trained(pair, **of_kind(kind), reward_weights=(256.0,))
    assert all(map(torch.equal, plain, large))
    assert of_large[0]["cmdp/reward_high"] == 256 * metrics[0]["cmdp/reward_high"]
    assert of_large[0]["reward"] == pytest.approx(256 * metrics[0]["reward"])
    assert of_large[1]["cmdp/modified_reward"] == metrics[1]["cmdp/modified_reward"]
    other, _ = trained(pair, **of_kind(kind), reward_weights=(256.0,), reward_unit="one")
    assert not all(map(torch.equal, plain, other))


def test_a_soft_weight_is_in_units_of_the_reward_itself(pair):
    """As other trainers' beta is; in those of the range if it is asked for."""
    soft = {"kind": "lagrangian", "coefficient": 0.5}
    plain, _ = trained(pair, **soft)
    literal, _ = trained(pair, **soft, reward_unit="one")
    large, _ = trained(pair, **soft, reward_weights=(256.0,))
    assert all(map(torch.equal, plain, literal)) and not all(map(torch.equal, plain, large))
    in_range, of_large = (trained(pair, **soft, reward_unit="range", reward_weights=(w,))[0] for w in (1.0, 256.0))
    assert all(map(torch.equal, in_range, of_large))


def test_a_run_that_goes_on_has_the_range(pair):
    config = settings(pair, **MEASURED)
    first, rows, prompts = learner_of(config, lengths=lengths)
    metrics = first.step(rows, prompts)
    second, _, _ = learner_of(config, lengths=lengths)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    ends = first.method.reward_range.state_dict()
    assert ends["low"] < ends["high"] and second.method.reward_range.state_dict() == ends
    assert (metrics["cmdp/reward_low"], metrics["cmdp/reward_high"]) == (ends["low"], ends["high"])


@pytest.mark.parametrize("kind", ["cmdp", "saute"])
def test_a_violation_gains_nothing_where_rewards_are_negative(kind, pair):
    """A completion that loses a reward of -30 has gained 30; that of the worst completion is 0."""
    config = settings(pair, **MEASURED | {"kind": kind, "budget": 2.0, "budget_price": 0.0, "reward_unit": "one"})
    returns = {}
    for unit in ("one", "range"):
        torch.manual_seed(3)
        learner, rows, prompts = learner_of(dataclasses.replace(config, reward_unit=unit), lengths=lengths)
        groups = ([item for item in items for _ in range(4)] for items in (rows, prompts))
        experience = learner.method.collect(*groups, learner.constraint())
        over = experience.trace.violated.any(1)
        assert over.any() and not over.all()
        returns[unit] = experience.reward.sum(1)[over].max(), experience.reward.sum(1)[~over].min()
    assert returns["one"][0] > returns["one"][1]
    assert returns["range"][0] <= -1.0 < 0.0 <= returns["range"][1]


# ------------------------------------------------------------------------------------- the price of the budget


def test_the_whole_budget_costs_its_price():
    for kind in ("cmdp", "hinge"):
        assert training_constraint(TrainConfig(kind=kind, budget=4.0), 0).coefficient == 0.5 / 4.0
    for_each = TrainConfig(budget=0.25, budget_per_token=True, max_new_tokens=16, budget_price=2.0)
    assert training_constraint(for_each, 0).coefficient == 2.0 / 4.0
    falling = TrainConfig(budget=2.0, budget_start=20.0, budget_steps=10)
    assert training_constraint(falling, 0).coefficient == training_constraint(falling, 10).coefficient == 0.25


def test_other_kinds_have_no_such_price():
    expected = {"saute": None, "worst_case": None, "lagrangian": 0.7, "barrier": 0.7, "pid": 0.2}
    for kind, coefficient in expected.items():
        config = TrainConfig(kind=kind, coefficient=0.7, **({"cost": "nll"} if kind == "worst_case" else {}))
        assert training_constraint(config, 0, multiplier=0.2).coefficient == coefficient
    reader = next(reader for reader in READERS if "budget_price" in reader.settings)
    assert [kind for kind in BUDGETED if reader.reads(TrainConfig(kind=kind))] == ["cmdp", "hinge"]


def test_it_is_paid_within_the_budget_too(pair):
    """By every completion, in the reward and in the gradient through the divergence."""
    config = settings(pair, **MEASURED | {"kind": "hinge", "budget": 1000.0, "budget_price": 50.0})
    torch.manual_seed(3)
    learner, rows, prompts = learner_of(config, lengths=lengths)
    groups = ([item for item in items for _ in range(4)] for items in (rows, prompts))
    constraint = learner.constraint()
    experience = learner.method.collect(*groups, constraint)
    mask = experience.rollout.mask
    share = learner.method.reward_range.share(experience.task_reward)
    paid = share - 0.05 * experience.cost(constraint).sum(1)
    torch.testing.assert_close(experience.reward.sum(1), paid)
    direct = learner.method.targets(experience, constraint)["direct"]
    torch.testing.assert_close(direct, torch.where(mask, 0.05, 0.0))


def test_with_no_weight_of_the_excess_it_is_a_lagrangians(pair):
    price, _ = trained(pair, kind="hinge", discrepancy_weight=0.0, budget_price=3.0)
    soft, _ = trained(pair, kind="lagrangian", coefficient=1.5, reward_unit="range")
    assert all(map(torch.equal, price, soft))


@pytest.mark.parametrize(
    ("changes", "price"),
    [
        ({}, 0.25),
        ({"kind": "hinge"}, 0.25),
        ({"budget_price": 0.0}, 0.0),
        ({"budget_per_token": True, "max_new_tokens": 10}, 0.025),
        ({"kind": "lagrangian", "coefficient": 0.5}, 0.0),
        ({"algorithm": "gkd"}, 0.0),
    ],
)
def test_the_price_that_a_run_says_at_its_start(changes, price, pair):
    config = settings(pair, **(MEASURED | {"budget": 2.0} | changes))
    assert price_within(config) == pytest.approx(price)

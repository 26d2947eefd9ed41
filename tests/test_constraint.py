"""A constraint as a value: checked once, its kinds in one table, taken by every operation in place of keywords."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from helpers import make_logits, make_tokens

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.constraint import KINDS, AccountSettings, ConstraintSettings, RewardSettings
from cmdp_fast.layout import BudgetRule, RewardRule


def completions() -> tuple[torch.Tensor, ...]:
    x, y = make_logits(2, 6, 11), make_logits(2, 6, 11, seed=1)
    return x, y, make_tokens(2, 6, vocab=11), make_logits(2, 6, scale=1.0, seed=2)


HELD = cf.Constraint(budget=1.5, penalty=0.5, discrepancy_weight=2.0, gamma=0.5, edge="saute", per_token=True)
KEYWORDS = {f.name: getattr(HELD, f.name) for f in dataclasses.fields(HELD)}


def test_a_constraint_gives_bitwise_what_its_keywords_give() -> None:
    x, y, tokens, task = completions()
    whole, apart = (cf.constrained_reward(x, y, tokens, task, **given) for given in ({"constraint": HELD}, KEYWORDS))
    for one, other in zip((*whole.trace, whole.reward), (*apart.trace, apart.reward), strict=True):
        assert torch.equal(one, other)
    cost = cf.token_cost(whole.stats)
    trace = cf.budget_trace(cost, constraint=HELD)
    assert all(torch.equal(a, b) for a, b in zip(trace, whole.trace, strict=True))
    assert torch.equal(cf.modified_reward(task, cost, trace, constraint=HELD), whole.reward)
    account = {name: KEYWORDS[name] for name in ("budget", *AccountSettings.__annotations__)}
    assert torch.equal(cf.budget_trace(cost, **account).excess, trace.excess)
    paid = {name: KEYWORDS[name] for name in RewardSettings.__annotations__}
    assert torch.equal(cf.modified_reward(task, cost, trace, **paid), whole.reward)
    hidden, weight = make_logits(2, 6, 4), make_logits(11, 4, seed=5)
    linear = (hidden, weight, hidden + 1, weight, tokens, task)
    rewards = [cf.linear_constrained_reward(*linear, **given).reward for given in ({"constraint": HELD}, KEYWORDS)]
    assert torch.equal(*rewards)


def test_both_a_constraint_and_one_of_its_fields_is_an_error() -> None:
    x, y, tokens, task = completions()
    cost, hidden, weight = torch.rand(2, 6), make_logits(2, 6, 4), make_logits(11, 4)
    trace = cf.budget_trace(cost, constraint=HELD)
    calls = {
        "budget_trace": (lambda **k: cf.budget_trace(cost, **k), AccountSettings),
        "modified_reward": (lambda **k: cf.modified_reward(task, cost, trace, **k), RewardSettings),
        "constrained_reward": (lambda **k: cf.constrained_reward(x, y, tokens, task, **k), ConstraintSettings),
        "linear_constrained_reward": (
            lambda **k: cf.linear_constrained_reward(hidden, weight, hidden, weight, tokens, task, **k),
            ConstraintSettings,
        ),
    }
    for name, (call, settings) in calls.items():
        call(constraint=HELD)
        budget = [] if name == "modified_reward" else ["budget"]
        for field in (*settings.__annotations__, *budget):
            with pytest.raises(TypeError, match=rf"{name}\(\) got constraint= and, of its fields, also {field};"):
                call(constraint=HELD, **{field: KEYWORDS[field] or 1.0})
        with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'penalti'"):
            call(penalti=2.0)
        if not budget:  # its trace has been kept against one
            with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'budget'"):
                call(budget=1.0)
        with pytest.raises(TypeError, match=r"constraint must be a cmdp_fast\.Constraint, got float 1.0"):
            call(constraint=1.0)
        if budget:
            with pytest.raises(TypeError, match=rf"{name}\(\) needs a budget, or constraint="):
                call()


def test_the_fields_are_those_of_the_keywords() -> None:
    assert {f.name for f in dataclasses.fields(cf.Constraint)} == {"budget", *ConstraintSettings.__annotations__}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"kind": "ppo"}, ValueError, "kind='ppo' is unknown; expected one of cmdp, hinge, saute"),
        ({"cost": "kl"}, ValueError, "cost='kl' is unknown; expected one of reverse_kl, forward_kl, jsd"),
        ({"budget": -1.0}, ValueError, "budget must be at least 0, got -1.0"),
        ({"budget": float("nan")}, ValueError, "budget must be at least 0, got nan"),
        ({"budget": "2"}, TypeError, "budget must be a number, got str '2'"),
        ({"budget": True}, TypeError, "budget must be a number, got bool True"),
        ({"penalty": -1.0}, ValueError, "penalty must be finite and not negative, got -1.0"),
        ({"penalty": None}, TypeError, "penalty must be a number"),
        ({"discrepancy_weight": float("inf")}, ValueError, "discrepancy_weight must be finite"),
        ({"barrier_slope": float("nan")}, ValueError, "barrier_slope must be finite"),
        ({"kind": "lagrangian", "coefficient": -1.0}, ValueError, "coefficient must be finite and not negative"),
        ({"kind": "lagrangian"}, ValueError, "kind='lagrangian' needs coefficient="),
        ({"kind": "saute", "coefficient": 1.0}, ValueError, "kind='saute' has no coefficient, got coefficient=1.0"),
        ({"kind": "hinge", "penalty_at": "every"}, ValueError, "kind='hinge' has no penalty, so penalty_at='every'"),
        ({"penalty_at": "end"}, ValueError, "penalty_at='end' is unknown; expected one of crossing, every"),
        ({"gamma": 0.0}, ValueError, r"gamma must lie in \(0, 1\], got 0.0"),
        ({"gamma": 0.9, "reduction": "mean"}, ValueError, "reduction='mean' takes no discount, got gamma=0.9"),
        ({"reduction": "max"}, ValueError, "reduction='max' is unknown; expected one of sum, mean"),
        ({"edge": "soft"}, ValueError, "edge='soft' is unknown; expected one of strict, saute"),
        ({"beta": 2.0}, ValueError, r"beta must lie in \[0, 1\], got 2.0"),
        ({"per_token": "no"}, TypeError, "per_token must be a bool, got str 'no'"),
        ({"budget": torch.zeros(2, dtype=torch.complex64)}, TypeError, "budget must be real, got complex64"),
        ({"cost": "k3", "cost_clamp": 0.0}, ValueError, "cost_clamp must be positive and finite, got 0.0"),
        ({"cost": "k3", "cost_clamp": True}, TypeError, "cost_clamp must be a number, got bool True"),
        (
            {"cost_clamp": 5.0},
            ValueError,
            "cost_clamp=5.0 with cost='reverse_kl': where it takes effect",
        ),
        ({"kind": "worst_case", "cost": "k1"}, ValueError, "defined for cost='nll' and reduction='mean', got 'k1'"),
    ],
)
def test_a_wrong_field_is_an_error_where_the_constraint_is_made(change, error, message) -> None:
    with pytest.raises(error, match=message):
        cf.Constraint(**({"budget": 1.0} | change))


def test_what_a_kind_tells() -> None:
    for kind, is_a in KINDS.items():
        priced = {"coefficient": 0.25} if is_a.coefficient else {}
        held = cf.Constraint(budget=1, kind=kind, **priced)
        assert held.is_a is is_a and held.price == (0.25 if priced else 0.0)
        assert (held.cost, held.reduction) == (("nll", "mean") if kind == "worst_case" else ("reverse_kl", "sum"))
        assert held.action_dependent == (kind == "worst_case")
        assert held.at_crossing == (kind == "cmdp")
        assert dataclasses.replace(held, budget=3.0).budget == 3.0  # a default is not taken for a choice
    assert cf.Constraint(budget=1.0, penalty_at="every").at_crossing is False
    assert HELD.budget_rule == BudgetRule(0.5, False, True)
    assert HELD.reward_rule == RewardRule("cmdp", True, 0.5, 2.0, 0.0, 10.0)


def test_constraints_are_equal_where_their_fields_are() -> None:
    each = [cf.Constraint(budget=torch.tensor([1.0, 2.0])) for _ in range(2)]
    assert each[0] == each[1] and hash(each[0]) == hash(each[1]) and copy.deepcopy(each[0]) == each[0]
    assert each[0] != cf.Constraint(budget=torch.tensor([1.0, 3.0])) and each[0] != cf.Constraint(budget=1.0)
    assert cf.Constraint(**KEYWORDS) == HELD and dataclasses.replace(HELD, gamma=0.25) != HELD
    assert HELD in [each[0], HELD] and HELD != "cmdp" and pickle.loads(pickle.dumps(HELD)) == HELD


def test_another_kind_takes_its_own_cost_where_it_is_asked_to() -> None:
    worst = dataclasses.replace(cf.Constraint(budget=1.0), kind="worst_case", cost=None, reduction=None)
    assert (worst.cost, worst.reduction) == ("nll", "mean")
    # As the docstring has it, which type checkers accept
    assert worst == dataclasses.replace(cf.Constraint(budget=1.0), kind="worst_case", cost="nll", reduction="mean")
    with pytest.raises(ValueError, match="defined for cost='nll' and reduction='mean', got 'reverse_kl' and 'sum'"):
        dataclasses.replace(cf.Constraint(budget=1.0), kind="worst_case")


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_says_of_the_reward_what_the_reference_does(kind) -> None:
    """Which tokens keep the task's reward, and whether a penalty is paid: read off the reference's own rewards."""
    held = cf.Constraint(
        budget=1.0, kind=kind, penalty=4.0, **({"coefficient": 0.0} if KINDS[kind].coefficient else {})
    )
    cost = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    trace = reference.budget_trace(cost, 1.0)
    settings = {"kind": kind, "penalty": 4.0, "discrepancy_weight": 0.0, "coefficient": 0.0, "barrier_slope": 0.0}
    with_reward, without = (
        reference.modified_reward(task, cost, trace, **settings)
        for task in (torch.ones_like(cost), torch.zeros_like(cost))
    )
    kept = {"always": [1, 1, 1, 1], "feasible": [1, 1, 0, 0], "inside": [1, 0, 0, 0]}[held.is_a.task_reward]
    assert torch.equal(with_reward - without, torch.tensor([kept], dtype=torch.float64))
    assert bool((without == -4.0).any()) == held.is_a.penalised


def test_saute_warns_where_its_penalty_has_no_gradient() -> None:
    x, y, tokens, task = completions()
    with pytest.warns(UserWarning, match="no direct gradient") as caught:
        cf.constrained_reward(x, y, tokens, task, constraint=cf.Constraint(budget=1.0, kind="saute"))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="no direct gradient") as caught:
        cf.constrained_reward(x, y, tokens, task, 1.0, kind="saute")
    assert caught[0].filename == __file__


def test_a_compiled_graph_takes_a_constraint() -> None:
    x, y, tokens, task = completions()
    each = cf.Constraint(budget=torch.tensor([0.5, 5.0]), cost="k1")
    for held in (HELD, each):

        def reward(x: torch.Tensor) -> torch.Tensor:
            return cf.constrained_reward(x, y, tokens, task, constraint=held).reward  # noqa: B023

        assert torch.equal(torch.compile(reward, fullgraph=True, backend="aot_eager")(x), reward(x))


def test_a_value_that_is_equal_to_a_good_one_is_still_refused() -> None:
    """Constraints of keywords are made once. True is equal to 1, and neither a discount nor a budget; 1 is no bool."""
    cost = torch.ones(1, 2)
    cf.budget_trace(cost, 1.0, gamma=1.0, per_token=True)
    for budget, settings in ((True, {}), (1.0, {"gamma": True}), (1.0, {"per_token": 1})):
        with pytest.raises(TypeError, match="must be a"):
            cf.budget_trace(cost, budget, **({"gamma": 1.0, "per_token": True} | settings))

"""The controller of the multiplier: the worked numbers, and the states that it takes."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from worked import EXAMPLE

from cmdp_fast import objective


def test_pid_of_the_vectors() -> None:
    data = EXAMPLE["pid"]
    controller = objective.PIDController(
        **{name: data[name] for name in ("kp", "ki", "kd", "d_delay", "ema_p", "ema_d", "initial_integral")}
    )
    assert controller == objective.PIDController()
    for cost, expected in zip(data["mean_cost"], data["lambda"], strict=True):
        assert controller.update(cost, data["budget"]) == pytest.approx(expected, abs=1e-12)
    assert controller.coefficient == pytest.approx(data["lambda"][-1], abs=1e-12)


def test_pid_derivative_looks_back_by_its_delay() -> None:
    controller = objective.PIDController(kp=0.0, ki=0.0, kd=1.0, ema_d=0.0, d_delay=2, initial_integral=0.0)
    costs = [3.0, 5.0, 6.0, 6.0, 1.0, 8.0]
    assert [controller.update(cost, 0.0) for cost in costs] == [3.0, 5.0, 3.0, 1.0, 0.0, 2.0]


def test_pid_neither_saves_up_nor_rewards_a_fall() -> None:
    controller = objective.PIDController(kp=0.0, ki=1.0, kd=0.0, initial_integral=0.0)
    assert [controller.update(cost, 5.0) for cost in (0.0, 6.0)] == [0.0, 1.0]
    controller = objective.PIDController(kp=0.0, ki=1.0, kd=1.0, ema_d=0.0, d_delay=1, initial_integral=0.0)
    assert [controller.update(cost, 0.0) for cost in (10.0, 0.0)] == [20.0, 10.0]


def test_pid_continues_from_its_state() -> None:
    original, resumed = objective.PIDController(d_delay=3), objective.PIDController(d_delay=3)
    costs = torch.tensor([30.0, 20.0, 40.0, 35.0, 10.0, 26.0])
    for cost in costs[:4]:
        original.update(cost, 25.0)
    resumed.load_state_dict(original.state_dict())
    assert resumed.coefficient == original.coefficient
    assert [resumed.update(c, 25.0) for c in costs[4:]] == [original.update(c, 25.0) for c in costs[4:]]


def test_pid_rejects_what_would_spoil_its_state() -> None:
    controller = objective.PIDController()
    before = controller.state_dict()
    for cost in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            controller.update(cost, 25.0)
    with pytest.raises(ValueError, match="expected"):
        controller.load_state_dict({"integral": 0.0})
    assert controller.state_dict() == before
    with pytest.raises(ValueError, match="d_delay=0"):
        objective.PIDController(d_delay=0)


def test_pid_state_is_of_plain_floats_whatever_it_was_given() -> None:
    """So that a checkpoint takes it as JSON, and it is taken back."""
    numbers = np.float32(0.5), np.float64(0.25), torch.tensor(0.125)
    for kp, budget in itertools.product(numbers, numbers):
        controller = objective.PIDController(kp=kp, ki=kp, kd=kp, initial_integral=kp)
        controller.update(torch.tensor(3.0), budget)
        state = controller.state_dict()
        assert {type(value) for value in (*state.values(), *state["past_costs"])} == {float, list}
        objective.PIDController().load_state_dict(json.loads(json.dumps(state)))


@pytest.mark.parametrize("kind", [torch.tensor, np.float32, np.float64, int])
def test_pid_takes_the_states_of_earlier_versions(kind: Any) -> None:
    """They held what the controller was given, which `torch.save` keeps."""
    controller = objective.PIDController()
    state = {name: kind(2.0) for name in controller.state_dict()} | {"past_costs": [kind(0.0), kind(1.0)]}
    controller.load_state_dict(state)
    now = controller.state_dict()
    assert now == {**dict.fromkeys(now, 2.0), "past_costs": [0.0, 1.0]}
    assert {type(value) for value in (controller.coefficient, controller._integral, *controller._past_costs)} == {float}


ODD = [None, True, "1", [], [1.0], math.nan, math.inf, 10**400, torch.tensor([1.0, 2.0]), torch.tensor(True)]
ODD += [np.bool_(True), torch.tensor(math.nan), torch.empty((), device="meta"), 1j]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("name", ["integral", "ema_delta", "past_costs", "coefficient"])
def test_a_state_of_anything_else_is_refused(name: str, value: Any) -> None:
    if name == "past_costs" and isinstance(value, list) and value == [1.0]:
        value = [[1.0]]
    controller = objective.PIDController()
    with pytest.raises(ValueError, match=name):
        controller.load_state_dict({**controller.state_dict(), name: value})

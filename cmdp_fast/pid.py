"""The controller that chooses lambda for ``kind="pid"`` (Stooke, Achiam and Abbeel, ICML 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.errors import InputError


@dataclass
class PIDController:
    """Lambda from a PID controller on mean(C_T) - budget (Stooke, Achiam and Abbeel, ICML 2020).

    The gains multiply nats; the defaults suit costs of tens of nats per sequence. ``coefficient`` holds the current
    lambda, before the first update max(0, initial_integral). Update it by the costs of a batch before the policy is
    updated with that batch, as in the source's algorithm 1: lambda then follows from the costs that it weighs.
    Proportional term and derivative act on exponential moving averages (``ema_p``, ``ema_d``: the weight of the past)
    that start at 0; the derivative compares the averaged cost with that of ``d_delay`` updates ago and, as the
    integral, never goes below 0. Raises ValueError for a ``d_delay`` below 1.
    """

    kp: float = 0.1
    ki: float = 0.01
    kd: float = 0.01
    d_delay: int = 10
    ema_p: float = 0.95
    ema_d: float = 0.95
    initial_integral: float = 0.001
    coefficient: float = field(init=False)

    def __post_init__(self) -> None:
        if self.d_delay < 1:
            raise ValueError(f"d_delay={self.d_delay}, expected at least 1")
        self._integral = self.initial_integral
        self._ema_delta = 0.0
        self._ema_cost = 0.0
        self._past_costs = [0.0]
        self.coefficient = max(0.0, self.initial_integral)

    def update(self, mean_cost: float | Tensor, budget: float) -> float:
        """One step; the new lambda.

        Args:
            mean_cost: the mean cumulative cost of a batch, a number or a scalar tensor, in nats.
            budget: that of a completion, in nats; the mean of a batch where each has its own, as with a budget per
                token: d times the mean length.

        Raises:
            InputError: a cost or budget that is not finite.
        """
        cost = float(mean_cost)
        if not math.isfinite(cost):
            raise InputError(
                f"kind pid: the mean cost of the completions is {cost} nats, from which no lambda follows; it is "
                "infinite where the teacher excludes a token that the student uses"
            )
        delta = cost - budget
        if not math.isfinite(delta):
            raise InputError(f"kind pid: the budget is {budget} nats, expected a finite number")
        self._integral = max(0.0, self._integral + self.ki * delta)
        self._ema_delta = self.ema_p * self._ema_delta + (1.0 - self.ema_p) * delta
        self._ema_cost = self.ema_d * self._ema_cost + (1.0 - self.ema_d) * cost
        derivative = max(0.0, self._ema_cost - self._past_costs[0])
        self._past_costs = [*self._past_costs, self._ema_cost][-self.d_delay :]
        self.coefficient = max(0.0, self.kp * self._ema_delta + self._integral + self.kd * derivative)
        return self.coefficient

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs (plain floats); the gains belong to the configuration."""
        return {
            "integral": float(self._integral),
            "ema_delta": float(self._ema_delta),
            "ema_cost": float(self._ema_cost),
            "past_costs": [float(cost) for cost in self._past_costs],
            "coefficient": float(self.coefficient),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, or from that of an earlier version, of scalar tensors or numpy's numbers too.

        Raises ValueError for other keys, and for values that are no finite numbers.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state has keys {sorted(state)}, expected {sorted(self.state_dict())}")
        taken: dict[str, list[float]] = {}
        for name, value in state.items():
            numbers = list(value) if isinstance(value, (list, tuple)) else [value]
            if isinstance(value, (list, tuple)) != (name == "past_costs") or not numbers:
                raise ValueError(f"state has another kind of value in {name}")
            taken[name] = [_number(each) for each in numbers]
            if not all(map(math.isfinite, taken[name])):
                raise ValueError(f"state has no finite number in {name}")
        self._past_costs = taken.pop("past_costs")
        of = {name: number for name, [number] in taken.items()}
        self._integral, self._ema_delta, self._ema_cost = of["integral"], of["ema_delta"], of["ema_cost"]
        self.coefficient = of["coefficient"]


def _number(value: Any) -> float:
    """As a float; NaN for what is no number, or one that no float can hold."""
    is_truth = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    if is_truth or not isinstance(value, (Real, Tensor)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # of a tensor of several, or without a value
        return math.nan

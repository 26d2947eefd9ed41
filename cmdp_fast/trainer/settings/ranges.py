"""The numbers that a setting may have: ``Annotated[float, POSITIVE]`` beside the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cmdp_fast.errors import InputError

LARGEST = 2**31 - 1  # of the whole numbers: Python counts no range beyond 2**63, torch and OpenMP take 32 bits


@dataclass(frozen=True)
class Range:
    """The finite numbers for which a condition holds, and the words between the option and another finite number."""

    holds: Callable[[float], bool]
    says: str

    def check(self, option: str, value: float) -> None:
        """Raises InputError, which names the option, for a number outside."""
        if not -math.inf < value < math.inf:  # math.isfinite takes no int beyond a float
            raise InputError(f"{option} must be a finite number, not {value}")
        if not self.holds(value):
            raise InputError(f"{option} {self.says} {value}")


POSITIVE = Range(lambda value: value > 0, "must be a positive number, not")
NOT_NEGATIVE = Range(lambda value: value >= 0, "must not be negative, it is")
ABOVE_0_UP_TO_1 = Range(lambda value: 0 < value <= 1, "must be in (0, 1], not")
FROM_0_TO_1 = Range(lambda value: 0 <= value <= 1, "must be in [0, 1], not")
FROM_0_BELOW_1 = Range(lambda value: 0 <= value < 1, "must be in [0, 1), not")
AT_LEAST_1 = Range(lambda value: value >= 1, "must be at least 1, not")
SEED = Range(lambda value: 0 <= value < 2**31, "must be in [0, 2147483648), not")  # numpy's end at 2^32
ZERO_OR_ONE = Range(lambda value: value in (0, 1), "must be 0 or 1, not")
BETWEEN_0_AND_1 = Range(lambda value: 0 < value < 1, "must be between 0 and 1, not")
# Logits are divided by a temperature, and by what is left of it in float32
TEMPERATURE = Range(lambda value: 1e-30 <= value <= 1e30, "must be in [1e-30, 1e+30], not")
TEMPERATURE_OR_0 = Range(lambda value: value == 0 or 1e-30 <= value <= 1e30, "must be 0 or in [1e-30, 1e+30], not")

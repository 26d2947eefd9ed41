"""What is evaluated, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .ranges import NOT_NEGATIVE, POSITIVE


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, and when."""

    eval_prompts: Annotated[int, POSITIVE] = 256
    """Held-out problems per evaluation; all of them if there are fewer."""
    eval_generations: Annotated[int, POSITIVE] = 1
    """Completions per held-out problem, sampled as in training."""
    eval_every: Annotated[int, NOT_NEGATIVE] = 0
    """Evaluate every so many steps for the curves. 0: only before and after."""

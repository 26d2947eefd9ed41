"""What is evaluated, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .ranges import NOT_NEGATIVE, POSITIVE
from .units import COMPLETIONS, DATA, PROBLEMS, STEPS


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, and when."""

    eval_dataset: Annotated[tuple[str, ...], DATA] = ()
    """Problems to evaluate on in place of a part of the training's: a hub id, a file or a folder, with the columns of
    `dataset`. A training takes one; `cmdp-fast evaluate` any number, each as `NAME=DATASET` or without a name. Of
    several splits it is `eval_split`, or else `test`."""
    eval_prompts: Annotated[int, NOT_NEGATIVE, PROBLEMS] = 256
    """Problems per evaluation, of each set; all of them if there are fewer, or with 0."""
    eval_generations: Annotated[int, POSITIVE, COMPLETIONS] = 1
    """Completions per problem, sampled as in training."""
    eval_every: Annotated[int, NOT_NEGATIVE, STEPS] = 0
    """Evaluate every so many steps for the curves. 0: only before and after."""
    eval_before: bool = True
    """Evaluate teacher and student before the training as well."""

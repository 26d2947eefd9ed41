"""Completions that a teacher on disk has stored, in the place of those that would be sampled from it.

A problem is matched with them by the token ids of its prompt. Each pass over the problems takes the next
`num_generations` of a prompt's completions, from the first again after the last.
"""

from __future__ import annotations

from typing import Any

from cmdp_fast.errors import InputError
from cmdp_fast.teachers.teacher import StoredCompletions, Teacher

from . import drawn
from .rollout import Sampling
from .settings.config import TrainConfig


def stored_by(teacher: Any) -> StoredCompletions | None:
    """The completions that a teacher has stored; None of one that can say something of any completion."""
    return teacher.completions if isinstance(teacher, Teacher) else None


def check_stored(stored: StoredCompletions, prompts: list[list[int]], config: TrainConfig, sampling: Sampling) -> None:
    """Raises InputError unless a group of completions is stored for each of the prompts, and fits the sampling."""
    count, whose = config.num_generations, f"--teacher {config.teacher}"
    lacking = 0
    for prompt in prompts:
        completions = stored.of(prompt)
        lacking += len(completions) < count
        for ids in completions:
            drawn.tokens(ids, sampling, whose)
    if lacking:
        raise InputError(
            f"{whose}: {lacking} of {len(prompts)} problems have fewer than --num-generations {count} completions in it"
        )


def chosen(stored: StoredCompletions, prompts: list[list[int]], count: int, passes: int) -> list[list[int]]:
    """Completions of the prompts of a step, of which ``count`` neighbours are the same; ``passes`` over the problems
    came before."""
    taken = []
    for prompt in prompts[::count]:
        completions = stored.of(prompt)
        taken += [completions[(passes * count + i) % len(completions)] for i in range(count)]
    return taken

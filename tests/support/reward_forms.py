"""The forms in which TRL takes a reward function, each the same: the length of a completion in tenths, and what it
logs."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any

from cmdp_fast.messages import text_of


def lengths(
    completions: Sequence[Any], log_metric: Callable[..., None], log_extra: Callable[..., None], **_: Any
) -> list[float | None]:
    """None for an empty completion."""
    texts = [text_of(completion) for completion in completions]
    log_metric("longest", max(map(len, texts)))
    log_extra("text", [f"<{text}>" for text in texts])
    return [len(text) / 10 if text else None for text in texts]


async def later(**given: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return lengths(**given)


class Lengths:
    def __call__(self, **given: Any) -> list[float | None]:
        return lengths(**given)


class Later:
    async def __call__(self, **given: Any) -> list[float | None]:
        return await later(**given)


partial = functools.partial(lengths, unit="a tenth")
partial_later = functools.partial(functools.partial(later, unit="a tenth"), more=1)
objects = Lengths()
objects_later = Later()

# By the name under which this module has it: the function, and TRL's name of it.
FORMS: dict[str, tuple[Callable[..., Any], str]] = {
    "lengths": (lengths, "lengths"),
    "later": (later, "later"),
    "objects": (objects, "Lengths"),
    "objects_later": (objects_later, "Later"),
    "partial": (partial, "lengths"),
    "partial_later": (partial_later, "later"),
}


def expected(texts: Sequence[str]) -> list[float | None]:
    return [len(text) / 10 if text else None for text in texts]


def steps(trainer_state: Any, completions: Sequence[Any], **_: Any) -> list[float]:
    """Reads the step that it is called in."""
    return [float(trainer_state.global_step)] * len(completions)


def failing(**_: Any) -> list[float]:
    raise LookupError("no such judge")


async def failing_later(**_: Any) -> list[float]:
    await asyncio.sleep(0)
    raise LookupError("no such judge")


def short(**_: Any) -> list[float]:
    return [0.0]

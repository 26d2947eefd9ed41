"""The judges that process.py can be told to load. Each function imports what it needs and returns
``judge(**request) -> float | None``. Called there alone: nothing else imports this file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

Judge = Callable[..., "float | None"]


def math_verify() -> Judge:
    """1 if an expression in `given` equals the reference `answer`, 0 if not, None for an unreadable reference."""
    from math_verify import parse, verify

    verify(parse(r"$\frac{1}{2}$"), parse("0.5"))  # loads and builds, once for all children

    def judge(answer: str, given: str | None) -> float | None:
        gold = parse(answer, parsing_timeout=None)  # its own time-outs would say "wrong" where ours says nothing
        if not gold:
            return None
        return float(given is not None and verify(gold, parse(given, parsing_timeout=None), timeout_seconds=None))

    return judge


def reasoning_gym() -> Judge:
    """The score of the task named in the `metadata` for the final answer, between 0 and 1."""
    from reasoning_gym import get_score_answer_fn

    def judge(answer: Any, given: str | None, metadata: dict[str, Any]) -> float:
        score = get_score_answer_fn(metadata["source_dataset"])
        return float(score(given, {"answer": answer, "metadata": metadata}))

    return judge


def verl(module: str, function: str) -> Judge:
    """A ``compute_score`` of verl's; of a dict the ``score`` counts."""
    compute_score = getattr(importlib.import_module(module), function)

    def judge(**arguments: Any) -> float:
        result = compute_score(**arguments)
        return float(result["score"] if isinstance(result, Mapping) else result)

    return judge

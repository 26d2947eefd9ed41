"""Step verifiers: every step of a worked solution checked by program, not only its answer.

    verifier(prompt, completion, **columns) -> bool | None

`prompt` and `completion` are those of a reward function, one of each; `columns` the other columns of the problem.
True: there are steps and all of them are right. None: there is nothing to check. `reasoning_success` is the share of
True among the completions with something to check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cmdp_fast.errors import InputError
from cmdp_fast.imports import import_function
from cmdp_fast.messages import as_completion, text_of
from cmdp_fast.own_code import errors_named
from cmdp_fast.reward_functions import NO_COLUMNS, check_call, name_of, own_copy, returned
from cmdp_fast.time_limits import Limit, told_of
from cmdp_fast.unchanged import unchanged

from ..settings.config import TrainConfig
from .data import Problem
from .equations import all_hold
from .sums import worked_solution

StepVerifier = Callable[..., "bool | None"]


def arithmetic_chain(prompt: Any, completion: Any, metadata: dict[str, Any], **_: Any) -> bool:
    """Whether a sum is worked out as the built-in teacher does it, ``3+4=7;7+2=9;A9``.

    Every term of the problem's expression is used, in order, one equation per term; every equation is right and goes on
    from the result of the last one; the answer is the last result. There is exactly one such text, spaces aside, so it
    is enough to compare with it. The answer alone fails.
    """
    return "".join(text_of(completion).split()) == worked_solution(metadata["expression"])


def equations(prompt: Any, completion: Any, **_: Any) -> bool | None:
    """Whether every equation between numbers in a text is right, such as ``48 / 2 = 24``; None if there is none.

    An equation has + - * / (or x × · ÷, and LaTeX's) on one side at least. A decimal fraction that stands alone on a
    side may be rounded to its last digit. Equations with letters, powers or percentages in them are not looked at.
    """
    return all_hold(text_of(completion))


BUILT_IN: dict[str, StepVerifier] = {"arithmetic_chain": arithmetic_chain, "equations": equations}


def load_step_verifier(config: TrainConfig, example: Problem) -> StepVerifier | None:
    """The step verifier of a configuration, None if it has none. Raises InputError if it does not fit the problems."""
    spec = config.step_verifier
    if not spec:
        return None
    if spec == "arithmetic_chain":
        _check_sum(example)
    return BUILT_IN.get(spec) or import_function("--step-verifier", spec, sorted(BUILT_IN))


def check_verifier(config: TrainConfig, verifier: StepVerifier | None, example: Problem, where: str) -> None:
    """Raises InputError if the step verifier does not fit a problem, one of a set that ``where`` names."""
    if config.step_verifier == "arithmetic_chain":
        _check_sum(example)
    elif verifier is not None and config.step_verifier not in BUILT_IN:
        given = [name for name in example if name not in NO_COLUMNS]
        check_call(f"{where}: --step-verifier {config.step_verifier}", verifier, given, positional=2)


def _check_sum(example: Problem) -> None:
    metadata = example.get("metadata")
    expression = metadata.get("expression") if isinstance(metadata, dict) else None
    if not isinstance(expression, str):
        raise InputError(
            "--step-verifier arithmetic_chain checks reasoning-gym's sums (basic_arithmetic, chain_sum) alone"
        )
    worked_solution(expression)


def call_step_verifier(
    verifier: StepVerifier, rows: Sequence[Problem], texts: Sequence[str], limit: Limit | None = None
) -> list[float]:
    """1 where all steps of a completion are right, 0 where not, NaN where there is nothing to check. The process is
    left as it was (`unchanged`), and the rows too: a verifier has copies of their lists and dicts.

    Raises InputError, which names the verifier, if it raises, has not returned at the limit, or returns anything else.
    """
    verdicts, what = [], f"the step verifier {name_of(verifier)}"
    with unchanged(what):
        for row, text in zip(rows, texts, strict=True):
            prompt = own_copy(row["prompt"])
            columns = {name: own_copy(value) for name, value in row.items() if name not in NO_COLUMNS}
            with told_of(what, limit=limit), errors_named(what, verifier):
                verdict = verifier(prompt, as_completion(prompt, text), **columns)
            if not (verdict is None or type(verdict) is bool):
                raise InputError(f"{what} returned {returned(verdict)}: expected True, False or None")
            verdicts.append(math.nan if verdict is None else float(verdict))
    return verdicts

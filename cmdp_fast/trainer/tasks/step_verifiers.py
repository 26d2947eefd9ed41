"""Step verifiers: every step of a worked solution checked by program, not only its answer.

    verifier(prompt, completion, **columns) -> bool | None

`prompt` and `completion` are those of a reward function, one of each; `columns` the other columns of the problem.
True: there are steps and all of them are right. None: there is nothing to check. `reasoning_success` is the share of
True among the completions with something to check.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from cmdp_fast.errors import InputError
from cmdp_fast.imports import import_function
from cmdp_fast.messages import as_completion, text_of
from cmdp_fast.reward_functions import NO_COLUMNS

from ..settings.config import TrainConfig
from .data import Problem
from .sums import worked_solution

StepVerifier = Callable[..., "bool | None"]


def arithmetic_chain(prompt: Any, completion: Any, metadata: dict[str, Any], **_: Any) -> bool:
    """Whether a sum is worked out as the built-in teacher does it, ``3+4=7;7+2=9;A9``.

    Every term of the problem's expression is used, in order, one equation per term; every equation is right and goes on
    from the result of the last one; the answer is the last result. There is exactly one such text, spaces aside, so it
    is enough to compare with it. The answer alone fails.
    """
    return "".join(text_of(completion).split()) == worked_solution(metadata["expression"])


# A number, perhaps with thousands separated and a currency in front; an expression; a chain of equal expressions that
# is not a part of something longer, of which numbers alone tell nothing. No line takes long: brackets are bounded, an
# equation is not looked for in the middle of an expression, and a line of more than `LONGEST` is left out.
_NUMBER = r"-?(?:\( ?){0,4}\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?: ?\)){0,4}"
_EXPRESSION = rf"{_NUMBER}(?: ?[-+*/] ?{_NUMBER})*"
_EQUATION = re.compile(
    rf"(?<![\w.^%+*/-])(?<![-+*/^%] ){_EXPRESSION}(?: ?= ?{_EXPRESSION})+(?!\w|\.\d|,\d{{3}}| ?[%*/^]| ?[-+] ?\w)"
)
_MARKUP = re.compile(r"^\s*[-*+•]\s+|(?<!\d)\*\*|\*\*(?!\d)")  # bullets and bold type
_TIMES, _DIVIDED = re.compile(r"(?<=[\d)]) ?[x×] ?(?=[-$(\d])"), re.compile(r" ?÷ ?")
LONGEST = 1000  # characters of a line that is looked at: with brackets after operators the time goes with the square
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def equations(prompt: Any, completion: Any, **_: Any) -> bool | None:
    """Whether every equation between numbers in a text is right, such as ``48 / 2 = 24``; None if there is none.

    An equation has + - * / (or x × ÷) on one side at least. A decimal fraction that stands alone on a side may be
    rounded to its last digit. Equations with letters, powers or percentages in them are not looked at.
    """
    verdicts = []
    for line in text_of(completion).splitlines():
        line = " ".join(line.split())
        if len(line) > LONGEST:
            continue
        line = " ".join(_DIVIDED.sub("/", _TIMES.sub("*", _MARKUP.sub("", line))).split())
        verdicts += [_holds(match.group()) for match in _EQUATION.finditer(line)]
    checked = [verdict for verdict in verdicts if verdict is not None]
    return all(checked) if checked else None


def _holds(equation: str) -> bool | None:
    """Whether all sides are equal; None if nothing is calculated on any of them, or it is not an expression."""
    sides = [_balanced(side) for side in equation.replace(",", "").replace("$", "").split("=")]
    if not any(re.search(r"[\d)] *[-+*/]", side) for side in sides):
        return None
    try:
        values = [_value(ast.parse(side, mode="eval").body) for side in sides]
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        return None  # brackets that do not fit, thousands of terms, or a number that no float can hold
    except ZeroDivisionError:
        return False
    decimals = [re.fullmatch(r"-?\d+(?:\.(\d+))?", side) for side in sides]
    exact = [value for value, decimal in zip(values, decimals, strict=True) if not (decimal and decimal[1])]
    true = (exact or values)[0]
    for value, decimal in zip(values, decimals, strict=True):
        digits = len(decimal[1]) if decimal and decimal[1] else math.inf
        if abs(value - true) > (Fraction(1, 2 * 10**digits) if isinstance(digits, int) else 0):
            return False
    return True


def _balanced(side: str) -> str:
    """A side without the brackets that stand around the whole equation, and without spaces at its ends."""
    side = side.strip()
    while side.startswith("(") and side.count("(") > side.count(")"):
        side = side[1:].strip()
    while side.endswith(")") and side.count(")") > side.count("("):
        side = side[:-1].strip()
    return side


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand)
    assert isinstance(node, ast.Constant)  # the pattern lets nothing else through
    return Fraction(str(node.value))


BUILT_IN: dict[str, StepVerifier] = {"arithmetic_chain": arithmetic_chain, "equations": equations}


def load_step_verifier(config: TrainConfig, example: Problem) -> StepVerifier | None:
    """The step verifier of a configuration, None if it has none. Raises InputError if it does not fit the problems."""
    spec = config.step_verifier
    if not spec:
        return None
    if spec == "arithmetic_chain":
        expression = example.get("metadata", {}).get("expression")
        if not isinstance(expression, str):
            raise InputError(f"--step-verifier {spec} checks reasoning-gym's sums (basic_arithmetic, chain_sum) alone")
        worked_solution(expression)
    return BUILT_IN.get(spec) or import_function("--step-verifier", spec, sorted(BUILT_IN))


def call_step_verifier(verifier: StepVerifier, rows: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """1 where all steps of a completion are right, 0 where not, NaN where there is nothing to check."""
    verdicts = []
    for row, text in zip(rows, texts, strict=True):
        columns = {name: value for name, value in row.items() if name not in NO_COLUMNS}
        verdict = verifier(row["prompt"], as_completion(row["prompt"], text), **columns)
        if not (verdict is None or isinstance(verdict, bool)):
            raise InputError(f"the step verifier returned {verdict!r}: expected True, False or None")
        verdicts.append(math.nan if verdict is None else float(verdict))
    return verdicts

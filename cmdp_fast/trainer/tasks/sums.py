"""Sums worked out in steps: the text that the built-in teacher writes, and the standard for its steps."""

from __future__ import annotations

import random
import re

from cmdp_fast.errors import InputError, shown

HABITS = {
    "careful": "every step, then the answer: 3+4=7;7+2=9;A9",
    "slip": "the same with one step wrong, on from which it goes",
    "faulty": "the same, but a sum with 7 or more as its second term comes out one too small",
    "merged": "two terms at a step: 3+4+2=9;A9",
    "direct": "the answer without steps: A9",
    "bare": "nothing but the number: 9",
}


def worked_solution(expression: str, habit: str = "careful", rng: random.Random | None = None) -> str:
    """A solution of a sum such as ``3 + 4 - 2`` in the way of one of `HABITS`, without the end-of-sequence token.

    ``rng`` chooses which step ``slip`` gets wrong and by how much. Raises InputError for anything but + and - of
    integers.
    """
    if not re.fullmatch(r"\s*-?[0-9]{1,99}(\s*[+-]\s*-?[0-9]{1,99})+\s*", expression):  # Python reads 4300 digits
        raise InputError(f"the built-in models add and subtract integers, they cannot solve {shown(expression)}")
    terms = re.findall(r"([+-]?)\s*(-?[0-9]+)", expression.strip())
    total, steps = int(terms[0][0] + terms[0][1]), []
    wrong = rng.randrange(len(terms) - 1) if habit == "slip" and rng else -1
    stride = 2 if habit == "merged" else 1
    for position in range(1, len(terms), stride):
        some = terms[position : position + stride]
        result = total + sum(int(number) if sign == "+" else -int(number) for sign, number in some)
        if position - 1 == wrong and rng:
            result += rng.choice((-3, -2, -1, 1, 2, 3))
        if habit == "faulty" and int(some[0][1]) >= 7:
            result -= 1
        steps.append(f"{total}{''.join(sign + number for sign, number in some)}={result};")
        total = result
    answer = f"{total}" if habit == "bare" else f"A{total}"
    return answer if habit in ("direct", "bare") else "".join(steps) + answer

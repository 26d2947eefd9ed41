"""Sums worked out in steps: the text that the built-in teacher writes, and the standard for its steps."""

from __future__ import annotations

import random
import re

from cmdp_fast.errors import InputError, shown


def worked_solution(expression: str, habit: str = "careful", rng: random.Random | None = None) -> str:
    """A solution of a sum such as ``3 + 4 - 2`` in steps, without the end-of-sequence token.

    ``careful`` is right throughout, ``direct`` gives the right answer without steps, ``slip`` gets one step wrong (rng
    chooses which and by how much) and goes on from there. Raises InputError for anything but + and - of integers.
    """
    if not re.fullmatch(r"\s*-?[0-9]{1,99}(\s*[+-]\s*-?[0-9]{1,99})+\s*", expression):  # Python reads 4300 digits
        raise InputError(f"the built-in models add and subtract integers, they cannot solve {shown(expression)}")
    terms = re.findall(r"([+-]?)\s*(-?[0-9]+)", expression.strip())
    total, steps = int(terms[0][0] + terms[0][1]), []
    wrong = rng.randrange(len(terms) - 1) if habit == "slip" and rng else -1
    for position, (sign, number) in enumerate(terms[1:]):
        result = total + int(number) if sign == "+" else total - int(number)
        if position == wrong and rng:
            result += rng.choice((-3, -2, -1, 1, 2, 3))
        steps.append(f"{total}{sign}{number}={result};")
        total = result
    return f"A{total}" if habit == "direct" else "".join(steps) + f"A{total}"

"""Several teachers in the settings, `--teacher NAME=TEACHER NAME=TEACHER`, and what belongs to them.

The setting is one text, `routed:NAME=TEACHER,NAME=TEACHER`, which recipes and a run's folder hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from cmdp_fast.errors import InputError
from cmdp_fast.teachers.routed import KIND, places

from .budget import BudgetSettings
from .models import ModelSettings

_NAMED = re.compile(r"[^-=:/\s][^=:/\s]*=")  # the beginning of NAME=TEACHER, which is none of a folder or an address


def with_one_teacher(args: Sequence[str]) -> list[str]:
    """The words of a command line with ``--teacher NAME=TEACHER NAME=TEACHER`` as the one text of the setting."""
    words, places = list(args), [i for i, word in enumerate(args) if re.fullmatch(r"--teacher(=.*)?", word)]
    for at in reversed(places):
        _, own, first = words[at].partition("=")
        several = [first] if own else []
        for word in words[at + 1 :] if not own or _NAMED.match(first) else []:
            if not _NAMED.match(word):
                break
            several.append(word)
        if several and all(map(_NAMED.match, several)):
            words[at : at + len(several) + (not own)] = ["--teacher", f"{KIND}:{','.join(several)}"]
    return words


def check_several(models: ModelSettings, budgets: BudgetSettings, logits: str) -> None:
    """Raises InputError for several teachers without what they need, or with what is for one; nothing is asked."""
    if not models.teacher.startswith(f"{KIND}:"):
        for option, value in (("column", models.teacher_column), ("budgets", budgets.teacher_budgets)):
            if value:
                raise InputError(f"--teacher-{option} is for several teachers: --teacher {KIND}:…")
        return
    if not models.teacher_column:
        raise InputError(f"--teacher {KIND}: needs the column that names the teacher of a problem: --teacher-column")
    if logits == "full":
        raise InputError(f"--teacher {KIND}: compares hidden states: it needs --logits tiled")
    if not teacher_budgets(models, budgets):
        return
    if budgets.kind in ("pid", "worst_case"):
        raise InputError(f"--teacher-budgets: --kind {budgets.kind} has one budget for all completions")
    if budgets.budget_steps:
        raise InputError("--teacher-budgets stay as they are: they go with no --budget-steps")


def teacher_names(models: ModelSettings) -> list[str]:
    """The names of several teachers. Raises InputError for a --teacher that has none."""
    return list(places(models.teacher.removeprefix(f"{KIND}:")))


def teacher_budgets(models: ModelSettings, budgets: BudgetSettings) -> dict[str, float]:
    """The budget in nats of the teachers that have one of their own. Raises InputError for any other text."""
    names, found = teacher_names(models), dict[str, float]()
    for text in budgets.teacher_budgets:
        name, _, amount = text.partition("=")
        try:
            nats = float(amount)
        except ValueError:
            nats = math.nan
        if name not in names or name in found or not 0 < nats < math.inf:
            raise InputError(
                f"--teacher-budgets {text}: expected NAME=NATS, once for a teacher of {', '.join(names)}, above 0"
            )
        found[name] = nats
    return found

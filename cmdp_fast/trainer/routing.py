"""Several teachers (`--teacher routed:…`): whose each completion is, by a column of its problem, and its budget.

Everything else of a step is as with one teacher, since a micro-batch has the completions of one alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmdp_fast import batches
from cmdp_fast.constraint import Constraint
from cmdp_fast.errors import InputError
from cmdp_fast.metrics import budget_metrics
from cmdp_fast.teachers.routed import RoutedTeacher

from .settings.config import TrainConfig
from .settings.several import teacher_budgets, teacher_names
from .tasks.data import Problem

OF_EACH = ("mean_cumulative", "cumulative_kl", "constraint_satisfaction", "budget")  # metrics of each teacher's


def teacher_index(config: TrainConfig, teacher: Any, rows: Iterable[Problem], device: torch.device) -> Tensor | None:
    """The number [B] of the teacher of each problem; None where there is one teacher, or none."""
    if not isinstance(teacher, RoutedTeacher):
        return None
    return teacher.numbers(row.get(config.teacher_column) for row in rows).to(device)


def held_to(config: TrainConfig, constraint: Constraint, index: Tensor | None) -> Constraint:
    """The constraint with the budget [B] of each completion's teacher, where teachers have budgets of their own."""
    if index is None or not config.teacher_budgets:
        return constraint
    budgets = teacher_budgets(config, config)
    each = torch.tensor([budgets.get(name, float(constraint.budget)) for name in teacher_names(config)])
    return replace(constraint, budget=each.to(index.device)[index])


def metrics_by_teacher(
    config: TrainConfig, index: Tensor, account: dict[str, Any], budget: float | Tensor
) -> dict[str, Tensor]:
    """Some of the `budget_metrics` of the completions of each teacher that has any, as ``teacher/NAME/…``; ``account``
    has its other arguments, of all completions."""
    metrics = dict[str, Tensor]()
    limits = torch.as_tensor(budget, device=index.device).expand(len(index))
    for number, name in enumerate(teacher_names(config)):
        if (its := index == number).any():
            own = batches.united([{**account, "budget": limits}], lambda values, its=its: values[0][its])  # type: ignore[misc]
            found = budget_metrics(**own)
            metrics |= {f"teacher/{name}/{each}": found[each] for each in OF_EACH}
    return metrics


def check_rows(config: TrainConfig, rows: Sequence[Problem]) -> None:
    """Raises InputError for a problem that names no teacher in `teacher_column`."""
    if not config.teacher_column:
        return
    names = teacher_names(config)
    for row in rows:
        if (name := row.get(config.teacher_column)) not in names:
            has = f"{name!r} there" if config.teacher_column in row else "no such column"
            raise InputError(
                f"--teacher-column {config.teacher_column}: the problem {str(row['prompt'])[:60]!r} has {has}; the "
                f"teachers are {', '.join(names)}"
            )

"""`cmdp-fast evaluate`: the figures of a run's evaluations for any student, with or without a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cmdp_fast.errors import InputError
from cmdp_fast.files import write_json

from .distributed import main_first, make_accelerator, on_device
from .evaluate import evaluate
from .material import load
from .parse import parse_as
from .records.clock import Clock
from .records.report import Report
from .run import make_collector
from .settings.config import TrainConfig


@dataclass(frozen=True)
class EvaluateConfig(TrainConfig):
    """Settings of `cmdp-fast evaluate`: those of a training, whose recipe gives the task and the budget."""

    REQUIRED_MODELS: ClassVar[tuple[str, ...]] = ("student",)

    json: str = ""
    """File for the figures, beside the table on the terminal."""


def parse_evaluate(args: Sequence[str], prog: str = "cmdp-fast evaluate") -> EvaluateConfig:
    """The configuration that the command line asks for, validated; see `parse_as`."""
    description = (
        "Measure a student on held-out problems. A recipe gives task, teacher and budget; settings of the training "
        "have no effect. With an empty --teacher= the figures that compare with one are left out."
    )
    return parse_as(EvaluateConfig, args, prog, description)


def evaluate_student(config: EvaluateConfig) -> dict[str, float]:
    """Prints the figures that `evaluate` documents and returns them; writes them to the file that was asked for.

    They are those that a run with the same settings reports of the same student. Raises InputError for anything that
    cannot be used, before anything is sampled.
    """
    if config.json and not Path(config.json).parent.is_dir():
        raise InputError(f"--json {config.json}: there is no folder {Path(config.json).parent}")
    accelerator = make_accelerator(config)
    report = Report(accelerator.is_main_process)
    material = main_first(lambda: load(config, report), accelerator)
    student = on_device(material.student, accelerator)
    collector = make_collector(config, accelerator, student, material)
    figures, _ = evaluate(collector, student, material.held_out, Clock(), report)
    if accelerator.is_main_process:
        print_figures(config, figures)
    if config.json and accelerator.is_main_process:
        about = {"student": config.student, "teacher": config.teacher or None, "recipe": config.recipe}
        write_json(Path(config.json), {**about, "budget": config.budget if config.teacher else None, **figures})
    return figures


def print_figures(config: EvaluateConfig, figures: dict[str, float]) -> None:
    """A line per figure."""
    from rich.console import Console
    from rich.table import Table

    against = f"against {config.teacher}, budget {config.budget:g} nats" if config.teacher else "without a teacher"
    print(f"{config.student} {against}")
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    Console().print(table)

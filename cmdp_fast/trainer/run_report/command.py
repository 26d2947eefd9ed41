"""`cmdp-fast report`: the settings, and what is read, made and written, in this order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cmdp_fast.errors import InputError, readable
from cmdp_fast.files import check_writable, replacing, write_text, writing

from ..records.report import Report
from ..settings.ranges import SEED
from .chosen import choose
from .groups import groups_of
from .markdown import markdown_of
from .measures import rows_of
from .page import page_of
from .plot import DARK, LIGHT, plot_png
from .runs import read_runs
from .words import counted

MOST_PROMPTS = 200
PAGE, MARKDOWN, PLOT = "samples.html", "samples.md", "reward_against_kl.png"


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `cmdp-fast report`."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of trainings, or of comparisons, all of whose runs are taken."""
    output_dir: str = "report"
    """Folder of the page (`samples.html`), of the same as Markdown (`samples.md`) and of the plot."""
    prompts: int = 20
    """Prompts of which the completions are shown, out of those that all runs have."""
    seed: int = 0
    """Decides which prompts these are."""


def parse_report(args: Sequence[str], prog: str = "cmdp-fast report") -> ReportConfig:
    """The settings on the command line. tyro itself exits with code 2 on options that do not exist."""
    description = "Put what trainings have written on a page: a plot, a table of measures, completions side by side."
    return tyro.cli(ReportConfig, prog=prog, description=description, args=list(args))


def write_report(config: ReportConfig) -> Path:
    """Writes page, Markdown and plot; returns their folder. Raises InputError, before anything is written, for folders
    whose contents are not those of trainings, and for settings that cannot be used."""
    _check(config)
    report, folder = Report(), Path(config.output_dir)
    runs = read_runs(config.runs, report.say)
    groups = groups_of(runs)
    rows, chosen = rows_of(groups), choose(groups, config.prompts, config.seed)
    light, dark = (plot_png(groups, ink) for ink in (LIGHT, DARK))
    page, text = page_of(groups, rows, chosen, light, dark), markdown_of(groups, rows, chosen, PLOT)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / PLOT) as part:
        part.write_bytes(light)
    write_text(folder / MARKDOWN, text)
    write_text(folder / PAGE, page)
    report.say(f"{counted(len(runs), 'run')}, {counted(len(groups), 'method')}, {counted(len(chosen.rows), 'prompt')}")
    report.say(f"{folder}: {PAGE} {MARKDOWN} {PLOT}")
    return folder


def _check(config: ReportConfig) -> None:
    if not config.runs:
        raise InputError("give one or more RUN: folders of trainings, or of comparisons")
    if not 1 <= config.prompts <= MOST_PROMPTS:
        raise InputError(f"--prompts must be from 1 to {MOST_PROMPTS}, not {config.prompts}")
    SEED.check("--seed", config.seed)
    check_writable(Path(config.output_dir), f"--output-dir {readable(config.output_dir)}")

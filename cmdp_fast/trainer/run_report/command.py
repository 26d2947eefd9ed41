"""`cmdp-fast report`: what is read, made and written, in this order."""

from __future__ import annotations

from pathlib import Path

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
from .settings import ReportConfig
from .words import counted

MOST_PROMPTS = 200
PAGE, MARKDOWN, PLOT = "samples.html", "samples.md", "reward_against_kl.png"


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

"""The settings of `cmdp-fast report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ..command_line.parsing import settings_of
from ..settings.units import FOLDER, PROMPTS, RUN, WHOLE


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `cmdp-fast report`."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, RUN]
    """Folders of trainings, or of comparisons, all of whose runs are taken."""
    output_dir: Annotated[str, FOLDER] = "report"
    """Folder of the page (`samples.html`), of the same as Markdown (`samples.md`) and of the plot."""
    prompts: Annotated[int, PROMPTS] = 20
    """Prompts of which the completions are shown, out of those that all runs have."""
    seed: Annotated[int, WHOLE] = 0
    """Decides which prompts these are."""


def parse_report(args: Sequence[str], prog: str = "cmdp-fast report") -> ReportConfig:
    """The settings on the command line. Raises InputError for options that do not exist."""
    description = "Put what trainings have written on a page: a plot, a table of measures, completions side by side."
    return settings_of(ReportConfig, args, prog, description)

"""`cmdp-fast doctor`: what is installed here, whether it computes what it should, and what to do where it does not.

Its output is what a bug report should hold, once somebody has looked through it: the home folder is `~`, and what has
the form of a secret `***` (masking.py), but hosts in addresses and paths elsewhere remain. Of the environment it shows
variables of this package and those that decide about threads, GPUs, the compiler and caches. It works without the extra
`train`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from cmdp_fast.terminal import columns, is_terminal, show

from . import backends, installed, machine
from .row import NOTE, PROBLEM, Row, failed, lines

CHECKS: tuple[Callable[[], Iterable[Row]], ...] = (
    *(installed.package, installed.versions, installed.imports, installed.others, installed.variables),
    *(backends.native_kernels, backends.chosen, backends.numbers),
    *(machine.threads, machine.openmp, machine.memory, machine.disk, machine.gpu, machine.compilers),
)


def doctor() -> int:
    """Prints a line for each thing that was looked at; returns 1 if one of them is a problem, else 0."""
    rows = examine()
    stream = sys.stdout
    for row in rows:
        show("\n".join(lines(row, columns(stream) if is_terminal(stream) else None)), stream)
    problems, notes = (sum(row.level == level for row in rows) for level in (PROBLEM, NOTE))
    show(f"{problems or 'no'} problem{'' if problems == 1 else 's'}, {notes} note{'' if notes == 1 else 's'}", stream)
    return 1 if problems else 0


def examine() -> list[Row]:
    """All rows. A check that fails is a problem of its own, and ends no other."""
    rows = []
    for check in CHECKS:
        try:
            rows += list(check())
        except Exception as error:  # of whatever is wrong here, which is what the user wants to know
            rows.append(Row(PROBLEM, check.__name__.replace("_", " "), f"cannot be looked at: {failed(error)}"))
    return rows

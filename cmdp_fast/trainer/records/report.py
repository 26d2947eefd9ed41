"""The console of a run: lines, and progress with the time left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from cmdp_fast.errors import without_controls

T = TypeVar("T")


class Report:
    """The console. Quiet, a line now and then instead of a moving bar, if CI is set or the output is no terminal.

    Of several processes only the main one has a console; the others are not `shown`.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.quiet = os.environ.get("CI", "").lower() not in ("", "0", "false") or not sys.stdout.isatty()
        self._status = ""

    def say(self, line: str) -> None:
        """Prints a line."""
        if self.shown:
            print(without_controls(line), flush=True)

    def status(self, text: str) -> None:
        """Sets the text beside the bar that is running."""
        self._status = text

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """The items, with a bar and the time left."""
        self._status = ""
        yield from self._lines(items, description) if self.quiet or not self.shown else self._bar(items, description)

    def _lines(self, items: Sequence[T], description: str) -> Iterator[T]:
        every = max(1, len(items) // 10)
        self.say(description)
        start = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            if self._status and (done % every == 0 or done == len(items)):
                left = (time.monotonic() - start) / done * (len(items) - done)
                self.say(f"  {done}/{len(items)}  {self._status}  {left:.0f} s left")

    def _bar(self, items: Sequence[T], description: str) -> Iterator[T]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns) as progress:
            task = progress.add_task(description, total=len(items), status="")
            for item in items:
                yield item
                progress.update(task, advance=1, status=self._status)


def quiet_libraries() -> None:
    """Keeps transformers and datasets from warnings and progress bars of their own, in this process."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()

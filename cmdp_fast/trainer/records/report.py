"""The console of a run: lines, and progress with the time left."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from cmdp_fast.errors import without_controls
from cmdp_fast.terminal import message

from .progress import Progress, Waiting

T = TypeVar("T")


class Report:
    """The console. Quiet, a line now and then instead of a moving bar, if CI is set or the output is no terminal that
    a line can be drawn anew in.

    Of several processes only the main one has a console; the others are not `shown`.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        self.quiet = in_ci or not sys.stdout.isatty() or _draws_nothing()
        self._figures: tuple[str, ...] = ()
        self._progress: Progress | None = None  # the one that is drawn now: rich has room for one

    def say(self, line: str) -> None:
        """Prints a line; in a terminal as many as it takes without breaking a word."""
        if self.shown:
            text = without_controls(line)
            print(text if self.quiet else message(text, sys.stdout), flush=True)

    def status(self, *figures: str) -> None:
        """Sets the figures beside the bar that is running, the one that matters most first."""
        self._figures = figures
        if self._progress is not None:
            self._progress.figures = figures

    def note(self, text: str) -> None:
        """Has the bar that is running say this in the place of its description; does nothing else, so that a handler
        of a signal may call it."""
        if self._progress is not None:
            self._progress.note = text

    @contextmanager
    def doing(self, text: str) -> Iterator[None]:
        """The bar that is running says so while the body lasts."""
        before = self._progress.note if self._progress is not None else ""
        self.note(before or text)
        try:
            yield
        finally:
            if self._progress is not None and self._progress.note == text:
                self.note("")

    def track(
        self, items: Sequence[T], description: str, before: int = 0, each: int = 1, total: int = 0
    ) -> Iterator[T]:
        """The items, with a bar and the time left.

        What is counted are items, or ``each`` of something in an item, up to a ``total``, behind those that earlier
        processes have done ``before``.
        """
        self._figures = ()
        progress = Progress(description, total or before + len(items) * each, before)
        yield from (
            self._lines(items, progress, each) if self.quiet or not self.shown else self._bar(items, progress, each)
        )

    def _lines(self, items: Sequence[T], progress: Progress, each: int) -> Iterator[T]:
        every = max(1, len(items) // 10)
        self.say(progress.description)
        for number, item in enumerate(items, 1):
            yield item
            progress.reach(progress.before + number * each)
            at_a_tenth = (progress.before // each + number) % every == 0
            if self._figures and (at_a_tenth or number == len(items)):
                count, left = f"{progress.done}/{progress.total}", progress.seconds_left()
                self.say(f"  {count}  {'  '.join(self._figures)}  {left:.0f} s left")

    def _bar(self, items: Sequence[T], progress: Progress, each: int) -> Iterator[T]:
        from rich.live import Live

        with Live(progress, refresh_per_second=4):
            self._progress = progress
            try:
                for number, item in enumerate(items, 1):
                    yield item
                    progress.reach(progress.before + number * each)
            finally:
                progress.end()
                self._progress = None

    @contextmanager
    def waiting(self, description: str, most: float = 0.0) -> Iterator[None]:
        """A terminal shows what the body waits for, and for how long, ``most`` seconds at most; nothing of it stays."""
        if self.quiet or not self.shown:
            yield
        elif self._progress is not None:
            with self.doing(description):
                yield
        else:
            from rich.live import Live

            with Live(Waiting(description, most), refresh_per_second=2, transient=True):
                yield


def _draws_nothing() -> bool:
    """Whether the terminal cannot go back in a line."""
    from rich.console import Console

    return Console().is_dumb_terminal


def quiet_libraries() -> None:
    """Keeps transformers and datasets from warnings and progress bars of their own, in this process."""
    import datasets
    import transformers

    # Of weights that are tied one is saved, and loading ties them again: nothing to be told of, or to check
    logging.getLogger("accelerate.utils.other").addFilter(_tells_something)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()


def _tells_something(record: logging.LogRecord) -> bool:
    return "Removed shared tensor" not in record.getMessage()

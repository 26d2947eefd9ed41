"""The console of a run: lines, and progress with the time left."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar, cast

from cmdp_fast.errors import without_controls
from cmdp_fast.terminal import encodable, message, show, silence

from .progress import Progress, Waiting

T = TypeVar("T")


class Report:
    """The console. Quiet, a line now and then instead of a moving bar, if CI is set or the output is no terminal that
    a line can be drawn anew in.

    Of several processes only the main one has a console; the others are not `shown`. Nor is one that cannot be written
    to any more, such as a pipe whose reader has ended: no work is lost for want of one who looks.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown and sys.stdout is not None
        in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        self.quiet = in_ci or not self.shown or not sys.stdout.isatty() or _draws_nothing()
        self._figures: tuple[str, ...] = ()
        self._progress: Progress | None = None  # the one that is drawn now: rich has room for one

    def say(self, line: str) -> None:
        """Prints a line; in a terminal as many as it takes without breaking a word."""
        if self.shown:
            text = without_controls(line)
            try:
                show(text if self.quiet else message(text, sys.stdout), sys.stdout)
            except (OSError, ValueError) as error:
                if not _of_console(error, sys.stdout):
                    raise
                self.gone()

    def gone(self) -> None:
        """The console cannot be written to, and is not from here on."""
        self.shown = False
        silence(sys.stdout)

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

        with Live(progress, console=self._console(), refresh_per_second=4):
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

            waiting = Waiting(description, most)
            with Live(waiting, console=self._console(), refresh_per_second=2, transient=True):
                yield

    def _console(self) -> Any:
        """rich's, which draws into a file that raises nothing."""
        from rich.console import Console

        return Console(file=cast("IO[str]", _Lasting(sys.stdout, self.gone)))


class _Lasting:
    """The console's file as rich writes to it, from a thread of its own too: once it fails that is told, and what comes
    then is dropped."""

    def __init__(self, file: IO[str], gone: Callable[[], None]) -> None:
        self._file, self._gone, self._lost = file, gone, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._file.write(encodable(text, self._file)))
        return len(text)

    def flush(self) -> None:
        self._try(self._file.flush)

    def _try(self, function: Callable[[], object]) -> None:
        if not self._lost:
            try:
                function()
            except (OSError, ValueError) as error:
                if not _of_console(error, self._file):
                    raise
                self._lost = True
                self._gone()


def _of_console(error: Exception, file: IO[str]) -> bool:
    """Whether an error says that a console cannot be written to any more: a ValueError where this process has closed
    it. Any other says something of the text."""
    return isinstance(error, OSError) or file.closed


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

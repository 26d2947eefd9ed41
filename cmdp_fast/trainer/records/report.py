"""The console of a run: lines, and progress with the time left."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar, cast

from cmdp_fast.masking import told
from cmdp_fast.terminal import Output, encodable, is_terminal, message, of_console

from .progress import Progress, Waiting

T = TypeVar("T")


class Report:
    """The console. Quiet, a line now and then instead of a moving bar, if CI is set or the output is no terminal that
    a line can be drawn anew in.

    Of several processes only the main one has a console; the others are not `shown`. Nor is one that cannot be written
    to any more, such as a pipe whose reader has ended: no work is lost for want of one who looks. Of a `result` that
    nobody has seen `check` tells.
    """

    def __init__(self, shown: bool = True) -> None:
        self._main, self._output = shown, Output()
        in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        self.quiet = in_ci or not self.shown or not is_terminal(sys.stdout) or _draws_nothing()
        self._unseen = False  # whether a result has come to nobody
        self._figures: tuple[str, ...] = ()
        self._progress: Progress | None = None  # the one that is drawn now: rich has room for one

    @property
    def shown(self) -> bool:
        """Whether this process has a console that can be written to."""
        return self._main and self._output.lost is None

    def say(self, line: str) -> None:
        """Prints a line; in a terminal as many as it takes without breaking a word."""
        if self.shown:
            text = told(line)
            self._output.show(text if self.quiet else message(text, sys.stdout))

    def result(self, text: str) -> None:
        """Prints what a command is run for, as it is."""
        if self._main:
            self._output.show(text)
            self._unseen = self._unseen or self._output.lost is not None

    def check(self, instead: str) -> None:
        """Raises ConsoleLost, which says what there is ``instead``, if a result has come to nobody."""
        if self._unseen:
            self._output.check(instead)

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

        return Console(file=cast("IO[str]", _Lasting(sys.stdout, self._output.fail)))


class _Lasting:
    """The console's file as rich writes to it, from a thread of its own too: once it fails that is told, and what comes
    then is dropped."""

    def __init__(self, file: IO[str], gone: Callable[[Exception], None]) -> None:
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
                if not of_console(error, self._file):
                    raise
                self._lost = True
                self._gone(error)


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

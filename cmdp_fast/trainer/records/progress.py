"""The line that shows in a terminal how far a piece of work has come: as much of it as fits, the count always."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

FREE = (
    4  # columns at the end: a terminal writes ^C where the cursor stands, and a line that this wraps would stay twice
)
NARROW, WIDE = 8, 24  # columns of a bar


class Progress:
    """So much of a ``total`` is done, of that ``before`` by earlier processes; rich draws it as a line.

    The time left is estimated from what this process has done. ``figures`` are shown as far as there is room, in their
    order; a ``note`` stands in the description's place.
    """

    def __init__(self, description: str, total: int, before: int = 0) -> None:
        self.description, self.total, self.before, self.done = description, total, before, before
        self.figures: tuple[str, ...] = ()
        self.note = ""
        self._begun = self._last = time.monotonic()
        self._ended: float | None = None

    def reach(self, done: int) -> None:
        """So much is done now."""
        self.done, self._last = min(done, self.total), time.monotonic()

    def end(self) -> None:
        """From here on the line says how long it took."""
        self._ended, self.note = time.monotonic(), ""

    def seconds_left(self) -> float | None:
        """None before anything is done."""
        here = self.done - self.before
        if not here:
            return None
        left = (self._last - self._begun) / here * (self.total - self.done)
        return max(0.0, left - (time.monotonic() - self._last))

    def _time(self) -> str:
        if self._ended is not None:
            return f"in {duration(self._ended - self._begun)}"
        left = self.seconds_left()
        return f"{duration(time.monotonic() - self._begun)} so far" if left is None else f"{duration(left)} left"

    def pieces(self, width: int) -> dict[str, str]:
        """What is shown in so many columns, in order from left to right; "bar" is as many spaces as it gets.

        Given up first are a wide bar, then the last figures, the description but for its first word, the first
        figure, the bar, that word, and last of all the time. A note has its room before all of them.
        """
        count = f"{self.done}/{self.total}".rjust(2 * len(str(self.total)) + 1)
        note, figures = self.note, self.figures  # a handler of a signal may set a note meanwhile
        words = (note or self.description).split(" ")
        room, taken = width - len(count), {"count": count}

        def take(name: str, text: str, gap: int = 1) -> None:
            nonlocal room
            more = len(text) - len(taken.get(name, "")) + (0 if name in taken else gap)
            if more <= room:
                taken[name], room = text, room - more

        if note:
            words = [note] if len(note) < room else words
            take("what", words[0])
        take("time", self._time())
        take("what", words[0])
        take("bar", " " * NARROW)
        for text in figures[:1]:
            take("0", text, 2)
        if "what" in taken:
            for end in range(2, len(words) + 1):
                take("what", " ".join(words[:end]))
        for number, text in enumerate(figures):
            if number and str(number - 1) in taken:
                take(str(number), text, 2)
        if "bar" in taken:
            take("bar", " " * min(WIDE, NARROW + room))
        names = ("what", "bar", "count", "time", *map(str, range(len(figures))))
        return {name: taken[name] for name in names if name in taken}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        styles = {"count": "progress.download", "time": "progress.remaining"}
        gap = ""
        for name, text in self.pieces(options.max_width - FREE).items():
            yield Text(f"  {gap}"[:2] if name.isdigit() else gap, end="")
            if name == "bar":
                bar = ProgressBar(max(self.total, 1), self.done, width=len(text))
                yield from console.render(bar, options.update(width=len(text)))
            else:
                yield Text(text, style=styles.get(name, ""), end="", no_wrap=True, overflow="crop")
            gap = " "


class Waiting:
    """A line for what gives no count: what is waited for, how long it has taken, and how long it may take at most."""

    def __init__(self, description: str, most: float = 0.0) -> None:
        self.description, self.most, self._begun = description, most, time.monotonic()

    def __str__(self) -> str:
        until = f" of at most {duration(self.most)}" if self.most else ""
        return f"{duration(time.monotonic() - self._begun)}{until}  {self.description}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text(str(self)[: options.max_width - FREE], end="")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as ``1:02:03``."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"

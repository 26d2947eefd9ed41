"""Text for a terminal: as wide as that is, with whole words; and what becomes of it where it cannot be written."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import IO, Any

DEFAULT, NARROWEST, WIDEST = 80, 20, 100  # columns; longer lines are hard to read
TWO_COLUMNS = 60  # from here on a text stands beside its name, and not under it
# A command at the end of a text, such as "to go on: cmdp-fast train --resume runs/N"
_COMMAND = re.compile(r"(?<=:) (?=(?:\w+=\S+ )?(?:cmdp-fast|pip|python|accelerate launch|torchrun) )")


def columns(stream: IO[str] | None) -> int:
    """The width to write with: COLUMNS, that of the terminal behind the stream, or 80."""
    try:
        asked = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        asked = 0
    if asked <= 0:
        try:
            asked = os.get_terminal_size(stream.fileno()).columns if stream else 0
        except (OSError, ValueError, AttributeError):  # no terminal, or no file
            asked = 0
    return min(max(asked or DEFAULT, NARROWEST), WIDEST)


def wrapped(text: str, width: int, first: str = "", rest: str | None = None) -> list[str]:
    """The lines of a text, the first one behind ``first``, the others behind ``rest``. A word that is wider than a line
    has one of its own."""
    rest = " " * len(first) if rest is None else rest
    fold = textwrap.TextWrapper(
        width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return fold.wrap(text) or [first.rstrip()]


def beside(name: str, text: str, width: int, column: int) -> list[str]:
    """The lines of a text that begins at a column, beside its name, or under it where there is no room."""
    if width < TWO_COLUMNS:
        return [*wrapped(name, width, "  ", " " * 6), *wrapped(text, width, " " * 4)]
    if len(name) + 4 <= column:
        return wrapped(text, width, f"  {name}".ljust(column))
    return [*wrapped(name, width, "  ", " " * 6), *wrapped(text, width, " " * column)]


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal: none is where a shell has closed it (`>&-`), or this process has."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def message(text: str, stream: IO[str] | None) -> str:
    """A message as it is written to a stream: as it is into a pipe or a file, and `fitted` to a terminal."""
    return fitted(text, columns(stream)) if is_terminal(stream) else text


def fitted(text: str, width: int) -> str:
    """A text in lines of so many columns; what follows a first one is indented. A command at its end, which is there to
    be copied, has a line of its own and stays whole."""
    lines = []
    for line in text.splitlines() or [""]:
        said, *command = _COMMAND.split(line, maxsplit=1)
        indent = line[: len(line) - len(line.lstrip())]
        if len(line) <= width:
            lines.append(line)
        else:
            lines += [*wrapped(said.lstrip(), width, indent, f"{indent}  "), *(f"{indent}  {each}" for each in command)]
    return "\n".join(lines)


def drawn(what: Any, width: int | None = None) -> str:
    """A table of rich's, or anything that it prints, as text for the standard output.

    rich itself would end the process with exit code 1, and say nothing, where nobody reads what it prints.
    """
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as captured:
        console.print(what)
    return captured.get().rstrip("\n")


class ConsoleLost(Exception):
    """A text cannot be written to the console: nobody reads it any more (`unread`), its disk is full, it is closed.

    The message says so, and is empty where somebody like `head` has read as much as they wanted.
    """

    def __init__(self, says: str, unread: bool = False) -> None:
        super().__init__(says)
        self.unread = unread


def lost(error: Exception | None) -> ConsoleLost:
    """What an error of a stream says; None: there is no stream."""
    if isinstance(error, BrokenPipeError):
        return ConsoleLost("", unread=True)
    reason = "it is closed" if error is None else getattr(error, "strerror", None) or str(error)
    return ConsoleLost(f"the output cannot be written: {reason}")


def encodable(text: str, stream: IO[str]) -> str:
    """A text with question marks for what a stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def show(text: str, stream: IO[str] | None, end: str = "\n") -> None:
    """Prints a text, as far as it is `encodable`. Raises ConsoleLost where it cannot be written, which `cli.main` takes
    for the end of the command; the stream leads nowhere from then on."""
    if stream is None:
        raise lost(None)
    with _losing(stream):
        print(encodable(text, stream), file=stream, end=end, flush=True)


def flush(stream: IO[str] | None) -> None:
    """Has a stream write what others have printed. Raises ConsoleLost as `show` does; not where there is none."""
    if stream is not None and not stream.closed:
        with _losing(stream):
            stream.flush()


@contextlib.contextmanager
def _losing(stream: IO[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if not of_console(error, stream):
            raise
        silence(stream)
        raise lost(error) from error


def of_console(error: Exception, stream: IO[str]) -> bool:
    """Whether an error says that a stream cannot be written to any more: a ValueError where this process has closed it.
    Any other says something of the text."""
    return isinstance(error, OSError) or stream.closed


def silence(stream: IO[str] | None) -> None:
    """Has a stream that cannot be written to lead nowhere. Otherwise what it still holds would fail once more as Python
    ends, with a traceback and an exit code of its own."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, or one that is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        finally:
            os.close(nowhere)


class Output:
    """The standard output of a command that goes on without it: there are files as well, or all that follows counts.

    Where there was none from the beginning, nobody expects anything there.
    """

    def __init__(self) -> None:
        self.lost = None if sys.stdout is not None else lost(None)
        self._expected = sys.stdout is not None

    def show(self, text: str, end: str = "\n") -> None:
        """Prints a text, while that is possible."""
        if self.lost is None:
            try:
                show(text, sys.stdout, end)
            except ConsoleLost as error:
                self.lost = error

    def fail(self, error: Exception) -> None:
        """The output cannot be written, as something else has found."""
        self.lost = self.lost or lost(error)
        silence(sys.stdout)

    def check(self, instead: str) -> None:
        """Raises ConsoleLost, which says what there is ``instead``, if something was not shown."""
        if self.lost is not None and self._expected:
            says = str(self.lost) or "nobody reads the output any more"
            raise ConsoleLost(f"{says}; {instead}", self.lost.unread)

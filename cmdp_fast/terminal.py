"""Text for a terminal: as wide as that is, with whole words."""

from __future__ import annotations

import contextlib
import os
import re
import select
import textwrap
from collections.abc import Iterable
from typing import IO

DEFAULT, NARROWEST, WIDEST = 80, 20, 100  # columns; longer lines are hard to read
TWO_COLUMNS = 60  # from here on a text stands beside its name, and not under it
# A command at the end of a text, such as "to go on: cmdp-fast train --resume runs/N"
_COMMAND = re.compile(r"(?<=:) (?=(?:\w+=\S+ )?(?:cmdp-fast|pip|python|accelerate launch|torchrun) )")


def columns(stream: IO[str]) -> int:
    """The width to write with: COLUMNS, that of the terminal behind the stream, or 80."""
    try:
        asked = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        asked = 0
    if asked <= 0:
        try:
            asked = os.get_terminal_size(stream.fileno()).columns
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


def message(text: str, stream: IO[str]) -> str:
    """A message as it is written to a stream: as it is into a pipe or a file, and `fitted` to a terminal."""
    return fitted(text, columns(stream)) if stream.isatty() else text


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


def encodable(text: str, stream: IO[str]) -> str:
    """A text with question marks for what a stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def show(text: str, stream: IO[str]) -> None:
    """Prints a text, as far as it is `encodable`. Raises BrokenPipeError where nobody reads any more, which `cli.main`
    takes for the end of the command."""
    print(encodable(text, stream), file=stream, flush=True)


def silence(stream: IO[str]) -> None:
    """Has a stream that cannot be written to lead nowhere. Otherwise what it still holds would fail once more as Python
    ends, with a traceback and an exit code of its own."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, or one that is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


def without_readers(streams: Iterable[IO[str]]) -> bool:
    """Whether one of the streams is a pipe that nobody reads any more, which is silenced."""
    broken = False
    for stream in streams:
        try:
            number = stream.fileno()
        except (OSError, ValueError, AttributeError):  # no file
            continue
        poll = select.poll()
        poll.register(number, 0)  # errors alone
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            broken = True
            silence(stream)
    return broken

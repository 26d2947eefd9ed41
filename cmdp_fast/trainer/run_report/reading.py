"""Files that somebody else may have written, read within bounds and checked value by value.

Whatever such a file holds is an InputError that names it, its line and what was expected, or a value of the type that
is asked for.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from cmdp_fast.errors import InputError, first_line, readable, shown

T = TypeVar("T")

LONGEST_LINE = 1 << 26  # bytes of a line of JSON: a completion of a million tokens takes some 30 MB
MOST_LINES, LONGEST_LINES = 1 << 22, 1 << 32  # of a file of lines, and its bytes
LONGEST_FILE = 1 << 24  # bytes of a file that is read whole
LARGEST = 1e100  # of a number: k3 reaches float32's 3e38, and the square of this one is still a float
MISSING = object()


class Place(NamedTuple):
    """Where a value stands, for messages."""

    path: Path
    line: int = 0

    def wrong(self, what: str) -> InputError:
        """The error that something else was expected there."""
        line = f", line {self.line}" if self.line else ""
        return InputError(f"{readable(str(self.path))}{line}: {what}")


class Line(NamedTuple):
    """A line of a file: where it stands, the byte that it begins at, and the table that it holds."""

    place: Place
    start: int
    values: dict[str, Any]


def is_there(path: Path) -> bool:
    """Whether something has this name, a link that leads nowhere too."""
    return os.path.lexists(path)


def check_regular(path: Path, largest: int | None = None) -> None:
    """Raises InputError unless a path is a file, no link, of so many bytes at most."""
    opened(path, largest).close()


def opened(path: Path, largest: int | None = None) -> BinaryIO:
    """A file to be read. Raises InputError for a link, which may lead out of the folder, and for all that is no file: a
    pipe would wait for a writer."""
    if path.is_symlink():
        raise Place(path).wrong("is a link, expected a file")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise Place(path).wrong(f"cannot be read: {first_line(error)}") from error
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or (largest is not None and about.st_size > largest):
        os.close(descriptor)
        size = "" if largest is None else f" of at most {largest >> 20} MiB"
        raise Place(path).wrong(f"expected a file{size}")
    return os.fdopen(descriptor, "rb")


def tables(path: Path, dropped: Callable[[str], None] | None = None) -> Iterator[Line]:
    """The lines of a file, each a JSON object. A last one without an end is ``dropped``, which is said: a training that
    was killed leaves such a one. Without that it is a line like any other."""
    with opened(path, LONGEST_LINES) as file:
        start = 0
        for count, text in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if dropped is not None and len(text) <= LONGEST_LINE and not text.endswith(b"\n"):
                dropped(f"{readable(str(path))}: the last line is not whole and is dropped")
                return
            if count > MOST_LINES:
                raise Place(path).wrong(f"expected at most {MOST_LINES:,} lines")
            yield Line(Place(path, count), start, table(text, Place(path, count)))
            start += len(text)


def table(text: bytes, place: Place) -> dict[str, Any]:
    """The JSON object in a line."""
    if len(text) > LONGEST_LINE:
        raise place.wrong(f"expected at most {LONGEST_LINE >> 20} MiB")
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise place.wrong(f"expected a JSON object: {readable(first_line(error))}") from error
    if not isinstance(value, dict):
        raise place.wrong(f"expected a JSON object, not {shown(value)}")
    return value


def as_json_text(value: Any, place: Place) -> str:
    """A value out of JSON as JSON. Raises InputError for one that is nested too deep to be written."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    except RecursionError as error:
        raise place.wrong("expected fewer brackets inside one another") from error


def number(values: dict[str, Any], name: str, place: Place) -> float | None:
    """A number, None where there is none, or one that is not finite: JSON has null in its place."""
    return as_number(values.get(name), name, place)


def as_number(value: Any, name: str, place: Place) -> float | None:
    """The same of the value itself."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if type(value) not in (int, float) or abs(value) > LARGEST:
        raise place.wrong(f"{readable(name)} is {shown(value)}, expected a number up to {LARGEST:g}")
    return float(value)


def of_type(values: dict[str, Any], name: str, kind: type[T], place: Place, default: Any = MISSING) -> T:
    """A value of a type (a bool is no int). Raises InputError where it has another, or is not there and has no
    ``default``."""
    value = values.get(name, default)
    if value is MISSING:
        raise place.wrong(f"{name} is missing")
    if value is not default and type(value) is not kind:
        raise place.wrong(f"{name} is {shown(value)}, expected {_NAMES[kind]}")
    return value


_NAMES: dict[type, str] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}

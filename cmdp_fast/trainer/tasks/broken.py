"""Where a JSON file is broken: the libraries that read it name no place, or count from the start of a block."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cmdp_fast.errors import readable

MOST = 2**30  # bytes of a file that is looked through


def where_broken(path: Path) -> str:
    """``line 4: Expecting value``, for the first line that is no object in JSON, or for a file that is one list; ""
    where no such place is found. A file of lines is read one at a time.

    Raises OSError if the file cannot be read.
    """
    if path.suffix not in (".json", ".jsonl") or path.stat().st_size > MOST:
        return ""
    number = 0

    def decoded(file: BinaryIO) -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(file, 1):
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    with open(path, "rb") as file:
        lines = decoded(file)
        try:
            first = next((line for line in lines if line.strip()), "")
            if first.lstrip().startswith("[") or (path.suffix == ".json" and _problem(first)):
                return _problem("\n" * (number - 1) + first + "".join(lines), whole=True)
            for line in itertools.chain([first], lines):
                if line.strip() and (problem := _problem(line)):
                    return f"line {number}: {problem}"
        except UnicodeDecodeError:
            return f"line {number} is no text in UTF-8"
    return ""


def _problem(text: str, whole: bool = False) -> str:
    """The problem of a JSON text, an object unless it is a ``whole`` file; "" if it has none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return f"line {error.lineno}: {error.msg}" if whole else f"{error.msg}, in {readable(text.strip(), 60)!r}"
    except (ValueError, RecursionError):
        return "it is too deep, or holds too long a number"
    if whole or isinstance(value, dict):
        return ""
    return f"expected an object for each row, not {readable(text.strip(), 60)!r}"

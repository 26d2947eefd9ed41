"""Files known again: the sha256 of each file in a folder, and JSON that carries its own.

They show that a disk, a copy or a hand has changed a file. They are no signature: a person who changes a file on
purpose can change its sha256 as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from cmdp_fast.errors import first_line, readable
from cmdp_fast.files import as_json, write_text

CHUNK = 1 << 20  # bytes that are read at once


class Damaged(ValueError):
    """A file is not as it was written. The message is one line that names it."""


def sha256(path: Path) -> str:
    """The sha256 of a file's contents in hexadecimal; the file is read a piece at a time."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def opened(path: Path) -> BinaryIO:
    """A file to be read. Raises OSError for what is none: a pipe waits for a writer, and a device may have no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is no file")
    return os.fdopen(descriptor, "rb")


def digests(folder: Path, names: Iterable[str] = (".",)) -> dict[str, str]:
    """The sha256 of these files of a folder, and of every file in those that are folders, by name inside the folder."""
    by_name: dict[str, str] = {}
    for name in names:
        path = folder / name
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        by_name |= {file.relative_to(folder).as_posix(): sha256(file) for file in sorted(files)}
    return by_name


def check_digests(folder: Path, expected: Any) -> None:
    """Raises Damaged unless the folder's files are those with these digests; it may hold others."""
    if not isinstance(expected, dict):
        raise Damaged("the list of its files is not one")
    for name, digest in expected.items():
        path, inside = folder / name, PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise Damaged(f"{name!r} is not a file inside the folder")
        try:
            present = sha256(path)
        except (OSError, ValueError) as error:
            raise Damaged(f"{name} is not there, or cannot be read ({first_line(error)})") from error
        if present != digest:
            raise Damaged(
                f"{name} is not as it was written (its sha256 begins {present[:12]}, not {readable(str(digest)[:12])})"
            )


def check_nothing_else(folder: Path, expected: Iterable[str]) -> None:
    """Raises Damaged if the folder holds a file or a link beside these; hidden files are passed over."""
    names = set(expected)
    for parent, folders, files in os.walk(folder):
        for name in files + [name for name in folders if (Path(parent) / name).is_symlink()]:
            path = Path(parent) / name
            inside = path.relative_to(folder).as_posix()
            if path.is_symlink() or (inside not in names and not name.startswith(".")):
                raise Damaged(f"{inside} does not belong there")


def write_sealed(path: Path, value: dict[str, Any], mode: int = 0o666) -> None:
    """Writes JSON with its own sha256 in it, as `write_text` does. Raises InputError if it cannot be written."""
    write_text(path, _sealed(value), mode)


def read_sealed(path: Path) -> dict[str, Any]:
    """The value that `write_sealed` wrote. Raises Damaged if the file holds anything else, down to the last byte."""
    try:
        with opened(path) as file:
            text = file.read().decode()
        value = json.loads(text)
        written = value.pop("sha256", None)
        fits = text == _sealed(value)
    except FileNotFoundError as error:
        raise Damaged(f"{path.name} is not there") from error
    except Exception as error:  # the file may hold anything
        raise Damaged(f"{path.name} cannot be read: {first_line(error)}") from error
    if written is None:
        raise Damaged(f"{path.name} lacks its own sha256: an earlier version of cmdp_fast wrote it, or somebody else")
    if not fits:
        raise Damaged(f"{path.name} does not fit its own sha256: it is damaged, or was changed by hand")
    return value


def _sealed(value: dict[str, Any]) -> str:
    digest = hashlib.sha256(as_json(value).encode()).hexdigest()
    return as_json({**value, "sha256": digest}, indent=2) + "\n"

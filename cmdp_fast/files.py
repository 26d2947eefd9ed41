"""Files whose contents appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cmdp_fast.errors import InputError, first_line, readable

PROBE = 4096  # bytes: a block, which a full disk has not
LARGER = 1 << 20  # and what is hardly left where a file of many of these has found no room
SCRATCH = ".cmdp-fast-"  # how the name of a folder begins that is there for a moment
HOUR = 3600.0  # seconds


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Writes a file that replaces an earlier one once it is complete. Raises InputError if it cannot be written."""
    with replacing(path, mode) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A name under which the body writes a file, of a mode less the umask; it becomes `path` once it is complete.
    Raises InputError if it cannot be written."""
    part = _part(path)
    with writing(path):
        part.unlink(missing_ok=True)  # a kill's, or a link or a pipe that somebody has put there: never written to
        # Made here and by nobody else, so that the body opens no link that has come there since. In a folder like /tmp,
        # where others may make files and remove none of ours, it stays what it is.
        rights = _made(part, mode)
        try:
            yield part
            _set_rights(part, rights)  # safetensors puts a file of its own there, closed to all but its owner
            sync(part)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def open_as_others(folder: Path) -> None:
    """Gives the files of safetensors in a folder and below the rights that the umask leaves to every other file: that
    library closes its own to all but their owner."""
    probe = folder / ".rights"
    rights = _made(probe, 0o666)
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        _set_rights(path, rights)


def _made(path: Path, mode: int) -> int:
    """Makes a file, which must not be there; returns what the umask has left of its mode. To ask for the umask itself
    would be to change it, for other threads too."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _set_rights(path: Path, rights: int) -> None:
    """Of a file itself, and of nothing that a link in its place leads to. Where a file system refuses, as some that are
    mounted from elsewhere do, they stay as they are: the file counts for more."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != rights:
            with suppress(OSError):
                os.fchmod(descriptor, rights)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what stops the body from writing a file or a folder into an InputError that names it: a full disk, mostly.

    PyTorch and safetensors have errors of their own for that. PyTorch's say nothing of a disk, so that is tried.
    """
    stops: tuple[type[Exception], ...] = (OSError, RuntimeError)
    if "safetensors" in sys.modules:  # it comes with the trainer's packages, which may be absent
        stops += (sys.modules["safetensors"].SafetensorError,)
    try:
        yield
    except stops as error:
        reason = "" if isinstance(error, OSError) else _refused(path)
        raise InputError(f"{path} could not be written: {reason}{first_line(error)}") from error


def _refused(path: Path) -> str:
    """Why nothing can be written where a file was to be, with a colon, such as a full disk; empty if something can."""
    place = next((folder for folder in path.parents if folder.is_dir()), Path("."))
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(LARGER))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return f"{(error.strerror or first_line(error)).lower()}: "
    return ""


def check_writable(folder: Path, said: str) -> None:
    """Raises InputError, with the path and the reason, unless files can be written into a folder, which need not be
    there yet. ``said`` is what named it. A block is written to see it; nothing of that is left. What a kill has left of
    an earlier look goes after an hour."""
    place, missing = folder, list[str]()
    try:
        while not place.exists():
            if place.is_symlink():
                raise InputError(f"{said}: {place} is a link to nothing")
            missing.append(place.name)
            place = place.parent
        if not place.is_dir():
            raise InputError(f"{said}: {place} is a file, expected a folder")
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=place) as scratch:
            remove_scratch(place, os.stat(scratch).st_mtime - HOUR)
            inner = Path(scratch, *([] if ".." in missing else missing[::-1]))  # for names that are too long
            inner.mkdir(parents=True, exist_ok=True)
            with open(inner / "probe", "wb") as probe:
                probe.write(bytes(PROBE))
                probe.flush()
                os.fsync(probe.fileno())
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name with a zero
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{said}: {readable(str(place))} cannot be written to: {reason}") from error


def check_encodable(path: str, said: str) -> None:
    """Raises InputError for a name that is not UTF-8: safetensors and tokenizers write no model there, which would be
    found at the end of a training."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        known = sys.getfilesystemencoding()
        hint = "" if known == "utf-8" else f"; Python reads names as {known} here, with PYTHONUTF8=1 as UTF-8"
        raise InputError(f"{said} is not UTF-8, and no model can be written there{hint}") from error


def check_replaceable(path: Path, said: str) -> None:
    """The same for a file that `replacing` is to write, which may be there: one name beside it, and its own, must be
    possible, and it must be no folder."""
    if path.is_dir():
        raise InputError(f"{said} is a folder, expected a file")
    if not path.parent.is_dir():
        raise InputError(f"{said}: there is no folder {readable(str(path.parent))}")
    check_writable(path.parent / _part(path).name, said)


def remove_scratch(folder: Path, before: float = math.inf) -> None:
    """Removes what a process that was killed has left of a folder that was to be there for a moment (`SCRATCH`), if it
    is older than a time of that file system's clock, and ours."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if re.fullmatch(re.escape(SCRATCH) + "[a-z0-9_]{8}", entry.name):
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mtime < before:
                    shutil.rmtree(entry.path, ignore_errors=True)


def sync(path: Path) -> None:
    """Has the disk keep what was written to a file, or the names in a folder, even if the machine stops now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """The same for a folder and everything in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_json(path: Path, value: Any) -> None:
    """The same for JSON."""
    write_text(path, as_json(value, indent=2) + "\n")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

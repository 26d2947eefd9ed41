"""Where models that a recipe makes for itself are kept, how they get there whole, and whether they still are."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from cmdp_fast.digest import Damaged, check_digests, check_nothing_else, digests, read_sealed, write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.files import writing
from cmdp_fast.masking import home

from ..records.lock import alone_in

FILES = "files.json"  # the sha256 of all others


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/cmdp_fast`` or ``~/.cache/cmdp_fast``. Raises InputError if there is neither, or if somebody
    else could put models there, as `check_own` says."""
    given, own = os.environ.get("XDG_CACHE_HOME"), home()
    if not given and own is None:
        raise InputError("there is no home folder to keep models in: set XDG_CACHE_HOME to a folder")
    folder = Path(given or f"{own}/.cache") / "cmdp_fast"
    if folder.exists():
        check_own(folder)
    return folder


def check_own(folder: Path) -> None:
    """Raises InputError if a folder is another user's, or everybody may write to it: what lies there is loaded, and its
    sha256 lies beside it. Root may have another user's."""
    with writing(folder):
        about, user = folder.stat(), os.geteuid()
    if user and about.st_uid not in (user, 0):
        raise InputError(
            f"{folder} is another user's, who could put any model there: set XDG_CACHE_HOME to one of yours"
        )
    if about.st_mode & stat.S_IWOTH:
        raise InputError(
            f"{folder} may be written to by everybody, with any model: chmod go-w {shlex.quote(str(folder))}"
        )


def made_once(folder: Path, make: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    """The folder, filled by `make` now if it is not there or no longer as it was made, which is said. The one that it
    is in is made for its owner alone.

    A process that is killed leaves nothing under that name, and the next one that makes the folder removes the rest.
    One process makes it at a time; others wait, and find it made.
    """
    if damage(folder) is None:
        return folder
    with writing(folder.parent):
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_own(folder.parent)
    with alone_in(folder.parent, say, wait=True):
        what = damage(folder)  # another process may have made it meanwhile
        if what is None:
            return folder
        for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with writing(folder.parent):
            scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            if folder.exists():
                say(f"{folder}: {what}: made again")
            with writing(folder):
                make(scratch)
                write_sealed(scratch / FILES, {"files": digests(scratch)})
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def damage(folder: Path) -> str | None:
    """The damage to a folder that `made_once` has made, None if there is none."""
    try:
        files = read_sealed(folder / FILES).get("files", {})
        check_digests(folder, files)
        check_nothing_else(folder, [FILES, *files])
    except Damaged as error:
        return str(error)
    return None

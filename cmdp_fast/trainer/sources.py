"""Where the name of a dataset or a model leads: to a path on this machine, or to a hub.

A path that is not there is never asked a hub for. A hub is asked for a first answer once in a load. If none comes, in
seconds, what its cache holds is taken; the libraries would try every file five times, with pauses.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cmdp_fast.errors import InputError, first_line, readable

FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip")
PATIENCE = 10.0  # seconds for the first answer of a hub

_load: ExitStack | None = None  # what the load at hand has to put back
_answers = False  # whether the hub has answered in it
_away = ""  # why the hub is not asked in it


def check_path(option: str, name: str, file_too: bool) -> None:
    """Raises InputError for an address, and if a name is that of a path, and nothing is there, with what is called
    alike in its place.

    A hub's ids are `name` and `owner/name`; ``file_too``: or a file, which its ending tells of, or a dataset with
    `hf://` before it, which `datasets` takes as one of the hub.
    """
    path = Path(name)
    if os.path.lexists(path) or (file_too and name.startswith("hf://")):
        return
    if "://" in name:
        raise InputError(f"{option} {name}: that is an address; for what is on the hub give its id, owner/name")
    if not _is_path(name, file_too):
        return
    home = Path(os.path.expanduser(name))
    if name.startswith("~") and home.exists():
        raise InputError(f"{option} {name}: the shell has left the ~ as it is; did you mean {readable(str(home))}?")
    if not path.parent.is_dir():
        raise InputError(f"{option} {name}: there is no folder {path.parent}")
    raise InputError(f"{option} {name}: there is no such {'file or folder' if file_too else 'folder'}{alike(path)}")


def _is_path(name: str, file_too: bool) -> bool:
    return (
        name.startswith((".", "~", os.sep))
        or name.count(os.sep) > 1
        or name.endswith(os.sep)
        or (file_too and Path(name).suffix.lower() in FILES)
    )


def alike(path: Path) -> str:
    """What in the folder of a path has a name like its own, as the end of a sentence; nothing if nothing has."""
    try:
        names = [name for name in os.listdir(path.parent) if name.isprintable()]
    except OSError:
        return ""
    stems = difflib.get_close_matches(path.stem, [Path(name).stem for name in names], n=3)
    near = [*difflib.get_close_matches(path.name, names, n=3), *(name for name in names if Path(name).stem in stems)]
    close = [str(path.parent / name) for name in dict.fromkeys(near)][:3]
    return f" (did you mean {', '.join(close)}?)" if close else ""


@contextmanager
def loading() -> Iterator[None]:
    """A load, of which all that the body loads is a part. Until its end a hub that does not answer is left alone, and
    one that does is not asked again: by the next one it may be otherwise. What is a part of another load has no end of
    its own."""
    global _load, _answers, _away
    if _load is not None:
        yield
        return
    try:
        with ExitStack() as _load:
            yield
    finally:
        _load, _answers, _away = None, False, ""


def find_hub() -> None:
    """Asks the hub for a first answer, once inside of `loading`. If there is none it is left alone in the rest of the
    load, and what its cache holds is taken, as with HF_HUB_OFFLINE."""
    import datasets
    from huggingface_hub import constants, get_session

    global _answers, _away
    if _answers:
        return
    if constants.HF_HUB_OFFLINE or _away:
        _away = _away or "HF_HUB_OFFLINE is set, so that nothing but the cache is looked at"
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        _answers = True
    except Exception as error:  # of the client that its version has, and of proxies
        _away = (
            f"{constants.ENDPOINT} cannot be reached ({readable(first_line(error))}), and the cache does not hold it: "
            "give a path, or see to the network"
        )
        assert _load is not None
        log = logging.getLogger("huggingface_hub")
        _load.callback(log.setLevel, log.level)
        both: tuple[Any, ...] = (constants, datasets.config)
        for flags in both:
            _load.callback(setattr, flags, "HF_HUB_OFFLINE", flags.HF_HUB_OFFLINE)
            flags.HF_HUB_OFFLINE = True
        log.setLevel(logging.ERROR)  # it would tell of it once more for every file


def with_hub(reason: str, name: str) -> str:
    """The reason why something could not be loaded, and where the hub was not asked for it, why."""
    return reason if not _away or Path(name).exists() else f"{reason.rstrip('.')}; {_away}"

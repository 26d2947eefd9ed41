"""What a run is made of beside its settings: its problems, its student and its teacher, as digests in `config.json`.

A run that goes on with other problems or another teacher under the same path would be a mixture of two. The digest of
the problems is of every row that is trained or evaluated on, in order. That of a model is of the small files that
transformers reads, whole, and of each file of weights its name, its size, its header of names and shapes, and `PIECES`
pieces: a digest of fourteen gigabytes would take a minute. A model that was trained further is noticed, since that
moves every weight; weights that were changed between the pieces alone are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from cmdp_fast.digest import Damaged, read_sealed, sha256
from cmdp_fast.errors import InputError, readable
from cmdp_fast.teachers.teacher import Teacher
from cmdp_fast.weight_files import INDEX, ONE, read_index

from ..settings.config import TrainConfig

PIECES, PIECE = 16, 1 << 20  # of a file of weights; bytes of each
HEADER = 1 << 26  # bytes at most: the length that a file names may be anything
WHOLE = ("config.json", "generation_config.json", "added_tokens.json", "special_tokens_map.json", "merges.txt")
WHOLE_LIKE = ("tokenizer", "vocab", "chat_template", "model.safetensors.index")  # beginnings of other names
WHOLE_KINDS = (".model", ".py")  # of a tokenizer; a model's own code
SMALL = 1 << 28  # bytes at most of a file that is read whole; large tokenizers have 35 million


def origin_of(
    folders: Mapping[str, str], problems: Sequence[Sequence[Mapping[str, Any]]], asked: Teacher | None = None
) -> dict[str, str]:
    """The digests of some sets of problems, of the models that lie in these folders, or under these hub ids, and of
    what a teacher that is asked says of itself."""
    digests = {"problems": _of_problems(problems), **{role: model_digest(name) for role, name in folders.items()}}
    return digests if asked is None else {**digests, "teacher": asked.digest}


def check_origin(config: TrainConfig, now: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Raises InputError if the run to be resumed began with other problems or models.

    Says so where it recorded none: an earlier version of this package began it.
    """
    try:
        began = read_sealed(Path(config.resume) / "config.json").get("origin")
    except Damaged as error:
        raise InputError(f"--resume {config.resume}: {error}") from error
    if not isinstance(began, dict):
        say(f"{config.resume} recorded no digests of its problems and models: they are not compared")
        return
    source = f"--task {config.task}" if config.task else f"--dataset {config.dataset}"
    named = {"problems": f"the problems of {source} are", "student": f"the files of --student {config.student} are"}
    named["teacher"] = f"the files of --teacher {config.teacher} are"
    for what, digest in now.items():
        if began.get(what) != digest:
            raise InputError(
                f"--resume {config.resume}: {named[what]} not what the run began with (sha256 {digest[:12]}, recorded "
                f"{str(began.get(what))[:12]}): put that back, or begin another run"
            )


def _of_problems(sets: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    digest = hashlib.sha256()
    for rows in sets:
        digest.update(b"\x00set\x00")
        for row in rows:
            digest.update(json.dumps(_plain(row)).encode() + b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A value of a row as JSON: of bytes and images a digest, of dates their text, of anything else its kind alone, for
    its text may hold an address."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return [[_plain(key), _plain(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if callable(content := getattr(value, "tobytes", None)):  # of images and arrays
        return hashlib.sha256(content()).hexdigest()
    return value.isoformat() if isinstance(value, (date, time)) else type(value).__name__


def too_large(paths: Iterable[Path]) -> str:
    """Which of some files that are read whole is too large for that, and how large; "" if none is."""
    for path in paths:
        if (size := path.stat().st_size) > SMALL:
            return f"its {readable(path.name)} has {size:,} bytes, expected at most {SMALL:,}"
    return ""


def whole_files(folder: Path) -> list[Path]:
    """The files in a model's folder that are read whole."""
    return [path for path in sorted(folder.iterdir()) if _is_whole(path) and path.is_file()]


def model_digest(name: str) -> str:
    """The digest of a model in a folder, or under a hub id. Raises InputError for a file that would be read whole, and
    is too large for that."""
    folder = _local(name)
    if fault := too_large(whole_files(folder)):
        raise InputError(f"{name}: {fault}")
    digest, weights = hashlib.sha256(), _weights(folder)
    for path in sorted(folder.iterdir()):
        if path.is_file() and _is_whole(path):
            digest.update(f"{path.name} {sha256(path)}\n".encode())
        elif path.is_file() and path.name in weights:
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(min(HEADER, int.from_bytes(file.read(8), "little"))))
                for start in _starts(path.stat().st_size):
                    file.seek(start)
                    digest.update(file.read(PIECE))
    return digest.hexdigest()


def _weights(folder: Path) -> set[str]:
    """The files of weights that transformers reads. A hub's folder may hold the same weights in other files besides,
    `consolidated.safetensors` for one, or get them later."""
    if (folder / ONE).is_file() or not (folder / INDEX).is_file():
        return {ONE}
    return {*read_index(folder / INDEX).values()}


def _is_whole(path: Path) -> bool:
    return path.name in WHOLE or path.name.startswith(WHOLE_LIKE) or path.suffix in WHOLE_KINDS


def _starts(size: int) -> list[int]:
    """Where the pieces of a file begin: all of a small one, else the first, the last and some between, evenly apart."""
    if size <= PIECES * PIECE:
        return list(range(0, size, PIECE))
    return [i * (size - PIECE) // (PIECES - 1) for i in range(PIECES)]


def _local(name: str) -> Path:
    """The folder of a model, that of its files in the hub's cache where it is a hub id."""
    if (folder := Path(name)).is_dir():
        return folder
    from transformers.utils import cached_file

    found = cached_file(name, "config.json")
    assert found is not None  # its configuration has been read
    return Path(found).parent

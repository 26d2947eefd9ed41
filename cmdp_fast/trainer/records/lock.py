"""One process at a time in a folder, by a lock that ends with its holder, however that ends.

It is the kernel's (flock) on a hidden file of the folder, which names the holder and is empty when that has left.
Between machines it holds as far as their file system's locks do (NFS asks its server, Lustre has to be mounted with
flock). Where a file system has no locks, processes are not kept apart, and that is said.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cmdp_fast.errors import InputError, first_line
from cmdp_fast.files import writing

_held: set[IO[str]] = set()


def _forget() -> None:
    """In a child that was forked: it is not the holder, and must not keep the lock when the holder is gone."""
    for lock in _held:
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def alone_in(folder: Path, say: Callable[[str], None], wait: bool = False) -> Iterator[int]:
    """Holds the lock of a folder that is there; yields its descriptor, which a program that is started may hold too.

    Raises InputError, which names the holder, if another process has it (with `wait` waits for that one), and if the
    folder cannot be written to.
    """
    path = folder / ".lock"
    with _opened(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = lock.read(200).strip()
            if not holder.isprintable() or not holder:
                holder = "another process"
            raise InputError(f"{folder}: {holder}, or one that it has started, is at work here") from error
        except OSError as error:
            say(f"{folder}: no lock on this file system ({first_line(error)}), nothing keeps another process away")
        if not _is_there(lock, path):
            raise InputError(f"{folder}: another process has just removed it, or its lock; try again")
        with writing(path):
            _write(lock.fileno(), _self())
        _held.add(lock)
        try:
            yield lock.fileno()
        finally:
            _held.discard(lock)
            with suppress(OSError):  # the folder may be sent to somebody, whom process and host are nothing to
                os.ftruncate(lock.fileno(), 0)


@contextmanager
def name_holder(lock: int, other: str) -> Iterator[None]:
    """While the body lasts the lock's file names another holder beside this process, for the message of `alone_in`:
    one that is left when this process is killed."""
    _say(lock, f"{_self()} ({other})")
    try:
        yield
    finally:
        _say(lock, _self())


def _say(lock: int, holder: str) -> None:
    with suppress(OSError):  # a full disk: the lock holds all the same
        _write(lock, holder)


def _self() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _write(lock: int, holder: str) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{holder}\n".encode(errors="replace"), 0)


def _is_there(lock: IO[str], path: Path) -> bool:
    """Whether the file is still the one of that name, which others open."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
    except OSError:
        return False


def _opened(path: Path) -> IO[str]:
    """The file for reading and writing, made if need be; not through a link, which could lead to anybody's file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with writing(path):
        return open(path, "r+", errors="replace", opener=lambda name, _: os.open(name, flags, 0o666))

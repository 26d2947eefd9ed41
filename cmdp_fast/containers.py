"""What a container, or a job of a cluster, leaves this process of the machine: the limits of Linux's control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # version 1 says "no limit" by a number of bytes beyond this
LONGEST = 20  # digits of a number of 64 bits


def memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each group that this process is in. What is in use counts without the files that were
    read, which the kernel gives up before it refuses any memory."""
    for folder in _groups("memory"):
        for limit, used, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None and most < UNLIMITED:
                stat = _words(folder / "memory.stat")
                told = dict(zip(stat[::2], stat[1::2], strict=False))
                files = (_whole(told.get(f"{prefix}{kind}_file", "")) for kind in ("inactive", "active"))
                yield most, max(0, now - sum(each or 0 for each in files))


def processor_limits() -> Iterator[float]:
    """The processors whose time each group that this process is in may take."""
    for folder in _groups("cpu"):
        words = _words(folder / "cpu.max")  # "max 100000", or microseconds of so many
        if len(words) == 2:
            yield from _share(*map(_whole, words))
        yield from _share(_number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us"))


def _share(quota: int | None, period: int | None) -> Iterator[float]:
    if quota is not None and period:  # -1: no limit
        yield quota / period


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups of this process, of both versions, from its own up to the root."""
    for line in _text(PROC / "self" / "cgroup").split("\n"):
        _, *rest = line.split(":", 2)
        if len(rest) != 2 or (rest[0] and controller not in rest[0].split(",")):
            continue
        root = CGROUPS / controller if rest[0] else CGROUPS
        here = root / rest[1].lstrip("/")
        yield from (folder for folder in (here, *here.parents) if folder == root or root in folder.parents)


def _number(path: Path) -> int | None:
    return _whole(next(iter(_words(path)), ""))


def _whole(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdigit() and len(word) <= LONGEST else None


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    """Of a file that the kernel makes, of which each may be absent, and names groups by any bytes."""
    try:
        return os.fsdecode(path.read_bytes())
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return ""

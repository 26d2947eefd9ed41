"""What a container, or a job of a cluster, leaves this process of the machine: the limits of Linux's control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # version 1 says "no limit" by a number of bytes beyond this


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
                files = (told.get(f"{prefix}{kind}_file", "0") for kind in ("inactive", "active"))
                yield most, max(0, now - sum(int(each) for each in files if each.isdigit()))


def processor_limits() -> Iterator[float]:
    """The processors whose time each group that this process is in may take."""
    for folder in _groups("cpu"):
        words = _words(folder / "cpu.max")  # "max 100000", or microseconds of so many
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            yield int(words[0]) / int(words[1])
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and period:  # -1: no limit
            yield quota / period


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups of this process, of both versions, from its own up to the root."""
    try:
        own = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in own:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        here = root / path.lstrip("/")
        yield from (folder for folder in (here, *here.parents) if folder == root or root in folder.parents)


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []

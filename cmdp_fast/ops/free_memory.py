"""How much memory a device has left."""

from __future__ import annotations

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # of a container: its limit is not that of the machine


def free_memory(device: torch.device) -> int | None:
    """The bytes that could be allocated on a device; None where the system does not tell.

    On a GPU what the driver has left and what PyTorch's allocator holds unused, a part of which may be in pieces too
    small for use. None while a graph is captured, which no question to the driver may disturb: a step that needs small
    tiles has to be told so by hand there.
    """
    if device.type == "cpu":
        return _free_on_the_host()
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    try:
        held = torch.cuda.memory_stats_as_nested_dict(device)  # `memory_reserved` and its like sort all of it each
        return free + held["reserved_bytes"]["all"]["current"] - held["allocated_bytes"]["all"]["current"]
    except (RuntimeError, KeyError):  # an allocator that was plugged in and keeps no statistics
        return free


def _free_on_the_host() -> int | None:
    """What the kernel calls available, and what the container's limit leaves of it."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such limit: the file is absent or says "max"
        return free
    return min(free, max(0, limit - used + _cached_files()))


def _cached_files() -> int:
    """What a container holds of files that it has read, which the kernel gives up before it refuses any memory."""
    try:
        lines = dict(line.split(" ", 1) for line in (CGROUP / "memory.stat").read_text().splitlines())
        return int(lines["inactive_file"]) + int(lines["active_file"])
    except (OSError, KeyError, ValueError):
        return 0

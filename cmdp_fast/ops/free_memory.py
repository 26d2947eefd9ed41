"""How much memory a device has left."""

from __future__ import annotations

import torch

from cmdp_fast import containers


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
    """What the kernel calls available, and what the limits of containers leave of it."""
    try:
        lines = dict(line.split(":", 1) for line in (containers.PROC / "meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return min([free, *(max(0, limit - used) for limit, used in containers.memory_limits())])

"""How large a tile of logits is, so that it is still in the cache when the statistics read what a GEMM has written.

A tile is R rows by C columns of both models' logits. A GEMM writes it once for every block of its inner dimension, the
statistics read it, the backward pass overwrites it and two more GEMMs read it. The head and the hidden states stream
past it meanwhile and need their own part of the last-level cache, hence the pair of tiles gets an eighth of it. (Pairs
from a twentieth to three quarters of the cache were timed on one CPU: the small ones were 4 % faster than the large at
hidden size 576, and 12 % at 1536 and 3584.) Within that area rows come first, up to `ROWS`: every tile of rows reads
the piece of the head again, and R is the inner dimension of the head's gradient.

The size changes speed and memory, and results by no more than rounding. ``CMDP_FAST_TILE_BYTES`` overrides the area,
for caches that the system reports wrongly (virtual machines) and for memory that is short.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

ROWS = 1024
COLUMNS = 768  # C is a multiple of this: whole vectors and whole steps of the native kernels, whole blocks of a GEMM
SHARE = 8  # a pair of tiles takes this part of the cache
UNKNOWN_CACHE = 4 * 2**20  # a thread's share where the system does not tell
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def tile_shape(rows: int, columns: int, element_size: int, device: torch.device) -> tuple[int, int]:
    """(R, C) for ``rows`` x ``columns`` logits of both models that take ``element_size`` bytes a pair."""
    tiles = -(-rows // ROWS)
    height = max(1, -(-rows // max(1, tiles)))  # rows are dealt out evenly
    width = tile_bytes(device) // (height * element_size) // COLUMNS * COLUMNS
    return height, min(max(width, COLUMNS), max(1, columns))


def tile_bytes(device: torch.device) -> int:
    """What a pair of tiles may take on a device."""
    given = os.environ.get("CMDP_FAST_TILE_BYTES")
    if given is not None:
        if not given.isdecimal() or int(given) == 0:
            raise ValueError(f"CMDP_FAST_TILE_BYTES must be a positive number of bytes, got {given!r}")
        return int(given)
    if device.type == "cuda":
        # A product of two small tiles would not fill the device, nor last as long as launching it takes.
        return torch.cuda.get_device_properties(device).L2_cache_size * 3 // 4
    return _cache_of_a_core() * torch.get_num_threads() // SHARE


@functools.cache
def _cache_of_a_core() -> int:
    """The last-level cache over the cores that share it."""
    try:
        levels = {int((index / "level").read_text()): index for index in CACHES.glob("index*")}
        last = levels[max(levels)]
        size = last.joinpath("size").read_text().strip()
        sharing = _count(last.joinpath("shared_cpu_list").read_text())
        return int(size.removesuffix("K")) * 1024 // sharing
    except (OSError, ValueError):
        return UNKNOWN_CACHE


def _count(cpus: str) -> int:
    """How many processors a list such as "0-3,8" names."""
    ends = [part.split("-") for part in cpus.strip().split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)

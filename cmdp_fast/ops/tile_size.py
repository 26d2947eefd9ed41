"""How large a tile of logits is: on a CPU it stays in the cache, on a GPU it fills the device for a while.

A tile is R rows by C columns of both models' logits. A GEMM writes it once for every block of its inner dimension, the
statistics read it, the backward pass overwrites it and two more GEMMs read it. The size changes speed and memory, and
results by no more than rounding. ``CMDP_FAST_TILE_BYTES`` overrides the bytes of a pair of tiles, for caches that the
system reports wrongly (virtual machines) and for memory that is short.

On a CPU the statistics are to find in the last-level cache what a GEMM has written. The head and the hidden states
stream past the tile meanwhile and need their own part, hence the pair of tiles gets an eighth of the cache. (Pairs
from a twentieth to three quarters were timed on one CPU: the small ones were 4 % faster than the large at hidden size
576, and 12 % at 1536 and 3584.) Within that area rows come first, up to `ROWS`: every tile of rows reads the piece of
the head again, and R is the inner dimension of the head's gradient.

On a GPU no tile that fits the L2 cache fills the multiprocessors: 1024 x 4608 are 144 blocks of 128 x 256 for the 132
of an H100, two waves where 1.1 would do, and hundreds of launches. So a pair takes up to `PAIR`, 8192 x 16384 columns
of float32: some thirty waves, and ten tiles for a vocabulary of 151936. Rows come first here too. R is the inner
dimension of the head's gradient, whose float32 sum is read and written once per tile of rows: 8 bytes for every 2 R
operations, which at 3 TB/s and 800 TFLOP/s take as long as the product at R = 1067 and an eighth of it at 8192. C is
the inner dimension of the hidden states' gradient, likewise, and wide enough when R is. Few rows are not made up for by
more than `WIDEST` columns: the head's piece in float32 grows with them. (Predictions; no GPU has timed them.)

A pair takes no more than 1 / `SHARE_OF_FREE` of the free memory. With the tile of its gradient (in half precision a
quarter more, with a softcap three quarters) and the pieces of the heads, each of which gets no more than a pair, all of
it stays below half. The limit is rounded down to a power of two, and so is the same from run to run while at least
8 GiB are free; below that the last bits of a result may differ between runs that find less memory. Set
``CMDP_FAST_TILE_BYTES`` where they must not.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from cmdp_fast.ops.free_memory import free_memory

# On a CPU
ROWS = 1024
COLUMNS = 768  # C is a multiple of this: whole vectors and whole steps of the native kernels, whole blocks of a GEMM
SHARE = 8  # a pair of tiles takes this part of the cache
UNKNOWN_CACHE = 4 * 2**20  # a thread's share where the system does not tell
WHOLE = 2**28  # bytes of a pair of tiles of whole rows
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

# On a GPU
GPU_ROWS = 8192  # R is a multiple of 128 where there are more: whole blocks of a GEMM
GPU_COLUMNS = 256  # C is a multiple of this, likewise
WIDEST = 32768
PAIR = 2**30
SHARE_OF_FREE = 8


def tile_shape(
    rows: int, columns: int, element_size: int, device: torch.device, column_bytes: int = 0
) -> tuple[int, int]:
    """(R, C) for ``rows`` x ``columns`` logits of both models that take ``element_size`` bytes a pair.

    ``column_bytes``: what a GPU holds beside the pair for every column of it, whatever the rows.
    """
    most, unit = (ROWS, COLUMNS) if device.type == "cpu" else (GPU_ROWS, GPU_COLUMNS)
    height = max(1, _dealt(rows, most))
    area = tile_bytes(device)
    if device.type == "cpu":
        width = area // (height * element_size) // unit * unit
        return height, min(max(width, unit), max(1, columns))
    if height < rows:
        height = min(most, -(-height // 128) * 128)
    width = min(area // (height * element_size), area // max(1, column_bytes), WIDEST)
    width = max(width // unit * unit, unit)
    return height, min(-(-_dealt(columns, width) // unit) * unit, max(1, columns))


def whole_rows(rows: int, columns: int, element_size: int, device: torch.device) -> int:
    """How many of ``rows`` rows are made at once whose logits stand whole, where a pair takes ``element_size`` bytes.

    On a CPU few whole rows of a language model fit the cache, and every tile reads both heads from memory. 2^28 bytes
    are 220 rows of a vocabulary of 152,064. On a GPU the limit is that of any tile. On one CPU, 1024 rows of the shape
    smollm2, the forward pass took 3.2 times as long as `divergence` of logits in full with 10 rows at once, 1.5 times
    with 42, and .96 times with 2^28 bytes. (``CMDP_FAST_TILE_BYTES=3932160``, ``16515072`` and unset, each time beside
    ``cmdp-fast bench linear_divergence --shapes smollm2 --repeat 3 --threads 2 --dtype float32 --peers eager``.)
    """
    area = WHOLE if device.type == "cpu" and given_bytes() is None else tile_bytes(device)
    return max(1, _dealt(rows, max(1, area // (columns * element_size))))


def _dealt(count: int, most: int) -> int:
    """The size of equal parts of a count, none of which is larger than ``most``."""
    return -(-count // max(1, -(-count // most)))


def tile_bytes(device: torch.device) -> int:
    """What a pair of tiles may take on a device."""
    given = given_bytes()
    if given is not None:
        return given
    if device.type == "cpu":
        return _cache_of_a_core() * torch.get_num_threads() // SHARE
    free = free_memory(device)
    share = PAIR if free is None else max(1, free // SHARE_OF_FREE)
    return min(PAIR, 1 << (share.bit_length() - 1))


def given_bytes() -> int | None:
    """What the environment says a pair may take, if it says so. Raises ValueError for anything but a number."""
    given = os.environ.get("CMDP_FAST_TILE_BYTES")
    if given is None:
        return None
    if not given.isdecimal() or int(given) == 0:
        raise ValueError(f"CMDP_FAST_TILE_BYTES must be a positive number of bytes, got {given!r}")
    return int(given)


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

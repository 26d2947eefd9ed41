"""How much a dataset says that it holds, before it is read: a file of kilobytes can unpack to more than any memory."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import torch

from cmdp_fast.errors import InputError
from cmdp_fast.ops.free_memory import free_memory

COLUMNS = 10_000  # of a table; a reader takes seconds for so many
ROW = 300  # bytes of a row of a column or two, as the dict that it becomes; most have more
CHUNK = 2**20
HEADER = 2**24  # bytes of a CSV's first line that are looked at


def check_file(path: Path, said: str, most: int) -> None:
    """Raises InputError for a table whose own account of itself, a Parquet's footer or the first line of a CSV, has
    more columns than `COLUMNS`, more rows than fit into the memory that is free, of which ``most`` are read (0: all),
    or parts that unpack to more than that; and for gzip that does, which `datasets` unpacks under any name. What cannot
    be read is passed: its reader says so."""
    if (size := _unpacked(path)) is not None:
        raise InputError(f"{said}: it is gzip, and unpacks to more than {_gib(size)}, which is all of the free memory")
    if path.suffix == ".csv":
        with open(path, "rb") as file:
            check_columns(file.readline(HEADER).count(b",") + 1, said)
        return
    if path.suffix != ".parquet":
        return
    from pyarrow import parquet

    try:
        about: Any = parquet.read_metadata(path)
        columns, rows = about.num_columns, about.num_rows
        largest = max((about.row_group(i).total_byte_size for i in range(about.num_row_groups)), default=0)
    except Exception:  # of a library that reads anybody's files, in whatever form
        return
    check_columns(columns, said)
    check_rows(rows, said, most)
    free = _free()
    if free is not None and largest > free:
        raise InputError(f"{said}: a part of it unpacks to {_gib(largest)}, and {_gib(free)} of memory are free")


def _unpacked(path: Path) -> int | None:
    """The memory that is free, where a file of gzip unpacks to more than that."""
    free, size = _free(), 0
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b" or free is None:
            return None
    try:
        with gzip.open(path) as unpacked:
            while piece := unpacked.read(CHUNK):
                size += len(piece)
                if size > free:
                    return free
    except (OSError, EOFError, zlib.error):
        pass
    return None


def check_columns(count: int, said: str) -> None:
    """Raises InputError for more columns than `COLUMNS`."""
    if count > COLUMNS:
        raise InputError(f"{said}: it has {count:,} columns, expected at most {COLUMNS:,}")


def check_rows(count: int, said: str, most: int) -> None:
    """Raises InputError for more rows than fit into the memory that is free, of which ``most`` are read (0: all)."""
    free, read = _free(), min(count, most or count)
    if free is not None and read * ROW > free:
        raise InputError(
            f"{said}: {read:,} rows take {_gib(read * ROW)} at least, and {_gib(free)} of memory are free: --streaming "
            "with a smaller --max-rows reads the first ones alone"
        )


def _free() -> int | None:
    return free_memory(torch.device("cpu"))


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"

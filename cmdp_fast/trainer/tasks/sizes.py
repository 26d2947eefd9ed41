"""How much a dataset says that it holds, before it is read: a file of kilobytes can unpack to more than any memory."""

from __future__ import annotations

import gzip
import re
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
HARMLESS = 2**30  # bytes that no dataset is refused for: what the system calls free is no promise


def check_file(path: Path, said: str, most: int) -> None:
    """Raises InputError for a table whose own account of itself, a Parquet's footer or the first line of a CSV, has
    more columns than `COLUMNS`, more rows than fit into the memory that is free, of which ``most`` are kept (0: all),
    or parts that unpack to more than that; and, where all are kept, for gzip that does, which `datasets` unpacks under
    any name. What cannot be read is passed: its reader says so."""
    free = _free()
    if not most and free is not None and _unpacks_to_more(path, room := max(free, HARMLESS)):
        raise InputError(
            f"{said}: it is gzip, and unpacks to more than {_size(room)}, and {_size(free)} of memory are free"
        )
    if path.suffix == ".csv":
        with open(path, "rb") as file:
            first = re.split(rb"[\r\n]", file.read(HEADER), maxsplit=1)[0]
        check_columns(first.count(b",") + 1, said)
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
    if free is not None and largest > max(free, HARMLESS):
        raise InputError(f"{said}: a part of it unpacks to {_size(largest)}, and {_size(free)} of memory are free")


def _unpacks_to_more(path: Path, room: int) -> bool:
    """Whether a file is gzip, and holds more bytes than there is room for."""
    size = 0
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return False
    try:
        with gzip.open(path) as unpacked:
            while piece := unpacked.read(CHUNK):
                size += len(piece)
                if size > room:
                    return True
    except (OSError, EOFError, zlib.error):
        pass
    return False


def check_columns(count: int, said: str) -> None:
    """Raises InputError for more columns than `COLUMNS`."""
    if count > COLUMNS:
        raise InputError(f"{said}: it has {count:,} columns, expected at most {COLUMNS:,}")


def check_rows(count: int, said: str, most: int) -> None:
    """Raises InputError for more rows than fit into the memory that is free, of which ``most`` are kept (0: all)."""
    free, kept = _free(), min(count, most or count)
    if free is not None and kept * ROW > max(free, HARMLESS):
        raise InputError(
            f"{said}: {kept:,} rows take {_size(kept * ROW)} at least, and {_size(free)} of memory are free: a smaller "
            "--max-rows keeps the first ones alone"
        )


def _free() -> int | None:
    return free_memory(torch.device("cpu"))


def _size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"

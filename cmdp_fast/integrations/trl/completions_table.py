"""Columns that TRL's distillation trainer does not have in its table of completions: rewards, and what they log."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmdp_fast.files import replacing

Row = dict[str, Any]


def table_rows(rewards: Mapping[str, Sequence[float]], extra: Sequence[Row]) -> list[Row]:
    """A row per completion: its rewards by name, None for no opinion, and the columns of ``extra``."""
    named = (dict(zip(rewards, values, strict=True)) for values in zip(*rewards.values(), strict=True))
    judged = [{name: None if math.isnan(value) else value for name, value in row.items()} for row in named]
    return [{**(extra[i] if extra else {}), **row} for i, row in enumerate(judged)]


def add_columns(table: Path, rows: deque[Row]) -> None:
    """Writes a Parquet table again, with a column for each name in ``rows``, which are its rows in order.

    Raises InputError if it cannot be written; the table is then as it was.
    """
    import pandas

    frame = pandas.read_parquet(table)
    for name in dict.fromkeys(name for row in rows for name in row):
        if name not in frame:  # what TRL writes stays
            frame[name] = pandas.Series(_of_one_type([row.get(name) for row in rows]), dtype=object)
    with replacing(table) as part:
        frame.to_parquet(part)


def _of_one_type(values: list[Any]) -> list[Any]:
    """Texts where the values are of several types, which no column of the format holds."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) < 2:
        return values
    return [value if value is None else float(value) if kinds == {int, float} else str(value) for value in values]

"""A dataset that `save_to_disk` has written, before it is believed: its files are mapped into memory as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmdp_fast.digest import opened
from cmdp_fast.errors import InputError, first_line, readable, shown

SPLITS = "dataset_dict.json"


def check_saved(folder: Path, said: str) -> None:
    """Raises InputError unless the files of a saved dataset, or of each split of several, are files beside its
    `state.json`: a pipe would be waited for. Of a folder that is both, the dataset is read, as `datasets` does."""
    is_one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    several = not is_one and (folder / SPLITS).is_file()
    for state in [folder / split / "state.json" for split in (_splits(folder, said) if several else ["."])]:
        try:
            with opened(state) as file:
                names = [str(each["filename"]) for each in json.loads(file.read().decode())["_data_files"]]
        except Exception as error:  # the file may hold anything
            what = readable(first_line(error))
            raise InputError(f"{said}: its {state.name} is none of a saved dataset: {what}") from error
        if len(set(names)) < len(names):
            raise InputError(f"{said}: its {state.name} names a file twice")
        for name in names:
            if Path(name).name != name or not (state.parent / name).is_file():
                raise InputError(f"{said}: its {state.name} names {shown(name)}, expected a file beside it")


def _splits(folder: Path, said: str) -> list[str]:
    """The names of a dataset's splits, each a folder in its own."""
    try:
        with opened(folder / SPLITS) as file:
            names = json.loads(file.read().decode())["splits"]
        if not isinstance(names, list):
            raise TypeError("they are no list")
    except Exception as error:
        raise InputError(f"{said}: its {SPLITS} lists no splits: {readable(first_line(error))}") from error
    for name in names:
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise InputError(f"{said}: its {SPLITS} lists {shown(name)}, expected the names of folders beside it")
    return names


def check_values(dataset: Any, said: str, most: int) -> None:
    """Raises InputError if the values of a dataset, mapped from a file, lie outside of it or are no texts: to read them
    would end the process, or read what lies elsewhere in its memory. Of ``most`` rows, which alone are read (0: all).
    """
    table = dataset.data.table
    try:
        (table.slice(0, most) if most else table).validate(full=True)
    except Exception as error:
        raise InputError(f"{said}: its files are damaged: {readable(first_line(error))}") from error

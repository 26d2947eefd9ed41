"""A dataset that `save_to_disk` has written, before it is believed: its files are mapped into memory as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmdp_fast.digest import opened
from cmdp_fast.errors import InputError, first_line, readable, shown


def check_saved(folder: Path, said: str) -> None:
    """Raises InputError unless the files of a saved dataset, or of each of several in one folder, are files beside its
    `state.json`: a pipe would be waited for."""
    own = folder / "state.json"
    for state in [*([own] if own.exists() else []), *sorted(folder.glob("*/state.json"))]:
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


def check_values(dataset: Any, said: str) -> None:
    """Raises InputError if the values of a dataset, mapped from a file, lie outside of it or are no texts: to read them
    would end the process, or read what lies elsewhere in its memory."""
    try:
        dataset.data.table.validate(full=True)
    except Exception as error:
        raise InputError(f"{said}: its files are damaged: {readable(first_line(error))}") from error

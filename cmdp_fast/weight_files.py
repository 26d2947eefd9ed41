"""The files of weights that a model's folder names: safetensors in that folder, which hold numbers and nothing that
could run.

transformers follows the names that it finds. A file of another ending it reads as a pickle, `../` leads it out of the
folder, and an adapter beside a model can stand for another model altogether. So the names are read first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from cmdp_fast.errors import first_line, readable

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
QUIET = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}


class Stored(NamedTuple):
    """What the header of a file says of a tensor: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def check_weight_files(name: str, about: Any) -> None:
    """Raises ValueError unless transformers finds the weights of a model in safetensors of its own folder.

    ``name``: the folder, or a hub id; ``about``: its configuration. Of a hub's model the index is fetched, no weights.
    """
    from transformers.utils import cached_file

    if elsewhere := getattr(about, "transformers_weights", None):
        raise ValueError(
            f"its config.json has transformers_weights, {readable(str(elsewhere))}: expected its weights in {ONE}, or "
            f"in the files of a {INDEX}"
        )
    if cached_file(name, ADAPTER, **QUIET):
        raise ValueError(
            f"beside the model lies an {ADAPTER}, with which transformers would change it, or load the model that this "
            "names in its place: merge the adapter into the weights, or take that file away"
        )
    if index := cached_file(name, INDEX, **QUIET):
        read_index(Path(index))


def read_index(path: Path) -> dict[str, str]:
    """The tensors of an index of weights and, of each, the name of its file.

    Raises ValueError, which quotes the name, unless every one is the plain name of a file of safetensors beside it, or
    if the index cannot be read. Links are followed: in the hub's cache every file is one.
    """
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(file): None for file in places.values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its {INDEX} cannot be read ({readable(first_line(error))})") from error
    for file in files:
        if Path(file).name != file or "\\" in file or not file.isprintable() or not file.endswith(".safetensors"):
            raise ValueError(
                f"its {INDEX} names {readable(file)!r} as a file of weights, expected plain names of files "
                ".safetensors beside it: any other is read as a pickle, or lies elsewhere"
            )
    return {str(tensor): str(file) for tensor, file in places.items()}


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors in the weights of a folder by name, of which the headers alone are read; none where there are no
    files. Raises ValueError for files that cannot be read."""
    from safetensors import SafetensorError, safe_open

    one, index = folder / ONE, folder / INDEX
    names = [ONE] if one.is_file() else sorted(set(read_index(index).values())) if index.is_file() else []
    stored: dict[str, Stored] = {}
    for name in names:
        try:
            if not (folder / name).is_file():  # a pipe would wait for a writer
                raise OSError("is no file")
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118  # it is no dict
                    tensor = file.get_slice(key)
                    stored[key] = Stored(tensor.get_dtype(), tuple(tensor.get_shape()))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{name} cannot be read ({readable(first_line(error))})") from error
    return stored

"""A NamedTuple, in which others may be nested, and the flat list of arguments by which PyTorch knows it."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

_TYPES = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str", type(None): "None"}


class Leaf(NamedTuple):
    """An argument as torch sees it."""

    name: str  # the fields that lead to it, joined by underscores
    path: str  # the same, joined by dots
    type: str  # as schemas write it


def leaves(kind: Any, prefix: str = "") -> Iterator[Leaf]:
    """The arguments that a NamedTuple class stands for, in order."""
    for name, hint in get_type_hints(kind).items():
        path = prefix + name
        if is_record(hint):
            yield from leaves(hint, f"{path}.")
        else:
            yield Leaf(path.replace(".", "_"), path, schema_type(hint))


def is_record(hint: Any) -> bool:
    """Whether a type is a NamedTuple of arguments, and not one of them."""
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def schema_type(hint: Any) -> str:
    """A type as schemas write it. Raises TypeError for one that no operator takes."""
    if hint in _TYPES:
        return _TYPES[hint]
    if get_origin(hint) is Literal:
        return _TYPES[type(get_args(hint)[0])]
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (part for part in get_args(hint) if part is not type(None))
        return f"{schema_type(inner)}?"
    raise TypeError(f"an operator takes no {hint}")


def flatten(value: tuple[Any, ...]) -> list[Any]:
    """The arguments inside a NamedTuple, in the order of `leaves`."""
    flat: list[Any] = []
    for field in value:
        if isinstance(field, tuple):
            flat.extend(flatten(field))
        else:
            flat.append(field)
    return flat


class Record(NamedTuple):
    """A NamedTuple class and how many arguments each of its fields stands for. Made when an operator is declared:
    torch.compile cannot look at types."""

    kind: Any
    fields: tuple[Any, ...]  # of each field None, or its record
    size: int
    nested: bool  # whether one of the fields is a record
    tensors: tuple[int, ...]  # which of the arguments are tensors
    floats: tuple[int, ...]  # and which are numbers

    def rebuild(self, flat: Sequence[Any], start: int = 0) -> Any:
        """The NamedTuple that was flattened, from where its arguments begin."""
        if not self.nested:  # the common case
            return self.kind(*flat[start : start + self.size])
        values = []
        for inner in self.fields:
            values.append(flat[start] if inner is None else inner.rebuild(flat, start))
            start += 1 if inner is None else inner.size
        return self.kind(*values)


@functools.cache
def record_of(kind: Any) -> Record:
    """Of a NamedTuple class."""
    inner = tuple(record_of(hint) if is_record(hint) else None for hint in get_type_hints(kind).values())
    tensors, floats = (
        tuple(i for i, leaf in enumerate(leaves(kind)) if leaf.type.startswith(name)) for name in ("Tensor", "float")
    )
    size = sum(1 if record is None else record.size for record in inner)
    return Record(kind, inner, size, any(inner), tensors, floats)

"""Every field of a file of JSON with every kind of value in it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

OUT = object()  # the field is taken out
VALUES: list[Any] = [
    *(OUT, None, True, 0, -1, 2**70, 10**400, 1e308, 5e-324, math.nan, "", "x", "\x1b[2J", "\ud800", "1" * 5000),
    *([], [[]], {}, {"x": 1}, [None], ["x"], {"": [{}]}),
]


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a value of JSON stand; of a list the first two."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:2] if isinstance(value, list) else ()
    for name, item in items:
        yield (*place, name)
        yield from places(item, (*place, name))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    copy = whole = json.loads(json.dumps(value))
    for name in place[:-1]:
        copy = copy[name]
    if new is OUT:
        del copy[place[-1]]
    else:
        copy[place[-1]] = new
    return whole


# The fifth part of the changes, another one of each field's, and all of them where there is time
PARTS = pytest.mark.parametrize("part", [5, pytest.param(1, marks=pytest.mark.slow)])


def every_change(value: Any, part: int) -> Iterator[tuple[str, Any]]:
    """The ways to change a value of JSON in one place, one in so many, with what each is."""
    ways = itertools.product(places(value), VALUES)
    for place, new in itertools.islice(ways, None, None, part):
        yield f"{'/'.join(map(str, place))} = {new!r:.40}", changed(value, place, new)


def is_one_line(error: Exception) -> bool:
    return str(error).isprintable() and len(str(error)) < 1000

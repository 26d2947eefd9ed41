"""What the fields of a NamedTuple mean, from the strings that stand below them in its source.

Editors, Sphinx and pdoc read those strings themselves. Python drops them, and its own tools (``help``, a notebook's
``?``) would say "Alias for field number 0" of every field.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)

_FIELD = re.compile(r'^    (\w+): [^\n]*\n    """(.*?)"""$', re.MULTILINE | re.DOTALL)


def documented(kind: Kind) -> Kind:
    """Gives each field of a NamedTuple class the string below it as its documentation; a decorator.

    Read is the file, by a pattern: to parse it would take as long as all else that an import of this package does.
    Without its source, as from a zip file, a class stays as it is.
    """
    try:
        source = Path(inspect.getfile(kind)).read_text(encoding="utf-8")
    except (OSError, TypeError):  # no such file; a module without one
        return kind
    begun = source.partition(f"\nclass {kind.__name__}(NamedTuple):\n")[2]
    body = re.split(r"^\S", begun, maxsplit=1, flags=re.MULTILINE)[0]
    for name, text in _FIELD.findall(body):
        field: Any = vars(kind)[name]
        field.__doc__ = inspect.cleandoc(text)
    return kind

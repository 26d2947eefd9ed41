"""Imports what the commands that train do, in a process of its own: `installed.imports` asks it.

A library that is broken may end a process, wait for something, or leave parts of itself behind.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable

from cmdp_fast.errors import first_line, readable, root_cause


def failures(names: Iterable[str]) -> dict[str, str]:
    """Why modules cannot be imported, by name; with ``module:attribute``, which some have only once it is asked for.

    Nothing of what those above a module could not do is told again of those below.
    """
    found: dict[str, str] = {}
    for name in names:
        module, _, attribute = name.partition(":")
        if any(module == each or module.startswith(f"{each}.") for each in found):
            continue
        try:
            imported = importlib.import_module(module)
            if attribute:
                getattr(imported, attribute)
        except Exception as error:  # of code that is not ours, in any state
            cause = root_cause(error)
            found[module] = readable(f"{type(cause).__name__}: {first_line(cause)}")
    return found


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # for what an import prints, or the end of this process
        answer.write(json.dumps(failures(sys.argv[1:])))

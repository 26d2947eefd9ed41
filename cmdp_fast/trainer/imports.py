"""Functions of the user's own, named on the command line. Such a file is code: it is run, with all that this means."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError, first_line


def import_function(option: str, spec: str, built_in: Sequence[str] = ()) -> Callable[..., Any]:
    """The function that ``module:function`` or ``path/file.py:function`` names.

    Raises InputError, which names the option and what is built in, if there is none.
    """
    module_name, colon, function_name = spec.rpartition(":")
    if not colon:
        neither = f"neither one of {', '.join(built_in)} nor" if built_in else "not"
        raise InputError(f"{option} {spec}: {neither} module:function")
    try:
        if module_name.endswith(".py"):
            source = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert source is not None and source.loader is not None  # a .py path always has a loader
            module = importlib.util.module_from_spec(source)
            source.loader.exec_module(module)
        else:
            if os.getcwd() not in sys.path:  # a console script does not look there
                sys.path.append(os.getcwd())
            module = importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise InputError(f"{option} {spec}: {first_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{option} {spec}: {module_name} has no function {function_name!r}")
    return function

"""Calls of the user's own functions: what they raise in one line, with the place."""

from __future__ import annotations

import contextlib
import functools
import os
import sysconfig
import traceback
from collections.abc import Iterator
from types import CodeType
from typing import Any

from cmdp_fast.errors import InputError, first_line, kind_of, readable


@contextlib.contextmanager
def errors_named(what: str, function: Any) -> Iterator[None]:
    """An exception of a function's own in the body becomes an InputError of one line, with the exception as its cause;
    ``what`` says whose it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {readable(str(error))}") from error
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise InputError(f"{what} raised {described(error, function)}") from error


def described(error: BaseException, function: Any = None) -> str:
    """The kind of an error, the first line of its message, which may quote a completion, and where it was raised:
    ``LookupError: no such judge (mine.py:12)``.

    That is the last line of code that was not installed, else of the function's own file, else where the function
    begins: it could not be called.
    """
    definition = _code(function)
    own = definition and definition.co_filename
    passed = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = [place for place in passed if not is_installed(place[0])]
    places = places or [place for place in passed if place[0] == own]
    if definition and not places:
        places = [(definition.co_filename, definition.co_firstlineno)]
    return f"{kind_of(error)}: {readable(first_line(error))}" + (
        f" ({places[-1][0]}:{places[-1][1]})" if places else ""
    )


def _code(function: Any) -> CodeType | None:
    """That of a function, of the one in a partial, or of a method or an object's ``__call__``."""
    while type(function) is functools.partial:
        function = function.func
    try:  # an object of somebody's may answer anything
        function = function if hasattr(function, "__code__") else getattr(function, "__call__", None)  # noqa: B004
        code = getattr(getattr(function, "__func__", function), "__code__", None)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return None
    return code if type(code) is CodeType else None


def is_installed(file: str) -> bool:
    """Whether a file is this package's, Python's, an installed package's, or none."""
    return file.startswith(("<", *_INSTALLED))


_INSTALLED = tuple(
    os.path.join(folder, "")
    for folder in {*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), os.path.dirname(__file__)}
)

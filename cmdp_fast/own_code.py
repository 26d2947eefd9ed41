"""Calls of the user's own functions: what they raise in one line, with the place, and that one does not return."""

from __future__ import annotations

import functools
import logging
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from cmdp_fast.errors import InputError, first_line, readable

NOTICE = 60.0  # seconds after which it is said what is waited for

_log = logging.getLogger(__name__)


@contextmanager
def errors_named(what: str, function: Any) -> Iterator[None]:
    """An exception of a function's own in the body becomes an InputError of one line, with the exception as its cause;
    ``what`` says whose it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {readable(str(error))}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} raised {described(error, function)}") from error


def described(error: BaseException, function: Any = None) -> str:
    """The kind of an error, the first line of its message, which may quote a completion, and where it was raised:
    ``LookupError: no such judge (mine.py:12)``.

    That is the last line of code that was not installed, else of the function's own file, else where the function
    begins: it could not be called.
    """
    definition: CodeType | None = getattr(_plain(function), "__code__", None)
    own = definition and definition.co_filename
    passed = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = [place for place in passed if not _is_installed(place[0])]
    places = places or [place for place in passed if place[0] == own]
    if definition and not places:
        places = [(definition.co_filename, definition.co_firstlineno)]
    return f"{type(error).__name__}: {readable(first_line(error))}" + (
        f" ({places[-1][0]}:{places[-1][1]})" if places else ""
    )


@contextmanager
def told_of(what: str, thread: str = "") -> Iterator[None]:
    """Says so if the body has not ended after `NOTICE` seconds, and at which line it is: in this thread, or in that of
    a name.

    It is waited for all the same: no thread can be ended from outside, and one that was left behind would go on.
    """
    caller = threading.get_ident()

    def tell() -> None:
        ident = next((each.ident for each in threading.enumerate() if each.name == thread), caller)
        frame = sys._current_frames().get(ident or caller)
        places = ((each.f_code.co_filename, line) for each, line in traceback.walk_stack(frame)) if frame else iter(())
        place = next((f", it is at {file}:{line}" for file, line in places if not _is_installed(file)), "")
        _log.warning("%s has not returned for %g s%s", what, NOTICE, place)

    timer = threading.Timer(NOTICE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _plain(function: Any) -> Any:
    """The function in a partial, or that of a method or of an object's ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    function = function if hasattr(function, "__code__") else getattr(function, "__call__", None)  # noqa: B004
    return getattr(function, "__func__", function)


def _is_installed(file: str) -> bool:
    """Whether a file is this package's, Python's, an installed package's, or none."""
    return file.startswith(("<", *_INSTALLED))


_INSTALLED = tuple(
    os.path.join(folder, "")
    for folder in {*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), os.path.dirname(__file__)}
)

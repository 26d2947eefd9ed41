"""The one exception that the command line turns into one line on stderr and exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was given and what was expected."""


def first_line(error: BaseException) -> str:
    """The first line of an error raised by somebody else's code, to be quoted inside one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""The first moments of a command, before torch is imported, which takes seconds.

The package imports this before all else. In a program that uses it as a library nothing is done.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED = 130  # the exit code


def is_command() -> bool:
    """Whether this process was started as `cmdp-fast` or `python -m cmdp_fast`."""
    program = (getattr(sys, "argv", None) or [""])[0]  # a program that embeds Python may have none
    if program == "-m":  # while Python looks for the module
        words = sys.orig_argv
        return words[words.index("-m") + 1 :][:1] == ["cmdp_fast"] if "-m" in words else False
    return os.path.basename(program) == "cmdp-fast"


def begin() -> None:
    """Ctrl-C ends a command with a line: a KeyboardInterrupt would be one of whatever is being imported. Numbers of
    standard streams that a shell has closed (`>&-`) lead nowhere: the next file would get such a number, and with it
    whatever a library or a child prints."""
    if not is_command():
        return
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    if _is_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def over() -> None:
    """Everything is there: Ctrl-C is a KeyboardInterrupt again."""
    if _is_main_thread() and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end(number: int, frame: FrameType | None) -> None:
    """At once: nothing has been begun."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"cmdp-fast: interrupted\n")
    os._exit(INTERRUPTED)


begin()

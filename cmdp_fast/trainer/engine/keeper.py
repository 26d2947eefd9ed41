"""The process around a server: it starts it, and ends it with its children once it is told to or its parent is gone.

    python -I keeper.py PARENT FOLDER COMMAND...

A program of its own, for a run that is killed can end nothing, nor remove the folder of its weights. Ctrl-C in a
terminal does not reach it: a step that is being ended still needs the server. It ends with the server's exit code.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

PATIENCE = 10.0  # seconds that a server may take to end by itself


def main(parent: int, folder: str, command: list[str]) -> int:
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked.append(number))
    server = subprocess.Popen(command, start_new_session=True)
    while server.poll() is None and not asked and os.getppid() == parent:
        time.sleep(0.2)
    code = server.poll()
    _end(server)
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if code is None else code


def _end(server: subprocess.Popen[bytes]) -> None:
    """The server and what it has started, which may have outlived it."""
    _signal(server.pid, signal.SIGTERM)
    until = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    _signal(server.pid, signal.SIGKILL)
    server.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))

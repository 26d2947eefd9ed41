"""Programs that a phase starts: each within its time, and none of their children left behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PATIENCE = 15.0  # seconds between an interrupt and a kill


class Ended(NamedTuple):
    """How a program ended: ``code`` None where it was stopped since its time was up."""

    code: int | None
    output: str

    def tail(self, lines: int = 12) -> list[str]:
        return self.output.rstrip().splitlines()[-lines:]


def run(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """Runs a program with both of its outputs at the end of the file ``log``. When its time is up it is interrupted, so
    that it can write what it has, and killed with its children a little later."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"\n$ {shlex.join(command)}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        code: int | None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        finally:
            kill(process)
    with open(log, "rb") as file_again:
        file_again.seek(begin)
        return Ended(code, file_again.read().decode("utf-8", errors="replace"))


def kill(process: subprocess.Popen) -> None:
    """Kills a process, and everything that it started."""
    for each in (*descendants(process.pid), process.pid):
        if each == process.pid and process.poll() is not None:
            continue  # its number may be another's by now
        with suppress(OSError):
            os.kill(each, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have started (Linux)."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        some = children.get(waiting.pop(), [])
        found += some
        waiting += some
    return found


def first(lines: Sequence[str], *words: str) -> str:
    """The first line with one of the words, or the last line, or nothing."""
    return next((line.strip() for line in lines if any(word in line for word in words)), lines[-1] if lines else "")


def pause() -> None:
    time.sleep(0.25)

"""Watches over the process that runs the parts of a phase: one that hangs, crashes or loses its GPU costs one part."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from phases import processes
from phases.record import FAILED, Record

LOST = 75  # exit code of a worker whose device no longer answers
STARTS = 8  # of a worker


def supervise(command: Sequence[str], environment: Mapping[str, str], path: Path) -> Record:
    """Starts the worker, and again after each part that ended it, until every part is recorded or time is up."""
    beginnings = 0
    for _ in range(STARTS):
        before = len(Record.read(path).parts)
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        try:
            why = _watch(process, path)
        finally:
            processes.kill(process)
        record = Record.read(path)
        if record.running is not None:
            record.end(FAILED, error=why or "its process ended without a word")
        elif why and process.returncode != LOST:
            beginnings += len(record.parts) == before
            record.begin(f"worker, start {beginnings}", 0)
            record.end(FAILED, error=why)
        if not why or record.left <= 0 or beginnings > 1:
            break
    record = Record.read(path)
    record.finish()
    return record


def _watch(process: subprocess.Popen, path: Path) -> str:
    """Why the worker did not come to its end; empty if it did."""
    while process.poll() is None:
        processes.pause()
        record = Record.read(path)
        running = record.running
        if record.left <= 0:
            return "the phase's time was up"
        if running is not None and time.time() > running["began_at"] + running["limit"]:
            return f"it hung: killed after {running['limit']:.0f} s"
    code = process.returncode
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}" if code else ""

"""What a phase of `gpu.py` has found: one JSON file, whole after every part, and the short table of it.

A phase is a list of parts. A part that raises is recorded with the first line of its error and the end of its
traceback, and the next one begins. The file is all that the process which runs the parts (`worker.py`) and the one
which watches over it (`supervise.py`) share, so that a part which takes its process with it costs no other.

Nothing but the standard library is imported here: the file is kept even where no package can be.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
FORMAT = 1
DONE, FAILED, ABSENT, LEFT_OUT, RUNNING = "done", "failed", "absent", "left out", "running"
TRACE = 12  # lines of a traceback
WIDTH = 118  # of a line of the table


class Part(NamedTuple):
    """A part of a phase. ``run`` returns its figures; ``summary`` among them is its line in the table, and
    ``problems``, a list of sentences, makes it a failed one that keeps its figures."""

    name: str
    seconds: float  # expected; it is not begun where less is left
    run: Callable[[], dict[str, Any]]
    most: float | None = None  # seconds after which it is taken to hang, where it ends a program of its own by itself

    @property
    def limit(self) -> float:
        """Seconds after which it is taken to hang."""
        return 3 * self.seconds + 30 if self.most is None else self.most


class Missing(Exception):
    """What a part needs is not here; the message is the reason."""


class Record:
    """The file of a phase. Every change is written at once, and the file appears whole or not at all."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def new(cls, path: Path, phase: str, command: str, small: bool, seconds: float, only: str = "") -> Record:
        """An empty record of a phase that has so many seconds from now on; ``only``: for parts of such a name."""
        about = {"phase": phase, "command": command, "small": small, "began": stamp(), "began_at": time.time()}
        about |= {"only": only} if only else {}
        record = cls(path, {"format": FORMAT, **about, "limit": seconds, "ended": None, "machine": None, "parts": []})
        record.write()
        return record

    @classmethod
    def again(cls, path: Path, only: str, seconds: float) -> Record:
        """A phase's record without the parts that have ``only`` in their name, which have so many seconds from now on.

        Raises ValueError if the file is no record.
        """
        try:
            record = cls.read(path)
            record.content["parts"] = [part for part in record.parts if only not in part["name"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a record: {type(error).__name__}: {error}") from error
        record.content |= {"only": only, "began_at": time.time(), "limit": seconds}
        record.content.setdefault("again", []).append({"only": only, "began": stamp()})
        record.write()
        return record

    @classmethod
    def read(cls, path: Path) -> Record:
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    def write(self) -> None:
        part = self.path.with_name(f".{self.path.name}")
        text = json.dumps(portable(finite(self.content), self.path.parent), indent=1, allow_nan=False, default=str)
        with open(part, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)

    @property
    def parts(self) -> list[dict[str, Any]]:
        return self.content["parts"]

    @property
    def left(self) -> float:
        """Seconds until the phase has to have ended."""
        return self.content["began_at"] + self.content["limit"] - time.time()

    @property
    def running(self) -> dict[str, Any] | None:
        """The part that has begun and has not ended."""
        return next((part for part in self.parts if part["status"] == RUNNING), None)

    def has(self, name: str) -> bool:
        return any(part["name"] == name for part in self.parts)

    def begin(self, name: str, limit: float) -> None:
        self.parts.append({"name": name, "status": RUNNING, "began_at": time.time(), "limit": limit})
        self.write()

    def end(self, status: str, **figures: Any) -> None:
        """The part that is running has ended so."""
        part = self.running
        assert part is not None
        part |= {"status": status, "seconds": round(time.time() - part.pop("began_at"), 2), **figures}
        del part["limit"]
        self.write()

    def leave_out(self, name: str, reason: str) -> None:
        self.parts.append({"name": name, "status": LEFT_OUT, "seconds": 0.0, "reason": reason})
        self.write()

    def finish(self) -> None:
        self.content["ended"] = stamp()
        self.content["seconds"] = round(time.time() - self.content["began_at"], 1)
        self.write()

    @property
    def failures(self) -> list[str]:
        return [f"{part['name']}: {part.get('error', '')}" for part in self.parts if part["status"] == FAILED]

    def table(self) -> str:
        """A line per part, then the failures: short, since it is the end of the output that is seen."""
        width = min(48, max((len(part["name"]) for part in self.parts), default=0))
        lines = []
        for part in self.parts:
            said = part.get("summary") or part.get("error") or part.get("reason") or ""
            line = f"{part['status']:<8} {part.get('seconds', 0):6.1f} s  {part['name']:<{width}}  {said}"
            lines.append(" ".join(line.splitlines())[:WIDTH].rstrip())
        counts = {s: sum(part["status"] == s for part in self.parts) for s in (DONE, FAILED, ABSENT, LEFT_OUT)}
        about = ", ".join(f"{count} {status}" for status, count in counts.items())
        return "\n".join([*lines, f"{self.content['phase']}: {about}; {self.content.get('seconds', 0):.0f} s"])


def run_parts(record: Record, parts: list[Part], alive: Callable[[], bool] = lambda: True) -> bool:
    """Runs the parts that are not recorded yet, the most important first. ``alive``: whether the device still answers,
    asked between parts. Returns False where it does not: another process has to go on."""
    begun = False
    for part in parts:
        if record.has(part.name):
            continue
        if record.left < part.seconds:
            record.leave_out(part.name, f"{part.seconds:.0f} s expected, {max(record.left, 0):.0f} s left")
            continue
        if begun and not alive():  # a part that has ended well may have broken it all the same
            return False
        begun = True
        record.begin(part.name, min(part.limit, record.left))
        print(f"[{record.content['limit'] - record.left:5.0f} s] {part.name}", flush=True)
        try:
            figures = part.run()
        except Missing as reason:
            record.end(ABSENT, reason=str(reason))
        except Exception as error:  # whatever it is, the others are worth having
            record.end(FAILED, **told(error))
            if not alive():
                return False
        else:
            problems = figures.pop("problems", [])
            record.end(FAILED if problems else DONE, **({"error": "; ".join(problems)} if problems else {}), **figures)
    return True


def told(error: BaseException) -> dict[str, Any]:
    """The first line of an error, with its kind, and the end of its traceback."""
    lines = str(error).strip().splitlines()
    trace = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": "), "trace": trace[-TRACE:]}


def stamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def portable(value: Any, out: Path, root: Path = ROOT, temporary: str = tempfile.gettempdir()) -> Any:
    """The value without the places that files have on one machine: those of the checkout and of the record's folder
    are told from there, and temporary folders are ``TMP``."""
    if isinstance(value, dict):
        return {key: portable(item, out, root, temporary) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item, out, root, temporary) for item in value]
    if not isinstance(value, str):
        return value
    for folder in sorted((str(out), str(root)), key=len, reverse=True):  # one may lie in the other
        value = value.replace(f"{folder}{os.sep}", "").replace(folder, ".")
    return re.sub(rf"{re.escape(temporary)}{re.escape(os.sep)}tmp\w+", "TMP", value)


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Asks judges in processes of their own about many completions, some at a time, and gets a verdict for each."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmdp_fast.errors import InputError, readable
from cmdp_fast.threads import usable_processors

HERE = Path(__file__).parent
MEMORY = 1 << 30  # bytes that a completion may take beside those of the judge itself
WORKERS = 8  # at once, with as many processors
LOADING = 120.0  # seconds that importing the judge may take
KINDS = 20  # of failures that are told of
# The variables that a judge's packages read as they are imported; none is a secret.
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "MPLCONFIGDIR", "PATH", "TMPDIR", "XDG_CACHE_HOME")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """A judge's score, None where it has no opinion or there is a `failure`: it raised, ended, hung or died."""

    score: float | None
    failure: str = ""


class IsolationError(InputError):
    """This machine cannot isolate a judge."""


class Judges:
    """A judge of judges.py that is asked in processes of its own, isolated unless `isolated` says otherwise.

    Raises InputError, which names ``option``, if the judge cannot be imported, IsolationError if it cannot be isolated;
    ``insist`` is the option with which the user can have it all the same. In a process that was forked from this one,
    it starts a process of its own.
    """

    def __init__(
        self,
        option: str,
        judge: str,
        arguments: dict[str, Any] | None = None,
        *,
        seconds: float,
        isolated: bool = True,
        insist: str = "",
    ) -> None:
        self.option, self.seconds, self.isolated, self.insist = option, seconds, isolated, insist
        self._judge = [str(HERE / "judges.py"), judge, arguments or {}]
        processors = usable_processors()
        self.workers = max(1, min(WORKERS, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._connection: Connection | None = None
        self._owner = os.getpid()
        self._connect()

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[Verdict]:
        """A verdict for each request, the judge's keyword arguments. Failures are logged, each kind once."""
        if not requests:
            return []
        if self._owner != os.getpid():  # forked, perhaps while another thread held it
            self._lock = threading.Lock()
        with self._lock:
            try:
                verdicts = self._connect().ask(requests, self._patience(len(requests)))
            except BaseException as error:  # an interrupt too: an answer still on its way belongs to no later question
                if self._connection is not None:
                    self._connection.close()
                if not isinstance(error, OSError | InputError):  # InputError: it could not be started again
                    raise
                verdicts = [Verdict(None, f"the process of the judges is lost: {error}")] * len(requests)
        self._tell(verdicts)
        return verdicts

    def _patience(self, requests: int) -> float:
        """Longer than the judging takes if each request hangs and the machine is busy."""
        return 30.0 + 2 * self.seconds * -(-requests // self.workers)

    def _connect(self) -> Connection:
        if self._connection is None or self._connection.closed or self._owner != os.getpid():
            self._owner = os.getpid()
            self._connection = Connection(
                {
                    "judge": self._judge,
                    "path": [path for path in sys.path if os.path.isabs(path)],
                    "isolated": self.isolated,
                    "workers": self.workers,
                    "seconds": self.seconds,
                    "memory": MEMORY,
                },
                self.option,
                self.insist,
            )
        return self._connection

    def _tell(self, verdicts: Sequence[Verdict]) -> None:
        for kind, count in Counter(verdict.failure.partition(":")[0] for verdict in verdicts).items():
            if kind and kind not in self._told and len(self._told) < KINDS:
                self._told.add(kind)
                example = next(v.failure for v in verdicts if v.failure.partition(":")[0] == kind)
                _log.warning(
                    "%s: no verdict on %d of %d completions (%s). More of this kind will be counted, not told",
                    self.option,
                    count,
                    len(verdicts),
                    example,
                )


class Connection:
    """A running process.py. OSError means that it is lost."""

    def __init__(self, about: dict[str, Any], option: str, insist: str) -> None:
        receive, send = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(HERE / "process.py"), str(send)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | ONE_THREAD,
                pass_fds=[send],
                start_new_session=True,  # Ctrl-C is for the training, which asks until its step has ended
            )
        finally:
            os.close(send)
        assert self._process.stdin is not None
        self._answers, self._rest, self._batch = receive, b"", 0
        self.close: Callable[[], Any] = weakref.finalize(self, _end, self._process, receive)
        try:
            self._write(about)
            first = json.loads(self._line(time.monotonic() + LOADING))
        except (OSError, ValueError) as error:
            self.close()
            raise InputError(f"{option}: its process did not start: {error}") from error
        if "error" in first:
            self.close()
            why = readable(first["error"])
            if not first["isolation"]:
                raise InputError(f"{option}: the judge cannot be loaded: {why}")
            raise IsolationError(
                f"{option}: a completion may run as code in this judge, and here it cannot be isolated ({why}). That "
                f"takes Linux with Landlock and libseccomp. {insist} runs it with limits of time and memory alone"
            )

    @property
    def closed(self) -> bool:
        return not self.close.alive  # type: ignore[attr-defined]

    def ask(self, requests: Sequence[dict[str, Any]], patience: float) -> list[Verdict]:
        until = time.monotonic() + patience
        self._batch += 1
        self._write([pickle.dumps(request) for request in requests])
        verdicts: dict[int, Verdict] = {}
        for _ in requests:
            line = self._line(until)
            try:
                answer = json.loads(line)
                if answer["batch"] != self._batch:
                    raise ValueError(answer["batch"])
                score, failure = answer.get("score"), answer.get("error", "")
                verdicts[answer["index"]] = Verdict(None if score is None else float(score), readable(failure))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise OSError("its answer makes no sense") from error
        if sorted(verdicts) != list(range(len(requests))):
            raise OSError("it answered twice about the same completion")
        return [verdicts[i] for i in range(len(requests))]

    def _write(self, message: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def _line(self, until: float) -> bytes:
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            poll = select.poll()  # select() cannot wait for the thousandth file of a training
            poll.register(self._answers, select.POLLIN)
            if left <= 0 or not poll.poll(left * 1000):
                raise OSError("it does not answer")
            data = os.read(self._answers, 1 << 16)
            if not data:
                raise OSError("it has ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def _end(process: subprocess.Popen[bytes], answers: int) -> None:
    """Ends the process, which kills its children when its input ends."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has ended before it has read all
        process.stdin.close()
    os.close(answers)
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

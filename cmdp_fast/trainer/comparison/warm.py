"""Trainings forked from a process that has imported what they need: half of a small one is imports.

The process is told on its standard input which trainings to start, a line of JSON for each, and answers on its standard
output with a line for each that has ended. It computes nothing itself, so its children begin as a new process does. It
ends them when its input ends: with whoever started it, however that ends. The server of multiprocessing would leave
the trainings of a comparison that was killed to go on.

A signal is noted, and raises nothing: an exception may come up where Python drops it, as between a fork and the first
line of the child, and a training that has not heard it would go on to its end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from cmdp_fast.children import command
from cmdp_fast.errors import InputError
from cmdp_fast.files import as_json
from cmdp_fast.masking import told

from ..records.lock import name_holder
from ..records.report import quiet_libraries
from ..settings.config import TrainConfig
from ..settings.values import typed

# What a training imports on its way, beside `run` itself
IMPORTED = (
    *("cmdp_fast.trainer.methods.ppo", "cmdp_fast.trainer.models.builtin", "matplotlib.figure", "reasoning_gym"),
    *("peft", "rich.progress", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama"),
    "transformers.trainer",
)


class Trainings:
    """Trainings as processes of their own. `start` one; `ended` waits for the next that is over."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, name: str, config: TrainConfig, log: Path) -> None:
        """A training that prints into a file."""
        assert self._process.stdin is not None
        line = as_json({"name": name, "config": asdict(config), "log": str(log)})
        with contextlib.suppress(BrokenPipeError):  # `ended` says so
            print(line, file=self._process.stdin, flush=True)

    def ended(self) -> tuple[str, int]:
        """The name of one that has ended, and its exit code, or the signal's number below zero."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise InputError(
                f"the process that starts the trainings was ended ({self._process.wait()}): start it again"
            )
        name, code = json.loads(line)
        return name, code


@contextlib.contextmanager
def trainings(threads: int, lock: int, log: Path, warm: bool) -> Iterator[Trainings]:
    """Trainings with so many threads each, which are ended with the body.

    They hold ``lock``, a descriptor, too: as long as one of a killed comparison runs, no other begins. Not ``warm``,
    each imports for itself, as it has to where imports may look for a GPU: a fork could not use it.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CI": "1"}
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            command(__name__, *(["warm"] if warm else [])),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            pass_fds=[lock],
            text=True,
            start_new_session=True,  # an interrupt from the terminal comes to who asked for them, and ends them in turn
        )
    with process, name_holder(lock, f"its trainings: process {process.pid}"):
        try:
            yield Trainings(process)
        finally:
            process.terminate()
            try:
                process.wait()
            except KeyboardInterrupt:  # by a user in a hurry
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # it has a session of its own, and its trainings are in it
                raise


# ------------------------------------------------------------------------------------- in the process itself


SIGNALS = (signal.SIGTERM, signal.SIGINT)
LONGEST = 1 << 16  # bytes that are read at once


def main(arguments: list[str]) -> None:
    """Starts what it is told to, until its input ends or a signal does; then it ends what it has started."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for what an import prints
    if "warm" in arguments:  # a signal ends this at once: nothing runs yet
        import_all()
    serve(0, answers)


def import_all() -> None:
    """Imports what trainings need, of the packages that are there: `peft` is no part of the extra `train`."""
    for module in ("cmdp_fast.trainer.run", *IMPORTED):
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            importlib.import_module(module)


def serve(orders: int, answers: IO[str]) -> None:
    """Starts the trainings that the descriptor ``orders`` names until it ends, or a signal comes. Then ends those that
    run, and returns when all have ended. The process must have no other children."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    running: dict[int, str] = {}
    waiting: list[dict[str, Any]] = []
    rest, open_ = b"", True
    try:
        while open_ and not received:
            # Everything that was told, and whether that is all, before one is started: whoever told it may have gone
            while open_ and select.select([orders], [], [], 0.0 if waiting else 0.05)[0]:
                piece = os.read(orders, LONGEST)
                open_ = bool(piece)
                *lines, rest = (rest + piece).split(b"\n")
                waiting += map(json.loads, lines)
            if waiting and open_ and not received:
                training = waiting.pop(0)
                running[_forked(training, answers)] = training["name"]
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                answers.write(json.dumps([running.pop(ended[0]), os.waitstatus_to_exitcode(ended[1])]) + "\n")
                answers.flush()
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        for pid in running:
            os.waitpid(pid, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _forked(training: dict[str, Any], answers: IO[str]) -> int:
    """Starts a training; returns its process. A signal to that one waits until it has the handlers of a process of its
    own: those of this one would swallow it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 1
    try:  # nothing of the parent's may go on in the child
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(answers.fileno())
        nothing = os.open(os.devnull, os.O_RDONLY)
        log = os.open(training["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for target, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source, target)
        code = trained(training["config"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # whatever it is, this process ends here
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def trained(settings: dict[str, Any]) -> int:
    """Trains and returns the exit code, as `cmdp-fast train` does."""
    from ..run import train

    quiet_libraries()
    try:
        train(TrainConfig(**typed(settings, "a training's settings")))
    except InputError as error:
        print(f"cmdp-fast: error: {told(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cmdp-fast: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])

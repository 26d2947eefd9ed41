"""Trainings forked from a process that has imported what they need: half of a small one is imports.

The process is told on its standard input which trainings to start, a line of JSON for each, and answers on its standard
output with a line for each that has ended. It computes nothing itself, so its children begin as a new process does. It
ends them when its input ends: with whoever started it, however that ends. The server of multiprocessing would leave
the trainings of a comparison that was killed to go on.
"""

from __future__ import annotations

import contextlib
import importlib
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
from typing import Any, NoReturn

from cmdp_fast.children import command
from cmdp_fast.errors import InputError
from cmdp_fast.files import as_json
from cmdp_fast.masking import told

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
    with process:
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


def main(arguments: list[str]) -> None:
    """Starts what it is told to, until its input ends or a signal does; then it ends what it has started."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for what an import prints
    running: dict[int, str] = {}
    try:
        if "warm" in arguments:
            for module in ("cmdp_fast.trainer.run", *IMPORTED):
                importlib.import_module(module)
        _serve(answers, running)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        for pid in running:
            os.waitpid(pid, 0)


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _serve(answers: Any, running: dict[int, str]) -> None:
    told = b""
    while True:
        if select.select([0], [], [], 0.05)[0]:
            if not (piece := os.read(0, 1 << 16)):
                return
            *lines, told = (told + piece).split(b"\n")
            for line in lines:
                training = json.loads(line)
                running[_forked(training, answers)] = training["name"]
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            answers.write(json.dumps([running.pop(ended[0]), os.waitstatus_to_exitcode(ended[1])]) + "\n")
            answers.flush()


def _forked(training: dict[str, Any], answers: Any) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:  # nothing of the parent's may go on in the child
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
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

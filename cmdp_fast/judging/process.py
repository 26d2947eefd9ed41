"""The process that loads a judge and forks another one for each completion; a program of its own, see pool.py.

    python -I process.py ANSWERS        ANSWERS: the file descriptor to answer on

It reads pickles on its standard input, which its parent makes of its own objects: a judge of reasoning-gym's tells
a tuple from a list, JSON does not. The first describes the process, ``{"judge": [file, function, arguments], "path":
[...], "isolated": bool, "workers": N, "seconds": S, "memory": bytes}``, and is answered by ``{"ready": true}`` or
``{"error": why, "isolation": bool}``. Every further one is a list of requests, each a pickle of the judge's keyword
arguments, and is answered by a line of JSON for each, ``{"batch": n, "index": i, "score": number or null}`` or
``{"batch": n, "index": i, "error": why}``, in the order in which they are ready.

The judge runs in a child that is forked for one request, gives up the rights that isolation.py names and is killed at
its time. This process hands a completion on without unpickling it. At the end of its input it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib.util
import json
import math
import os
import pickle
import resource
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ANSWER = 3  # where a child answers
DESCRIPTORS = 1024  # more than the children that run at once
LONGEST = 1 << 16  # bytes of an answer; an honest one has a hundred


def load(file: str) -> Any:
    """The module in a file, without the package that it belongs to, which would import PyTorch."""
    source = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert source is not None and source.loader is not None  # a .py path always has a loader
    module = importlib.util.module_from_spec(source)
    sys.modules[module.__name__] = module  # dataclasses look there
    source.loader.exec_module(module)
    return module


isolation = load(str(Path(__file__).with_name("isolation.py")))


@dataclass
class Child:
    """A process that judges one request."""

    index: int
    pid: int
    deadline: float
    answer: bytearray = field(default_factory=bytearray)


@dataclass
class Zygote:
    """The judge, and the limits of its children."""

    judge: Callable[..., Any]
    calls: Any  # the filter of system calls, None where nothing is isolated
    workers: int
    seconds: float
    space: int | None  # bytes of address space
    answers: int
    batch: int = 0
    running: dict[int, Child] = field(default_factory=dict)  # by the descriptor of its answer

    def say(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self.answers, data) :]

    def answer_all(self, requests: list[bytes]) -> None:
        """Judges the requests, some at a time. Ends the process if its input ends meanwhile."""
        self.batch += 1
        waiting = deque(enumerate(requests))
        while waiting or self.running:
            while waiting and len(self.running) < self.workers:
                self.start(*waiting.popleft())
            poll = select.poll()
            poll.register(0, select.POLLHUP)
            for descriptor in self.running:
                poll.register(descriptor, select.POLLIN)
            next_deadline = min(child.deadline for child in self.running.values())
            ready = poll.poll(max(0.0, next_deadline - time.monotonic()) * 1000 + 1)
            now = time.monotonic()
            for descriptor, _ in ready:
                if descriptor == 0:
                    self.kill_all()
                    os._exit(0)
                self.read(descriptor)
            for descriptor, child in list(self.running.items()):
                if now >= child.deadline:  # one that has answered has only not been seen to end
                    self.end(descriptor, None if child.answer else {"error": f"no answer within {self.seconds:g} s"})

    def start(self, index: int, request: bytes) -> None:
        receive, send = os.pipe()
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            try:
                isolation.die_with(parent)
                os.dup2(send, ANSWER)
                os.closerange(ANSWER + 1, DESCRIPTORS)  # all there are: see main
                self.be_child(request)
            finally:
                os._exit(1)
        os.close(send)
        self.running[receive] = Child(index, pid, time.monotonic() + self.seconds)

    def be_child(self, request: bytes) -> None:
        """Judges, answers and ends."""
        os.setsid()  # so that its own children, which it may have where nothing is isolated, are killed with it
        os.dup2(1, 0)  # nothing to read, and nowhere to write
        for name in set(os.environ) - set(ONE_THREAD):  # OpenBLAS, imported late, ends a process that gets no threads
            del os.environ[name]
        isolation.limit(self.seconds, self.space)
        try:
            if self.calls is not None:
                self.calls.load()
            answer = {"score": self.judge(**pickle.loads(request))}
            data = json.dumps(answer)
        except BaseException as error:  # SystemExit and anything else that a completion may raise
            data = json.dumps({"error": described(error)})
        os.write(ANSWER, data.encode())
        os._exit(0)

    def read(self, descriptor: int) -> None:
        child = self.running[descriptor]
        try:
            data = os.read(descriptor, LONGEST)
        except OSError:
            data = b""
        child.answer += data
        if not data or len(child.answer) > LONGEST:
            self.end(descriptor, None)

    def end(self, descriptor: int, verdict: dict[str, Any] | None) -> None:
        """Passes on the answer of a child, unless there is a verdict about the child itself, and buries it."""
        child = self.running.pop(descriptor)
        os.close(descriptor)
        # How a child ended is asked where it has said nothing, and soon: it may have closed its answer and go on.
        status = bury(child.pid, patience=0.0 if verdict or child.answer else 0.1)
        self.say({"batch": self.batch, "index": child.index, **(verdict or understood(bytes(child.answer), status))})

    def kill_all(self) -> None:
        for child in self.running.values():
            bury(child.pid, patience=0.0)
        self.running.clear()


def bury(pid: int, patience: float) -> int:
    """The exit status of a child (minus the signal that killed it), which is killed if it has not ended by then."""
    until = time.monotonic() + patience
    ended, status = os.waitpid(pid, os.WNOHANG)
    while not ended and time.monotonic() < until:
        time.sleep(0.001)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        for kill in (os.killpg, os.kill):  # it has no group of its own before its setsid
            with contextlib.suppress(OSError):
                kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def understood(answer: bytes, status: int) -> dict[str, Any]:
    """The answer of a child, or why it is none. It may be anything: the child has run the completion."""
    if not answer:
        return {"error": f"killed by {signal_name(-status)}" if status < 0 else f"ended with exit code {status}"}
    try:
        said = json.loads(answer)
        if set(said) == {"error"} and isinstance(said["error"], str):
            return said
        score = said["score"]
        if score is None or (isinstance(score, int | float) and math.isfinite(score)):
            return {"score": None if score is None else float(score)}
        return {"error": f"scored {str(score)[:50]}, which is no number"}
    except Exception:  # a parser may be misled by anything
        return {"error": "the answer makes no sense"}


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def described(error: BaseException) -> str:
    """The kind of an error and the first line of its message, which a completion may have written."""
    try:
        text = str(error).strip()
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:300] if text else type(error).__name__[:300]


def refuse(answers: int, why: str, isolation: bool = False) -> None:
    os.write(answers, json.dumps({"error": why, "isolation": isolation}).encode() + b"\n")
    os._exit(1)


def packages() -> set[str]:
    """The folders of the packages that are loaded, and those that packages are installed in."""
    folders: set[str] = set()
    for module in list(sys.modules.values()):
        if "." not in module.__name__ and getattr(module, "__file__", None):  # else any folder of that name
            folders.update(str(path) for path in getattr(module, "__path__", ()))
    return folders | {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}


def prepare(about: dict[str, Any], answers: int) -> Zygote:
    """Loads the judge, and gives up the files; a first child tries the things that a judge must not be able to do."""
    sys.path += [path for path in about["path"] if path not in sys.path]
    file, function, arguments = about["judge"]
    try:
        judge = getattr(load(file), function)(**arguments)
    except Exception as error:  # of a package that is not ours: any error is why it cannot be loaded
        refuse(answers, described(error))
    used, calls = isolation.address_space(), None
    space = None if used is None else used + about["memory"]
    if about["isolated"]:
        try:
            calls = isolation.call_filter()
            isolation.close_files(packages())
        except (OSError, ImportError, RuntimeError, TypeError) as error:
            refuse(answers, described(error), isolation=True)
        if why := tried(Zygote(isolation.breaches, calls, 1, 10.0, space, answers)):
            refuse(answers, why, isolation=True)
    zygote = Zygote(judge, calls, about["workers"], about["seconds"], space, answers)
    gc.collect()
    gc.freeze()  # pages that no child touches are copied for none
    return zygote


def tried(trial: Zygote) -> str:
    """Why a child is not isolated, "" if it is."""
    trial.start(0, pickle.dumps({}))
    (descriptor, child) = next(iter(trial.running.items()))
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    data = os.read(descriptor, LONGEST) if poll.poll(trial.seconds * 1000) else b""
    os.close(descriptor)
    status = bury(child.pid, patience=1.0)
    try:
        said = json.loads(data)
    except ValueError:
        return f"the trial of it ended with {status}"
    if "error" in said:
        return said["error"]
    return f"a process of it could {', '.join(said['score'])}" if said["score"] else ""


def main() -> None:
    # The lowest number there is, so that the limit below counts it in: a child closes all up to the limit.
    answers = fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD_CLOEXEC, ANSWER + 1)
    os.close(int(sys.argv[1]))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    descriptors = DESCRIPTORS if most == resource.RLIM_INFINITY else min(DESCRIPTORS, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent of the training may ignore it, and children go unnoticed
    os.chdir("/")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, rather a judge than the training
    requests = sys.stdin.buffer
    zygote = prepare(pickle.load(requests), answers)
    zygote.say({"ready": True})
    with contextlib.suppress(EOFError):
        while True:
            zygote.answer_all(pickle.load(requests))


if __name__ == "__main__":
    main()

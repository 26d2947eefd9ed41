"""The processes of `cmdp-fast teacher --tensor-parallel N`: the first, which was started, starts the others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from cmdp_fast.children import command
from cmdp_fast.errors import InputError
from cmdp_fast.masking import told

FOREVER = timedelta(days=365)  # the others wait as long as nobody asks; one that is lost is seen by its process
PATIENCE = 10.0  # seconds that the first process has to say itself why it fails, and that the others have to end


def rank() -> int:
    """That of this process, 0 for the first."""
    return int(os.environ.get("CMDP_FAST_TEACHER_RANK", "0"))


def meet() -> None:
    """The processes meet, the others as the first has told them; each has the GPU of its rank, where there are any."""
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=FOREVER)


class Ranks:
    """The others. One that ends before its time ends this process too, with a line."""

    def __init__(self, arguments: Sequence[str], count: int) -> None:
        from accelerate.utils.other import get_free_port

        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError("--tensor-parallel starts its processes itself: start it without a launcher")
        if torch.cuda.is_available() and torch.cuda.device_count() < count:
            raise InputError(f"--tensor-parallel {count}: there are {torch.cuda.device_count()} GPUs")
        common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": get_free_port()}
        self._over, self._count = threading.Event(), count
        places = [common | {"RANK": i, "LOCAL_RANK": i, "CMDP_FAST_TEACHER_RANK": i} for i in range(count)]
        own, *others = ({name: str(value) for name, value in place.items()} for place in places)
        os.environ.update(own)
        self._processes = [
            subprocess.Popen(
                command("cmdp_fast.cli", "teacher", *arguments),
                env=os.environ | place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the first alone, which ends them
            )
            for place in others
        ]
        threading.Thread(target=self._watch, daemon=True).start()

    def lost(self, why: str) -> NoReturn:
        """Ends this process with a line, and the others: a call of the GPUs' library may never return."""
        print(told(f"cmdp-fast: error: {why}"), file=sys.stderr, flush=True)
        self._kill()
        os._exit(2)

    def end(self) -> None:
        """Waits until the others have ended, and kills those that do not."""
        self._over.set()
        for process in self._processes:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            for number, process in enumerate(self._processes, 1):
                if (code := process.poll()) is not None and not self._over.wait(PATIENCE if code == 2 else 0.0):
                    self.lost(f"process {number} of the {self._count} of the teacher has ended (exit code {code})")

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


@contextmanager
def ranks(arguments: Sequence[str], count: int) -> Iterator[Ranks]:
    """The others, from their start to their end; they are killed where this one fails."""
    started = Ranks(arguments, count)
    try:
        meet()
        yield started
        started.end()
    except BaseException:
        started._over.set()
        started._kill()
        raise

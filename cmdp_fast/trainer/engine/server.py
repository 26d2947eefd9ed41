"""A server of vLLM that the run starts on this machine and ends: in a process of its own, with a log."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cmdp_fast import installation
from cmdp_fast.errors import InputError, readable

from ..settings.config import TrainConfig
from .client import Client

# What tells a process of its place among those of a run: a server is none of them, and vLLM reads some itself.
OF_THE_RUN = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE"
    r"|(MASTER|ROLE|TORCHELASTIC|TORCH_NCCL|ACCELERATE|FSDP)_.*)"
)
SHARED_PROCESSORS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}


class Server:
    """A running server. ``options`` are vLLM's own; ``log`` gets all that it prints, in a folder of the server's alone,
    which goes with a run that is killed."""

    def __init__(self, config: TrainConfig, options: Sequence[str], log: Path, on_cpu: bool) -> None:
        from accelerate.utils.other import get_free_port

        python = find_python(config)
        self.log, port = log, get_free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
        command += [*options, *shlex.split(config.rollout_args)]
        environment = {name: value for name, value in os.environ.items() if not OF_THE_RUN.fullmatch(name)}
        if on_cpu:
            environment = SHARED_PROCESSORS | environment
        environment |= {
            "VLLM_SERVER_DEV_MODE": "1",  # the routes that take weights
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",  # nothing of a run is reported to anyone
        }
        if config.rollout_devices:
            environment["CUDA_VISIBLE_DEVICES"] = config.rollout_devices
        keeper = [sys.executable, "-I", str(Path(__file__).with_name("keeper.py")), str(os.getpid()), str(log.parent)]
        with log.open("wb") as output:
            self._keeper = subprocess.Popen(
                [*keeper, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self, client: Client, seconds: float) -> None:
        """Until it answers. Raises InputError if it ends before, or takes longer."""
        until = time.monotonic() + seconds
        while not client.answers("health"):
            if gone := self.gone():
                raise InputError(gone)
            if time.monotonic() > until:
                raise InputError(
                    f"the vLLM server has not started in {seconds:g} s (--rollout-timeout); its log: {self.log}"
                )
            time.sleep(0.3)

    def gone(self) -> str:
        """Why it is not there any more; "" if it is."""
        code = self._keeper.poll()
        if code is None:
            return ""
        return f"the vLLM server has ended (exit code {code}){_last_error(self.log)}; its log: {self.log}"

    def close(self) -> None:
        """Ends it."""
        self._keeper.terminate()
        self._keeper.wait()


def find_python(config: TrainConfig) -> str:
    """The Python that has vLLM. Raises InputError if there is none, or it cannot import that."""
    python = config.rollout_python or sys.executable
    if shutil.which(python) is None:
        raise InputError(f"--rollout-python {python}: there is no such program")
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([python, "-c", look], capture_output=True).returncode:
        raise InputError(
            f"--rollout vllm: {python} has no vLLM, which comes with the extra: {installation.extra('vllm')}; one in "
            "another environment is named by --rollout-python, one that runs already by --rollout-url"
        )
    return python


def _last_error(log: Path) -> str:
    """The last line of a log that names an error, of those that say what it is."""
    try:
        lines = log.read_text(errors="replace").splitlines()[-2000:]
    except OSError:
        return ""
    errors = [found[1] for line in lines if (found := re.search(r"\b(\w*(?:Error|Exception): .+)", line))]
    telling = [error for error in errors if "root cause" not in error and "stack trace" not in error]
    return f": {readable((telling or errors)[-1])}" if errors else ""

"""Rollouts on servers of vLLM: where they are, how they are started, what is asked of them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from cmdp_fast.errors import InputError

from .ranges import NOT_NEGATIVE, POSITIVE, ZERO_OR_ONE
from .units import ADDRESS, FILE, FOLDER, NATS, SECONDS, STEPS

_IN_THE_ENVIRONMENT = {"--api-key": "VLLM_API_KEY", "--hf-token": "HF_TOKEN"}  # the run itself reads the one as well


@dataclass(frozen=True)
class RolloutSettings:
    """Servers of vLLM for `--rollout vllm`."""

    rollout_url: Annotated[tuple[str, ...], ADDRESS] = ()
    """Servers of vLLM that run elsewhere, such as `http://10.0.0.2:8000`; each gets the weights of every step, and a
    part of the prompts. Empty: the run starts one on this machine and ends it. The guide has the command that starts
    them."""
    rollout_teacher_url: Annotated[tuple[str, ...], ADDRESS] = ()
    """Servers with the teacher, for what is sampled from it. With `rollout_url` and without these `generate` samples
    from the teacher."""
    rollout_python: Annotated[str, FILE] = ""
    """Python of the environment that vLLM is installed in, for the server that the run starts. Empty: this one."""
    rollout_args: str = ""
    """Further options for the server that the run starts, as one word: `"--gpu-memory-utilization 0.4"`. A key is no
    part of them: the server and the run read `VLLM_API_KEY` in the environment."""
    rollout_devices: str = ""
    """`CUDA_VISIBLE_DEVICES` of the server that the run starts, such as `6,7`. Empty: those of the run."""
    rollout_folder: Annotated[str, FOLDER] = ""
    """Folder for the weights on their way to the servers, under the same path on every machine. Empty: one of the
    system's temporary folders, which a server elsewhere does not see."""
    rollout_transfer: Literal["folder", "nccl"] = "folder"
    """The way of the weights to the servers: through `rollout_folder`, or from GPU to GPU with vLLM's own transfer, for
    which vLLM has to be installed beside the trainer (no GPU has run it yet)."""
    rollout_timeout: Annotated[float, POSITIVE, SECONDS] = 900.0
    """Seconds that a server may take for an answer, and to start."""
    rollout_tolerance: Annotated[float, NOT_NEGATIVE, NATS] = 0.0
    """Largest mean difference, in nats, between a server's log-probabilities of some fixed tokens and the trainer's
    after each transfer of weights. 0: 0.02 where both compute in float32, else 0.2, and after the first comparison ten
    times its difference if that is less."""
    rollout_ahead: Annotated[int, ZERO_OR_ONE, STEPS] = 0
    """1: the completions of a step are sampled while the step before updates the student, from the student before that
    update. 0: from the student that they train."""


def check_rollout(settings: RolloutSettings, rollout: str, mixes_teacher: bool, lora_rank: int) -> None:
    """Raises InputError for settings of servers that cannot work; none is asked anything."""
    if rollout and rollout != "vllm" and ":" not in rollout:
        raise InputError(f"--rollout {rollout}: expected vllm, module:function or path/file.py:function")
    if rollout == "vllm" and mixes_teacher:
        raise InputError(
            "--rollout vllm samples from one model: minillm's mixture of student and teacher needs --teacher-mix 0, or "
            "no --rollout"
        )
    for name in ("rollout_url", "rollout_teacher_url"):
        for url in getattr(settings, name):
            if not _is_address(url):
                raise InputError(f"--{name.replace('_', '-')} {url}: expected an address such as http://10.0.0.2:8000")
    if settings.rollout_url and not settings.rollout_folder and settings.rollout_transfer == "folder":
        raise InputError(
            "--rollout-url needs --rollout-folder, a folder under the same path on this machine and on the servers': "
            "the weights of each step go there"
        )
    if settings.rollout_transfer == "nccl" and lora_rank:
        raise InputError("--rollout-transfer nccl sends whole models: an adapter goes through a folder")
    if settings.rollout_teacher_url and not settings.rollout_url:
        raise InputError("--rollout-teacher-url is for a run with --rollout-url: it starts no server")
    try:
        words = shlex.split(settings.rollout_args)
    except ValueError as error:
        raise InputError(f"--rollout-args {settings.rollout_args}: {error}") from error
    for option, variable in _IN_THE_ENVIRONMENT.items():
        if any(word.partition("=")[0].replace("_", "-") == option for word in words):
            raise InputError(
                f"--rollout-args has {option}, and files keep its words: set {variable} in the environment, which the "
                "server reads too"
            )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:  # a port that is none
        return False

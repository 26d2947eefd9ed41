"""What a session of a run was made with: versions, machine, command, times; `summary.json` has one entry for each.

A run that was stopped and resumed has had several, each of a process, perhaps on another machine. Nothing of the
environment and no name of this machine is asked for. The command is masked (masking.py), by the form of its words:
hosts in addresses and paths outside the home folder stay in it.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cmdp_fast import cpu
from cmdp_fast.children import ROOT
from cmdp_fast.errors import first_line
from cmdp_fast.info import processor, versions
from cmdp_fast.masking import public, public_words
from cmdp_fast.ops.backends import choose

from ..settings.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = ("cmdp_fast", "torch", "triton", "transformers", "accelerate", "datasets", "safetensors", "peft")


class Session:
    """The session of this process, from its beginning; `words` are those behind the program's name."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self._began, self._since = _now(), time.monotonic()
        self._about = _or_error(lambda: _about(words))

    def record(self, config: TrainConfig, accelerator: Accelerator, steps: tuple[int, int]) -> dict[str, Any]:
        """The session so far, which has taken the run from one number of steps to another. What cannot be found out is
        an `error` there, and keeps nothing else of a run away."""
        return {
            "began": self._began,
            "ended": _now(),
            "seconds": round(time.monotonic() - self._since, 3),
            "steps": list(steps),
            **self._about,
            **_or_error(lambda: _here(config, accelerator)),
        }


def _or_error(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return function()
    except Exception as error:  # of whatever tells of the machine
        return {"error": public(first_line(error))}


def _about(words: Sequence[str]) -> dict[str, Any]:
    """What stays as it is as long as the process lasts."""
    return {
        "command": command_line(["cmdp-fast", "train", *words]) if words else None,
        "processor": processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions(PACKAGES),
        "commit": commit(Path(ROOT)),
    }


def _here(config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    device = accelerator.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    backend = choose(None, torch.empty(0, device=device), "constrained_reward")
    variant = f" ({cpu.native.variant()})" if backend == "cpu" and cpu.native is not None else ""
    return {
        "seed": config.seed,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "gpus": accelerator.num_processes if gpu else 0,
        "precision": "bf16" if config.precision == "bf16" else "float32",
        "backend": f"{backend}{variant}",
    }


def earlier(recorded: Any) -> list[dict[str, Any]]:
    """The entries of a checkpoint: none where an earlier version of this package wrote it."""
    return [each for each in recorded if isinstance(each, dict)] if isinstance(recorded, list) else []


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command_line(words: Sequence[str]) -> str:
    """A command as it is typed, as `masking.public_words` shows it."""
    return shlex.join(public_words(words))


def commit(root: Path) -> str | None:
    """The commit that a checkout is at, whose files may have changed since; None where there is no checkout."""
    try:
        git = root / ".git"
        if git.is_file():  # of a worktree
            git = root / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        common = git / (git / "commondir").read_text(encoding="utf-8").strip() if (git / "commondir").exists() else git
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        name = head.removeprefix("ref:").strip()
        if name != head:
            if (loose := common / name).is_file():
                head = loose.read_text(encoding="utf-8").strip()
            else:
                lines = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
                head = next((line.split()[0] for line in lines if line.endswith(f" {name}")), "")
    except (OSError, ValueError):
        return None
    return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else None

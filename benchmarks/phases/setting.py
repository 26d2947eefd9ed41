"""Where the parts of a phase run: the device, the folder for logs, the time that is left, the backends at hand."""

from __future__ import annotations

import gc
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import cmdp_fast as cf
from cmdp_fast.bench import machine
from phases import processes
from phases.record import Missing

GPU_BACKENDS = ("triton", "cuda")
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm", "--format=csv,noheader")


class Setting(NamedTuple):
    small: bool
    device: str
    log: Path  # of the programs that the parts start, one after another
    left: Callable[[], float]  # seconds

    def machine(self) -> dict[str, Any]:
        """The machine of the run, with driver and compiler."""
        found = machine.describe(self.device)
        found["driver"] = _said(QUERY)
        found["nvcc"] = _said(("nvcc", "--version"), "release")
        found["backends"] = cf.available_backends()
        return found

    def alive(self) -> bool:
        """Whether the device still answers: after some errors it never does again in this process."""
        gc.collect()
        if self.device != "cuda":
            return True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return bool(torch.ones(1, device="cuda").item())
        except RuntimeError:
            return False

    def free(self) -> None:
        """Gives memory back, so that a part finds none of another's."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def need_backend(name: str) -> None:
    """Raises Missing if a backend does not work here."""
    problem = cf.available_backends()[name]
    if problem is not None:
        raise Missing(problem)


def need_program(name: str) -> str:
    """The path of a program. Raises Missing if there is none."""
    path = shutil.which(name)
    if path is None:
        raise Missing(f"there is no {name} here")
    return path


def need_package(name: str) -> None:
    """Raises Missing if a package cannot be found."""
    if importlib.util.find_spec(name) is None:
        raise Missing(f"{name} is not installed")


def _said(command: tuple[str, ...], word: str = "") -> str | None:
    """A line that a program prints, or None if it cannot be run."""
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return processes.first(lines, *([word] if word else [])) or None

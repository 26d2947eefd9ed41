"""Checkpoints: everything that the next step depends on, so that a run goes on as if it had never stopped.

`checkpoints/step-000020` holds, as `Accelerator.save_state` writes them, the student's and the value head's weights
(safetensors), the optimizer's state and each process's random numbers, and beside them `run.json`: the step, which is
the position in the data, the schedule, lambda, all metrics so far, the sha256 of every file, and its own. All are
compared before anything is read. Nothing is read with pickle: PyTorch loads its files with `weights_only`.

A checkpoint is written under a hidden name and takes its own once it is on the disk; only then are older ones removed.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cmdp_fast.errors import InputError, first_line
from cmdp_fast.files import sync, sync_folder, writing

from ..distributed import reshard, together
from .digest import Damaged, check_digests, check_nothing_else, digests, read_sealed, write_sealed
from .report import Report

if TYPE_CHECKING:
    from accelerate import Accelerator


MANIFEST = "run.json"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return folders_of_steps(run / "checkpoints")


def folders_of_steps(parent: Path) -> list[Path]:
    """The folders named after a step, oldest first."""
    complete = [path for path in parent.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint, and with the last one their folder. The name goes first: half of one must not have it.

    Raises InputError if it cannot.
    """
    part = folder.with_name(f".{folder.name}.part")
    with writing(folder):
        shutil.rmtree(part, ignore_errors=True)
        os.rename(folder, part)
    shutil.rmtree(part, ignore_errors=True)  # a rest of it is removed with the next checkpoint
    with suppress(OSError):
        folder.parent.rmdir()


def remove_checkpoints(run: Path) -> None:
    """Removes those of a run that has ended and was asked for none. Raises InputError if it cannot."""
    for folder in checkpoints(run):
        remove_checkpoint(folder)


def save_checkpoint(accelerator: Accelerator, run: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes the checkpoint of a step, with `state` (JSON) in it, and keeps so many; every process must call this.

    Raises InputError if it cannot be written: the checkpoints that there are stay as they are.
    """
    target = run / "checkpoints" / f"step-{step:06d}"
    part = target.with_name(f".{target.name}.part")
    try:
        with together(accelerator), writing(target):
            if accelerator.is_main_process:
                for leftover in target.parent.glob(".*.part"):  # of a run that was killed
                    shutil.rmtree(leftover)
                part.mkdir(parents=True)
        with together(accelerator), writing(target):
            accelerator.save_state(part)
        with together(accelerator), writing(target):
            if accelerator.is_main_process:
                about = {"step": step, "processes": accelerator.num_processes, "files": digests(part)}
                write_sealed(part / MANIFEST, {**state, **about})
                sync_folder(part)
                os.rename(part, target)
                sync(target.parent)
                for old in checkpoints(run)[:-keep]:
                    remove_checkpoint(old)
    except InputError as error:
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        kept = checkpoints(run)
        raise InputError(f"{error}; the last whole one is {kept[-1] if kept else 'not there yet'}") from error
    return target


def load_checkpoint(accelerator: Accelerator, student: nn.Module, run: Path, report: Report) -> dict[str, Any]:
    """Loads into all that the accelerator has prepared, and returns the `state`; every process must call this.

    If the last checkpoint is not as it was written, says so and takes the one before; later ones are removed, for they
    belong to another future. One that is as it was written and cannot be loaded stays: memory may be short, or a disk
    away. Raises InputError, which names it, then, and if there is none that is as it was written.
    """
    failures: list[str] = []
    reshard(student)
    for folder in reversed(checkpoints(run)):
        try:
            with together(accelerator):
                state = _manifest(accelerator, folder)
        except InputError as error:
            failures.append(str(error))
            report.say(str(error))
            continue
        with together(accelerator):
            _load(accelerator, folder)
        if failures:
            report.say(f"going on from the one before, {folder}")
            with together(accelerator), writing(folder.parent):
                if accelerator.is_main_process:
                    for later in checkpoints(run)[-len(failures) :]:
                        remove_checkpoint(later)
        return state
    raise InputError(f"{run} has no checkpoint that can be used; {failures[0]}")


def _manifest(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """The checkpoint's `state`. Raises InputError unless its files are as they were written; the main process looks."""
    try:
        state = read_sealed(folder / MANIFEST)
        step, processes, files = (state.get(name) for name in ("step", "processes", "files"))
        if not isinstance(step, int) or folder.name != f"step-{step:06d}":
            raise Damaged(f"{MANIFEST} is that of step {step}")
        if accelerator.is_main_process:
            check_digests(folder, files)
            check_nothing_else(folder, [MANIFEST, *state["files"]])
    except Damaged as error:
        raise InputError(f"{folder} cannot be read: {error}") from error
    if processes != accelerator.num_processes:
        raise InputError(
            f"{folder} is one of {processes} processes, and here are {accelerator.num_processes}: "
            "a run goes on with as many as it began with"
        )
    return state


def _load(accelerator: Accelerator, folder: Path) -> None:
    try:
        accelerator.load_state(folder)
        _check_random_numbers(folder / f"random_states_{accelerator.process_index}.pkl")
    except Exception as error:  # each library has errors of its own for a file that it cannot read
        raise InputError(
            f"{folder} cannot be loaded, though its files are as they were written: {first_line(error)}"
        ) from error


def _check_random_numbers(path: Path) -> None:
    """Raises ValueError if they were not put back: accelerate passes over those that it cannot use."""
    from accelerate.utils import load

    stored = load(path)  # weights_only
    now = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    then = [stored["torch_manual_seed"], *stored.get("torch_cuda_manual_seed", [])]
    if len(now) != len(then) or not all(map(torch.equal, now, then)):
        raise ValueError(f"{path.name} does not fit this machine's devices")

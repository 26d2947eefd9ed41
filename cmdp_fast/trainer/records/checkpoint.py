"""Checkpoints: everything that the next step depends on, so that a run goes on as if it had never stopped.

`checkpoints/step-000020` holds the weights of student and value head (`model.bin`) and the optimizer's state
(`optimizer.bin`), both whole and by the names of the parameters, each process's random numbers, and beside them
`run.json`: the step, which is the position in the data, the schedule, lambda, all metrics so far, the sha256 of every
file, and its own. All are compared before anything is read. Nothing is read with pickle: PyTorch loads its files with
`weights_only`.

The main process alone writes and reads. `torch.distributed.checkpoint` gathers what is spread and sends it out again,
so that no other machine has to see the folder, and a run may go on in another number of processes, sharded or not.

A checkpoint is written under a hidden name and takes its own once it is on the disk; only then are older ones removed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from cmdp_fast.digest import Damaged, check_digests, check_nothing_else, digests, read_sealed, write_sealed
from cmdp_fast.errors import InputError, first_line
from cmdp_fast.files import sync, sync_folder, writing

from ..distributed import any_process, of_main, of_others, reshard, together
from .random_numbers import random_state, set_random_state
from .report import Report

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.checkpoint.state_dict import StateDictOptions


MANIFEST = "run.json"
MODEL, OPTIMIZER, RANDOM = "model.bin", "optimizer.bin", "random_states.bin"


class Trained(NamedTuple):
    """What a checkpoint holds the tensors of: the modules as accelerate runs them, and the optimizer of both."""

    student: nn.Module
    value_head: nn.Module | None
    optimizer: torch.optim.Optimizer

    @property
    def modules(self) -> nn.ModuleDict:
        """Both as one module, for the names of the parameters."""
        named = {"student": self.student, "value": self.value_head}
        return nn.ModuleDict({name: module for name, module in named.items() if module is not None})


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
    shutil.rmtree(part, ignore_errors=True)  # a rest of it is removed by whoever goes on
    with suppress(OSError):
        folder.parent.rmdir()


def remove_checkpoints(run: Path) -> None:
    """Removes those of a run that has ended and was asked for none. Raises InputError if it cannot."""
    for folder in checkpoints(run):
        remove_checkpoint(folder)


def remove_older(parent: Path, keep: int) -> None:
    """Removes all but the last so many of the folders named after a step. Raises InputError if it cannot."""
    for old in folders_of_steps(parent)[:-keep]:
        remove_checkpoint(old)


def remove_parts(run: Path) -> None:
    """Removes what a kill has left of checkpoints and students that were being written or removed."""
    for parent in (run / "checkpoints", run / "students"):
        for part in parent.glob(".*.part"):
            shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):
            parent.rmdir()


def save_checkpoint(
    accelerator: Accelerator, trained: Trained, run: Path, step: int, state: dict[str, Any], keep: int = 2
) -> Path:
    """Writes the checkpoint of a step, with `state` (JSON) in it, and keeps so many; every process must call this.

    Raises InputError if it cannot be written: the checkpoints that there are stay as they are.
    """
    from accelerate.utils import gather_object
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    target = run / "checkpoints" / f"step-{step:06d}"
    part = target.with_name(f".{target.name}.part")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # in the main process; nothing in others
    tensors = get_state_dict(trained.modules, trained.optimizer, options=whole)
    numbers = gather_object([random_state(accelerator.device)])
    try:
        with together(accelerator), writing(target):
            if accelerator.is_main_process:
                for leftover in target.parent.glob(".*.part"):  # of a run that was killed
                    shutil.rmtree(leftover)
                part.mkdir(parents=True)
                for name, value in zip((MODEL, OPTIMIZER, RANDOM), (*tensors, numbers), strict=True):
                    torch.save(value, part / name)
                about = {"step": step, "processes": accelerator.num_processes, "files": digests(part)}
                write_sealed(part / MANIFEST, {**state, **about})
                sync_folder(part)
                os.rename(part, target)
                sync(target.parent)
                remove_older(target.parent, keep)
    except InputError as error:
        if not accelerator.is_main_process:
            raise
        shutil.rmtree(part, ignore_errors=True)
        kept = checkpoints(run)
        raise InputError(f"{error}; the last whole one is {kept[-1] if kept else 'not there yet'}") from error
    return target


def load_checkpoint(
    accelerator: Accelerator, trained: Trained, run: Path, report: Report, seed: int = 0
) -> dict[str, Any]:
    """Loads into all that is trained, and returns the `state`; every process must call this.

    If the last checkpoint is not as it was written, says so and takes the one before; later ones are removed, for they
    belong to another future. One that is as it was written and cannot be loaded stays: memory may be short, or a disk
    away. Raises InputError, which names it, then, and if there is none that is as it was written.
    Where its random numbers do not fit, for the processes are others, new ones begin, from the `seed` and the step.
    """
    folder, state, damaged = of_main(lambda: _last_whole(run, report), accelerator)
    _load(accelerator, trained, folder)
    if not _continues_random_numbers(accelerator, folder):
        from accelerate.utils import set_seed

        set_seed(random.Random(f"{seed} {state['step']}").randrange(2**31), device_specific=True)
        report.say(
            f"{folder} is of {_plural(state['processes'])}, here are {_plural(accelerator.num_processes)} on "
            f"{accelerator.device.type}: the steps are of the same problems, and new random numbers begin, so that the "
            "figures are those of a run that never stopped in distribution alone"
        )
    if damaged:
        report.say(f"going on from the one before, {folder}")
        with together(accelerator), writing(folder.parent):
            if accelerator.is_main_process:
                for later in checkpoints(run)[-damaged:]:
                    remove_checkpoint(later)
    return state


def _plural(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")


def _last_whole(run: Path, report: Report) -> tuple[Path, dict[str, Any], int]:
    """(the last checkpoint whose files are as they were written, its `state`, how many later ones are not)."""
    failures: list[str] = []
    for folder in reversed(checkpoints(run)):
        try:
            return folder, _manifest(folder), len(failures)
        except InputError as error:
            failures.append(str(error))
            report.say(str(error))
    raise InputError(f"{run} has no checkpoint that can be used; {failures[0]}")


def _manifest(folder: Path) -> dict[str, Any]:
    """The checkpoint's `state`. Raises InputError unless its files are as they were written."""
    try:
        state = read_sealed(folder / MANIFEST)
        step, processes, files = (state.get(name) for name in ("step", "processes", "files"))
        if not isinstance(step, int) or folder.name != f"step-{step:06d}" or not isinstance(processes, int):
            raise Damaged(f"{MANIFEST} is that of step {step}")
        check_digests(folder, files)
        check_nothing_else(folder, [MANIFEST, *state["files"]])
        if {MODEL, OPTIMIZER, RANDOM} - {*state["files"]}:
            raise Damaged("an earlier version of cmdp_fast wrote it, with which its run can be ended")
    except Damaged as error:
        raise InputError(f"{folder} cannot be read: {error}") from error
    return state


def load_weights(accelerator: Accelerator, trained: Trained, run: Path, report: Report) -> int:
    """Loads the weights of the last checkpoint that is as it was written, and of it nothing else; returns its step.
    Every process must call this. Raises InputError as `load_checkpoint` does."""
    folder, state, _ = of_main(lambda: _last_whole(run, report), accelerator)
    _load_model(accelerator, trained, folder)
    return int(state["step"])


def _load(accelerator: Accelerator, trained: Trained, folder: Path) -> None:
    """Weights and optimizer, which the main process reads and sends to the others."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    _load_model(accelerator, trained, folder)
    read = _read(accelerator, folder, OPTIMIZER)
    groups = of_main(lambda: _groups_alone(read, folder), accelerator)
    with _loading(folder):
        for ours, theirs in zip(trained.optimizer.param_groups, groups, strict=True) if groups else ():
            ours.update(theirs)
        if not groups:
            set_optimizer_state_dict(trained.modules, trained.optimizer, read, options=_sent(accelerator))


def _load_model(accelerator: Accelerator, trained: Trained, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    reshard(trained.student)
    read = _read(accelerator, folder, MODEL)
    with _loading(folder):
        set_model_state_dict(trained.modules, read, options=_sent(accelerator))


def _read(accelerator: Accelerator, folder: Path, name: str) -> dict[str, Any]:
    """The contents of a file in the main process; nothing in others."""
    read: dict[str, Any] = {}
    with together(accelerator), _loading(folder):
        if accelerator.is_main_process:
            read = torch.load(folder / name, map_location="cpu", weights_only=True)
    return read


def _sent(accelerator: Accelerator) -> StateDictOptions:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)


def _groups_alone(state: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The learning rates and the like of an optimizer that keeps nothing of the steps (`sgd`), else nothing: what sets
    an optimizer's state looks for a tensor in it."""
    with _loading(folder):
        if state["state"]:
            return []
        return [{name: value for name, value in group.items() if name != "params"} for group in state["param_groups"]]


def _continues_random_numbers(accelerator: Accelerator, folder: Path) -> bool:
    """Whether the random numbers of each process go on where they stood; not if there are others, or on others."""

    def read() -> Any:
        with _loading(folder):
            return torch.load(folder / RANDOM, weights_only=True)

    states, on_gpu = of_main(read, accelerator), accelerator.device.type == "cuda"
    with together(accelerator), _loading(folder):
        other = len(states) != accelerator.num_processes or any(("cuda" in each) != on_gpu for each in states)
    if any_process(other, accelerator):
        return False
    with together(accelerator), _loading(folder):
        set_random_state(states[accelerator.process_index], accelerator.device)
    return True


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each library has errors of its own for a file that it cannot read
        if of_others(error):
            raise
        if type(error).__name__ == "UnpicklingError":  # with torch's advice to read the file as a pickle
            raise InputError(
                f"{folder} holds more than numbers: no checkpoint of this program does, and it is not read"
            ) from error
        raise InputError(
            f"{folder} cannot be loaded, though its files are as they were written: {first_line(error)}"
        ) from error

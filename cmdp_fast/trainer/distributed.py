"""Several processes that run as one: the share of each, their agreement, and the end of all by an error of one.

Every process runs the same program on its own share of a global batch. A step of P processes with `prompts_per_step`
prompts each is the step that one process would take with P times as many. The main process alone looks at the run's
folder, and tells the others: on other machines it need not be there. `launch.py` is how they come together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn

from cmdp_fast.errors import InputError, ProcessAlone, ProcessLost, first_line
from cmdp_fast.teachers.teacher import Teacher

from .causal_lm import CausalLM

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")


def share(items: Sequence[T], accelerator: Accelerator) -> list[T]:
    """This process's slice of the items, as long as any other's; if they do not go round, some appear twice."""
    processes, size = accelerator.num_processes, -(-len(items) // accelerator.num_processes)
    padded = [items[i % len(items)] for i in range(size * processes)]
    return padded[accelerator.process_index * size :][:size]


def whole(shares: Sequence[T], count: int, accelerator: Accelerator) -> list[T]:
    """The results of all processes for their `share` of `count` items, in order and once each; any Python objects."""
    from accelerate.utils import gather_object

    return list(shares) if accelerator.num_processes == 1 else gather_object(list(shares))[:count]


def check_alike(values: Mapping[str, str], accelerator: Accelerator) -> None:
    """Raises InputError in every process if one has other values, or digests, under these names than the first: each
    was given a command of its own, and each machine reads its own files."""
    from accelerate.utils import gather_object

    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([dict(values)])
    for number, each in enumerate(others, 1):
        for what, value in first.items():
            if each[what] != value:
                raise InputError(
                    f"process {number} has {'other' if what == 'problems' else 'another'} {what} than process 0 "
                    f"({each[what][:40]}, not {value[:40]}): on every machine the command and the files must be the "
                    "same (of models that the package makes itself, copy its cache), and a task that makes its "
                    "problems otherwise in each process needs PYTHONHASHSEED=0"
                )


@contextmanager
def together(accelerator: Accelerator | PartialState) -> Iterator[None]:
    """An InputError of one process in the body becomes an InputError of all of them, with the same message.

    Every process must come here. The body must not wait for other processes where an InputError can keep one away.
    """
    error: InputError | None = None
    try:
        yield
    except InputError as raised:
        error = raised
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        messages = gather_object([None if error is None else str(error)])
        first = next((message for message in messages if message is not None), None)
        if first is not None and first != str(error):  # else it is this process's own, with its cause
            error = InputError(first)
    if error is not None:
        raise error


@contextmanager
def by_itself(accelerator: Accelerator) -> Iterator[None]:
    """An InputError of one process where the others may be elsewhere, and wait for it, becomes a ProcessAlone: they
    cannot be told, as `together` does."""
    try:
        yield
    except InputError as error:
        if accelerator.num_processes == 1:
            raise
        raise ProcessAlone(str(error)) from error


def of_main(function: Callable[[], T], accelerator: Accelerator | PartialState) -> T:
    """The result in every process of a function that the main one alone calls, any Python object. If it fails there
    with an InputError, it fails in all."""
    from accelerate.utils import broadcast_object_list

    results: list[Any] = [None]
    with together(accelerator):
        if accelerator.is_main_process:
            results = [function()]
    return results[0] if accelerator.num_processes == 1 else broadcast_object_list(results)[0]


@contextmanager
def noticing_loss(accelerator: Accelerator, then: Callable[[], str]) -> Iterator[None]:
    """Where the body fails since another process has gone, or did not answer in time, raises ProcessLost; `then` is
    what was lost, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not of_others(error):
            raise
        reason = first_line(error).rpartition("] ")[2].partition(". ")[0]  # without the place in gloo's sources
        raise ProcessLost(f"another process is gone, or cannot be reached ({reason}); {then()}") from error


def of_others(error: Exception) -> bool:
    """Whether an error says that other processes did not do their part of what all do, and nothing of what that was."""
    return (
        dist.is_available()
        and isinstance(error, RuntimeError)
        and (isinstance(error, dist.DistError) or "gloo" in str(error))
    )


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set in any process; the same in all."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def main_first(function: Callable[[], T], accelerator: Accelerator) -> T:
    """The function's result. The first process of each machine calls it alone, then the others: they find a full cache.

    If it fails in one with an InputError, it fails in all, and is called by no further one.
    """
    result: list[T] = []
    for turn in (True, False) if accelerator.num_processes > 1 else (True,):
        with together(accelerator):
            if accelerator.is_local_main_process == turn:
                result.append(function())
    return result[0]


def whole_student(student: nn.Module, accelerator: Accelerator) -> tuple[CausalLM, dict[str, Any] | None]:
    """(the model without accelerate's wrapper, its weights if it does not hold all of them itself).

    Every process must call this; with FSDP only the main process gets the weights.
    """
    model = accelerator.unwrap_model(student)
    return model, accelerator.get_state_dict(student) if accelerator.distributed_type == "FSDP" else None


def reshard(student: nn.Module) -> None:
    """Has FSDP spread the head again, which a forward pass leaves together: weights are loaded into shards."""
    from torch.distributed.fsdp import FSDPModule

    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare_student(
    student: CausalLM, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Student and optimizer as accelerate runs and checkpoints them: on their device, replicated or sharded.

    Without the copy of every output to float32 that accelerate adds under mixed precision: the kernels read bfloat16
    logits as they are, and the trainer has the autocast where it wants it.
    """
    prepared, optimizer = accelerator.prepare(student, optimizer)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    return prepared, optimizer


def on_device(model: CausalLM | Teacher, accelerator: Accelerator) -> Any:
    """A model that is not trained, on its device; with FSDP sharded like the student. A teacher that is the student
    without its adapter has no weights of its own: the student's are there already. Of one that is asked the answers
    come there, and one that bitsandbytes has quantised is where that has put it."""
    if getattr(model, "quantization_method", None) == "bitsandbytes":
        return model
    if isinstance(model, Teacher):
        return model.to(accelerator.device)
    if accelerator.distributed_type != "FSDP" or next(model.parameters(), None) is None:
        return model.to(accelerator.device)
    from accelerate.utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model)

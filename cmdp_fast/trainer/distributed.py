"""Several processes that run as one: the share of each, their agreement, and the end of all by an error of one.

Under `accelerate launch` (or torchrun) every process runs the same program on its own share of a global batch. A step
of P processes with `prompts_per_step` prompts each is the step that one process would take with P times as many.

    accelerate launch --config_file ddp.yaml --num_processes 8 -m cmdp_fast.cli train ...

The package brings two files for `--config_file`, in `cmdp_fast/trainer/accelerate`: `ddp.yaml` (each process holds both
models) and `fsdp2.yaml` (both models are spread over the processes; for GPUs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from cmdp_fast.errors import InputError, first_line

from .causal_lm import CausalLM
from .settings.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


T = TypeVar("T")

# Longer than anything that one process does while the others wait for it, so that only a dead one is given up.
PATIENCE = timedelta(minutes=30)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of the run; several processes meet here. Raises InputError for a set-up that the trainer does not
    support."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # or DDP would hold every gradient twice
    handlers = [InitProcessGroupKwargs(timeout=PATIENCE), views]
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=handlers)
    except (ImportError, ValueError, NotImplementedError) as error:
        raise InputError(f"accelerate cannot do what its configuration asks for: {first_line(error)}") from error
    if accelerator.distributed_type == "FSDP":
        check_sharding(accelerator, config)
    return accelerator


def check_training(accelerator: Accelerator) -> None:
    """Raises InputError where accelerate's configuration would make a step another than the settings say, silently."""
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise InputError(f"accelerate's distributed_type is {kind}: only DDP and FSDP version 2 are supported")
    if (accumulated := accelerator.gradient_accumulation_steps) != 1:
        raise InputError(
            f"accelerate's gradient_accumulation_steps is {accumulated}, which would divide the gradient by as much: "
            "set it to 1 (ACCELERATE_GRADIENT_ACCUMULATION_STEPS); an optimizer step is over --minibatch-size "
            "completions, and their gradients are accumulated over parts of --micro-batch-size"
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if (size := getattr(parallelism, name, None) or 1) != 1:
            raise InputError(f"accelerate's {name} is {size}, expected 1: each process has completions of its own")
    if (backend := accelerator.state.dynamo_plugin.backend.value) != "NO":
        raise InputError(
            f"accelerate's dynamo_backend is {backend.lower()}, which would switch on TF32 and compile nothing that a "
            "step runs: set it to no (ACCELERATE_DYNAMO_BACKEND)"
        )


def check_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    """Raises InputError unless the trainer can work with models that are sharded as accelerate was told to."""
    plugin = accelerator.state.fsdp_plugin
    if not accelerator.is_fsdp2:
        raise InputError("of FSDP only version 2 is supported: set fsdp_version: 2 in accelerate's configuration")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):  # other files of its are read with pickle
        raise InputError("FSDP checkpoints need fsdp_state_dict_type: FULL_STATE_DICT in accelerate's configuration")
    if config.has_value_head:
        raise InputError("--baseline gae does not work with FSDP, whose optimizer has the student's parameters alone")
    if config.lora_rank:
        raise InputError("--lora-rank does not work with FSDP: an adapter is small, DDP serves it")
    if config.offload_teacher or config.offload_optimizer:
        option = "--offload-teacher" if config.offload_teacher else "--offload-optimizer"
        raise InputError(f"{option} does not work with FSDP: its models are spread, set fsdp_offload_params there")
    if config.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise InputError(f"--optim {config.optim} does not work with FSDP: only adamw_torch and adamw_torch_fused do")
    if config.mixes_teacher:
        raise InputError("minillm with --teacher-mix does not work with FSDP: the teacher would have to keep step")


def share(items: Sequence[T], accelerator: Accelerator) -> list[T]:
    """This process's slice of the items, as long as any other's; if they do not go round, some appear twice."""
    processes, size = accelerator.num_processes, -(-len(items) // accelerator.num_processes)
    padded = [items[i % len(items)] for i in range(size * processes)]
    return padded[accelerator.process_index * size :][:size]


def whole(shares: Sequence[T], count: int, accelerator: Accelerator) -> list[T]:
    """The results of all processes for their `share` of `count` items, in order and once each; any Python objects."""
    from accelerate.utils import gather_object

    return list(shares) if accelerator.num_processes == 1 else gather_object(list(shares))[:count]


def check_alike(digest: str, accelerator: Accelerator) -> None:
    """Raises InputError in every process if one has other problems than the first, by their digest: each takes its
    share by number."""
    from accelerate.utils import gather_object

    digests = [digest] if accelerator.num_processes == 1 else gather_object([digest])
    if others := [number for number, each in enumerate(digests) if each != digests[0]]:
        raise InputError(
            f"process {others[0]} has other problems than process 0 (sha256 {digests[others[0]][:12]}, not "
            f"{digests[0][:12]}): all must read the same data, and a task that makes it otherwise in "
            "each process needs PYTHONHASHSEED=0"
        )


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
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


def on_device(model: CausalLM, accelerator: Accelerator) -> nn.Module:
    """A model that is not trained, on its device; with FSDP sharded like the student."""
    if accelerator.distributed_type != "FSDP":
        return model.to(accelerator.device)
    from accelerate.utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model)

"""What a launcher has set up: the processes meet, what the trainer does not support is refused, the rest is said.

Under `accelerate launch` (or torchrun) every process runs the same program; `MACHINES.md` has the commands, for one
machine and for several. The package brings two files for `--config_file`, in `cmdp_fast/trainer/accelerate`: `ddp.yaml`
(each process holds both models) and `fsdp2.yaml` (both models are spread over the processes; for GPUs).
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from cmdp_fast.errors import InputError, first_line

from .settings.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

# Longer than anything that one process does while the others wait for it, so that only a dead one is given up.
PATIENCE = 1800  # seconds


def patience() -> timedelta:
    """How long a process waits for another: `CMDP_FAST_PATIENCE` in seconds. PyTorch and accelerate have no variable
    for that. Raises InputError if it is not a number of seconds."""
    given = os.environ.get("CMDP_FAST_PATIENCE", "") or str(PATIENCE)
    if not given.isascii() or not given.isdigit() or not 0 < int(given) < 10**7:
        raise InputError(f"CMDP_FAST_PATIENCE is {given!r}, expected how many seconds a process waits for another")
    return timedelta(seconds=int(given))


def launched() -> int:
    """The number of processes, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def meet() -> PartialState:
    """Several processes meet, before there is an accelerator. Raises InputError if they do not."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    try:
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=patience())
    except dist.DistError as error:
        raise _not_met(error) from error


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of the run; several processes meet here. Raises InputError for a set-up that the trainer does not
    support."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # or DDP would hold every gradient twice
    handlers = [InitProcessGroupKwargs(timeout=patience()), views]
    try:
        plugin = FullyShardedDataParallelPlugin() if _asks_for_sharding() else None
        if plugin is not None and plugin.fsdp_version == 2 and config.precision == "bf16":
            plugin.mixed_precision_policy = _policy()
        accelerator = Accelerator(mixed_precision=config.precision, kwargs_handlers=handlers, fsdp_plugin=plugin)
    except dist.DistError as error:
        raise _not_met(error) from error
    except (ImportError, ValueError, NotImplementedError) as error:
        raise InputError(f"accelerate cannot do what its configuration asks for: {first_line(error)}") from error
    if accelerator.distributed_type == "FSDP":
        check_sharding(accelerator, config)
    return accelerator


def _not_met(error: Exception) -> InputError:
    return InputError(
        f"the processes have not met, at {os.environ.get('MASTER_ADDR', 'no MASTER_ADDR')}:"
        f"{os.environ.get('MASTER_PORT', '')}: {first_line(error)}"
    )


def _asks_for_sharding() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _policy() -> torch.distributed.fsdp.MixedPrecisionPolicy:
    """accelerate's for bfloat16, but that gradients are added up in float32, over micro-batches and processes, as DDP
    does it: in bfloat16 the sum of many loses a bit for each doubling of their number."""
    half = torch.bfloat16
    return torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, output_dtype=half)


def check_training(accelerator: Accelerator) -> None:
    """Raises InputError where accelerate's configuration would make a step another than the settings say, silently."""
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise InputError(f"accelerate's distributed_type is {kind}: only DDP and FSDP version 2 are supported")
    if _asks_for_sharding() and (kind != "FSDP" or accelerator.num_processes == 1):
        would = "one process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes with DDP"
        raise InputError(
            f"accelerate's configuration asks for FSDP, and this would be {would}: it spreads models over two or more "
            "processes with a GPU each (--num_processes); ddp.yaml, or no launcher at all, is for models that fit"
        )
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
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):  # with which processes have gloo beside NCCL
        raise InputError("FSDP checkpoints need fsdp_state_dict_type: FULL_STATE_DICT in accelerate's configuration")
    if config.has_value_head:
        raise InputError("--baseline gae does not work with FSDP, whose optimizer has the student's parameters alone")
    if config.teacher_device or config.offload_optimizer:
        option = f"--teacher-device {config.teacher_device}" if config.teacher_device else "--offload-optimizer"
        raise InputError(f"{option} does not work with FSDP: its models are spread, set fsdp_offload_params there")
    if config.teacher_quantization:
        raise InputError(
            f"--teacher-quantization {config.teacher_quantization} does not work with FSDP, which spreads it"
        )
    if config.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise InputError(f"--optim {config.optim} does not work with FSDP: only adamw_torch and adamw_torch_fused do")
    if config.mixes_teacher:
        raise InputError("minillm with --teacher-mix does not work with FSDP: the teacher would have to keep step")


def host_count(accelerator: Accelerator) -> int:
    """The number of machines. Every process must call this."""
    from accelerate.utils import gather_object

    return sum(gather_object([accelerator.is_local_main_process]))


def described(accelerator: Accelerator, config: TrainConfig) -> str:
    """Hosts, processes, sharding and precision, such as "2 hosts, 16 processes, FSDP2 over 16, bf16 over float32
    weights". Every process must call this."""
    count, hosts = accelerator.num_processes, host_count(accelerator)
    spread = f"FSDP2 over {count}" if accelerator.distributed_type == "FSDP" else "DDP" if count > 1 else ""
    precision = "bf16 over float32 weights" if config.precision == "bf16" else "float32"
    if config.lora_rank and config.precision == "bf16":
        precision = "bf16, the adapter in float32"
    number = f"{count} process" + ("es" if count > 1 else "")
    return ", ".join(filter(None, [f"{hosts} host" + ("s" if hosts > 1 else ""), number, spread, precision]))

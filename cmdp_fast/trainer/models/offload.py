"""What a part of a step does not need lies in the host's memory meanwhile: the teacher's layers and the optimizer's
state.

In the update the student needs the optimizer, and of the teacher its head and the hidden states that were kept. In
everything else, rollout, scoring and evaluations, the teacher is whole and the optimizer away.

accelerate's `cpu_offload_with_hook` would take the head along, and bring to the host in each step what never changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.errors import InputError

from ..optimization import moments
from ..settings.config import TrainConfig


class Offload:
    """The teacher's layers and the optimizer's state, as far as the settings want them away from the accelerator."""

    def __init__(self, config: TrainConfig, teacher: Any, optimizer: torch.optim.Optimizer) -> None:
        self.layers = HostCopies(layers_of(teacher) if config.teacher_device == "offload" else [])
        self.optimizer = optimizer if config.offload_optimizer else None

    def rest(self) -> None:
        """As it is outside of the update."""
        if self.optimizer is not None:
            move_state(self.optimizer, to_host=True)
        self.layers.bring()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The optimizer is on its device in the body, and the teacher's layers are not."""
        self.layers.leave()
        if self.optimizer is not None:
            move_state(self.optimizer, to_host=False)
        try:
            yield
        finally:
            self.rest()


class HostCopies:
    """Tensors that do not change, on their device or in the host's memory, which has a copy from the first time on."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.copies: list[Tensor] = []

    def leave(self) -> None:
        """Frees the device's memory."""
        if not self.copies:
            self.copies = [on_host(tensor.detach()) for tensor in self.tensors]
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            tensor.data = copy

    def bring(self) -> None:
        """Back to the device."""
        for tensor in self.tensors:
            tensor.data = tensor.data.to(self.device, non_blocking=True)


def layers_of(teacher: Any) -> list[Tensor]:
    """A model's parameters and buffers but for those of its head; one that is the embedding too stays with it."""
    head = teacher.get_output_embeddings()
    kept = {id(tensor) for tensor in (*head.parameters(), *head.buffers())}
    return [tensor for tensor in (*teacher.parameters(), *teacher.buffers()) if id(tensor) not in kept]


def move_state(optimizer: torch.optim.Optimizer, *, to_host: bool) -> None:
    """Moves an optimizer's moments to the host's memory, or to where their parameters are; counters stay."""
    for parameter, state in optimizer.state.items():
        for name, moment in moments(state).items():
            if to_host:
                state[name] = on_host(moment)
            else:
                state[name] = moment.to(parameter.device, non_blocking=True)


def on_host(tensor: Tensor) -> Tensor:
    """A tensor in the host's memory: itself if it is there, else a copy, pinned where a GPU has to fetch it again."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda").copy_(tensor)


def check_offload(config: TrainConfig) -> None:
    """Raises InputError where an optimizer's state cannot be moved: it holds more than tensors of torch's."""
    if config.offload_optimizer and config.optim not in MOVABLE:
        raise InputError(
            f"--offload-optimizer does not work with --optim {config.optim}, only with {', '.join(MOVABLE)}"
        )


MOVABLE = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")

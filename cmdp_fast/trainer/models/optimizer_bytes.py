"""The memory of an optimizer: its state, and the numbers of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..optimization import make_optimizer, moments
from ..settings.config import TrainConfig
from .live_bytes import LiveBytes


class OptimizerBytes(NamedTuple):
    """Of an optimizer, beside its parameters and their gradients."""

    state: int | None  # None: not known
    step: int  # made in a step and dropped; 0 where it is not known


def optimizer_bytes(config: TrainConfig, parameters: Sequence[Tensor], *, at_once: bool) -> OptimizerBytes:
    """What an optimizer takes for some parameters, in a step on shapes alone. ``at_once``: it goes through all of them
    at once, operation by operation, as torch's own do on a GPU.

    Of native code that wants numbers, bitsandbytes' for one, the state alone is known: it takes a step with a million
    of them, and the share of each is counted. None where that fails here too, such as code that runs on GPUs alone.
    """
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with detect_fake_mode(list(parameters)) or FakeTensorMode():
            shapes = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in parameters]
            optimizer = make_optimizer(config, [{"params": shapes, "lr": config.learning_rate}])
            for group in optimizer.param_groups:
                if at_once and "foreach" in group and not group.get("fused"):
                    group["foreach"] = True
            for parameter in shapes:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            held = [tensor for state in optimizer.state.values() for tensor in moments(state).values()]
            gradients = [parameter.grad for parameter in shapes if parameter.grad is not None]
            with LiveBytes([*shapes, *gradients, *held]) as live:
                optimizer.step()
            return OptimizerBytes(sum(tensor.nbytes for tensor in held), live.peak)
    except RuntimeError:  # of code that wants numbers
        pass
    try:
        sample = nn.Parameter(torch.zeros(2**10, 2**10))
        optimizer = make_optimizer(config, [{"params": [sample], "lr": config.learning_rate}])
        sample.grad = torch.zeros_like(sample)
        optimizer.step()
        size = sum(tensor.nbytes for tensor in moments(optimizer.state[sample]).values())
        return OptimizerBytes(size * sum(p.numel() for p in parameters) // sample.numel(), 0)
    except (RuntimeError, AttributeError):  # of code for GPUs; bitsandbytes has no such function without one
        return OptimizerBytes(None, 0)

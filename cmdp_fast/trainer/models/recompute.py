"""Gradient checkpointing: a layer keeps its input alone and computes the rest again in the backward pass.

transformers does it only in training mode, in which dropout would be on and generation would lose its cache. The
trainer keeps its models in evaluation mode; so a layer is told that it is training for as long as it takes to find out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cmdp_fast.errors import InputError


def recompute_layers(model: nn.Module) -> None:
    """Switches gradient checkpointing on in a transformers model, in place, for every call that records a gradient.

    Calls without gradient, generation among them, are as before. Raises InputError for a model that has no layers of
    the kind that transformers can checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"--gradient-checkpointing: {type(model).__name__} has no layers that can be checkpointed")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_recomputed, layer)

    def choose(*_: Any) -> None:
        for layer in layers:
            layer.training = torch.is_grad_enabled()

    model.register_forward_pre_hook(choose)


def _recomputed(layer: Any, run: Any, *inputs: Any) -> Any:
    """The layer's output, in evaluation mode now and when it is computed again."""

    def evaluated(*inputs: Any) -> Any:
        training, layer.training = layer.training, False
        try:
            return run(*inputs)
        finally:
            layer.training = training

    return checkpoint(evaluated, *inputs, use_reentrant=False)

"""The memory of a training: its tensors are counted, the activations that the layers keep are estimated.

The figures are bytes on one process that holds all of both models, each kind of tensor by itself. Those that the
allocator and the kernels add are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import cmdp_fast as cf

from ..causal_lm import CausalLM
from ..settings.config import TrainConfig
from .value_head import ValueHead

FLOAT32 = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, with every completion at its full length; and how many parameters they belong to."""

    parameters: int  # of the student
    trained_parameters: int  # of the student or its adapter, and of the value head
    teacher_parameters: int  # of its own: 0 if it is the student without its adapter
    weights: int  # of the student and the value head
    teacher_weights: int
    gradients: int
    optimizer: int  # AdamW's two moments
    teacher_outputs: int  # kept from scoring to update; 0 if they do not fit --teacher-cache-mb
    activations: int | None  # estimate: kept by the layers for the backward pass of a micro-batch; None: not known
    outputs: int  # hidden states or logits of both models for a micro-batch
    cache: int  # estimate: keys and values of the completions that are sampled at once

    @property
    def at_rest(self) -> int:
        """Held throughout."""
        return self.weights + self.teacher_weights + self.optimizer

    @property
    def rollout(self) -> int:
        """While completions are sampled."""
        return self.at_rest + self.cache

    @property
    def update(self) -> int:
        """In the backward pass; without the activations where they are not known."""
        return self.at_rest + self.gradients + self.teacher_outputs + (self.activations or 0) + self.outputs


def estimate_memory(config: TrainConfig, student: CausalLM, teacher: CausalLM, prompt_length: int) -> MemoryEstimate:
    """The memory of a training with these models, loaded on the CPU, and prompts of up to ``prompt_length`` tokens."""
    value_head = []
    if config.has_value_head:
        value_head = list(ValueHead(student.config.get_text_config().hidden_size).parameters())
    ours, theirs = list(student.parameters()), list(teacher.parameters())
    trained = [p for p in ours if p.requires_grad] + value_head
    number = 2 if config.mixed_precision == "bf16" else FLOAT32  # bytes of a computed number
    rows, length = min(config.micro_batch_size, config.minibatch_size, config.batch_size), config.max_new_tokens
    if config.micro_batch_tokens:
        rows = min(rows, max(1, config.micro_batch_tokens // (prompt_length + length)))
    student_width, teacher_width = (_output_width(model, config.logits) for model in (student, teacher))
    cached = config.batch_size * length * teacher_width * number
    sampled = min(config.rollout_batch_size or config.batch_size, config.batch_size)
    return MemoryEstimate(
        parameters=_count(ours),
        trained_parameters=_count(trained),
        teacher_parameters=_count(theirs),
        weights=_bytes(ours + value_head),
        teacher_weights=_bytes(theirs),
        gradients=_bytes(trained),
        optimizer=2 * _bytes(trained),
        teacher_outputs=cached if cached <= config.teacher_cache_mb * 2**20 else 0,
        activations=activations(config, student, rows, prompt_length + length - 1),
        outputs=rows * length * (student_width + teacher_width) * number,
        cache=sampled * (prompt_length + length) * _cache_width(student) * number,
    )


def activations(config: TrainConfig, student: CausalLM, rows: int, length: int) -> int | None:
    """Bytes that the student keeps for the backward pass of ``rows`` sequences of ``length`` tokens.

    Its forward pass is run on shapes alone, without numbers or memory for them, and the tensors that it saves are added
    up; under gradient checkpointing, with the layer that is computed again. None for a model whose shapes depend on
    numbers.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.modeling_layers import GradientCheckpointingLayer

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    half = torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16")
    sizes: dict[Any, int] = {}
    alive = []  # or a later tensor could take the identity of one that is gone

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        sizes.setdefault(storage._cdata, storage.nbytes())
        return tensor

    def saved(recompute: bool) -> int:
        sizes.clear()
        for layer in layers:
            layer.gradient_checkpointing = recompute
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            cf.last_hidden_state(student, ids, position_ids=positions)
        return sum(size for storage, size in sizes.items() if storage not in weights)

    layers: list[Any] = [module for module in student.modules() if isinstance(module, GradientCheckpointingLayer)]
    try:
        with torch.enable_grad(), mode, half:
            own = [t.untyped_storage() for p in student.parameters() for t in (p, mode.from_tensor(p))]
            weights = {storage._cdata for storage in own}
            ids = torch.zeros(rows, length, dtype=torch.long)
            positions = torch.arange(length).expand(rows, length)
            everything = saved(recompute=False)
            if not config.gradient_checkpointing:
                return everything
            inputs = saved(recompute=True)
            return inputs + (everything - inputs) // len(layers)
    except RuntimeError:  # a shape that depends on a number: experts that choose their tokens, for one
        return None
    finally:
        for layer in layers:
            layer.gradient_checkpointing = config.gradient_checkpointing


def _count(parameters: Sequence[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Sequence[torch.Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _output_width(model: CausalLM, logits: str) -> int:
    """Numbers per token that the trainer has from a model: its logits, or the hidden state that they are made from."""
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    return vocabulary if logits == "full" else hidden


def _cache_width(model: CausalLM) -> int:
    """Keys and values per token, in all layers."""
    c = model.config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * heads * head_size

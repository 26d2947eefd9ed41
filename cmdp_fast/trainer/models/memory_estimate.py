"""The memory of a training: its tensors are counted, and those that a pass makes and drops, on shapes alone.

The figures are bytes on one process that holds all of both models, each kind of tensor by itself. Those that the
allocator and the kernels of matrix products add are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import cmdp_fast as cf
from cmdp_fast.ops.tile_size import tile_shape
from cmdp_fast.teachers.teacher import Teacher

from ..causal_lm import CausalLM
from ..settings.config import TrainConfig
from .live_bytes import on_shapes
from .offload import layers_of
from .optimizer_bytes import optimizer_bytes
from .value_head import ValueHead

FLOAT32, HALF = 4, 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, with every completion at its full length; and how many parameters they belong to."""

    device: str  # the kind that it is for
    parameters: int  # of the student
    trained_parameters: int  # of the student or its adapter, and of the value head
    teacher_parameters: int  # of its own: 0 if it is the student without its adapter
    weights: int  # of the student and the value head
    teacher_weights: int
    teacher_in_update: int  # of them, its head under --teacher-device offload
    gradients: int
    buckets: int  # in which DDP exchanges the gradients; 0 for a process alone
    optimizer: int | None  # its state; None: not known
    optimizer_in_rollout: int  # of it, nothing under --offload-optimizer
    step: int  # numbers that the optimizer makes for a step and drops
    copies: int | None  # the student's weights in bfloat16, which autocast makes and keeps; None: not known
    teacher_outputs: int  # kept from scoring to update, on the device
    activations: int | None  # kept by the layers for the backward pass of a micro-batch; None: not known
    outputs: int  # for a micro-batch: the teacher's hidden states, or logits of both models
    backward: int  # made and dropped in the backward pass: the gradient of the head with tiles of logits, or of a layer
    cache: int | None  # keys and values of the completions that are sampled at once, 0 with --rollout; None: not known
    sampling: int  # made and dropped while they are sampled, beside the cache

    @property
    def rollout(self) -> int:
        """While completions are sampled; without what is not known."""
        held = self.weights + self.teacher_weights + self.optimizer_in_rollout + self.buckets
        return held + (self.copies or 0) + (self.cache or 0) + self.sampling

    @property
    def update(self) -> int:
        """In the backward pass or the optimizer's step; without what is not known."""
        held = self.weights + self.teacher_in_update + (self.optimizer or 0) + self.buckets
        held += self.gradients + self.teacher_outputs
        passing = (self.copies or 0) + (self.activations or 0) + self.outputs + self.backward
        return held + max(passing, self.step)


def estimate_memory(
    config: TrainConfig,
    student: CausalLM,
    teacher: CausalLM | Teacher,
    prompt_length: int,
    *,
    processes: int = 1,
    device: torch.device | None = None,
) -> MemoryEstimate:
    """The memory of a training with these models and prompts of up to ``prompt_length`` tokens.

    The models are loaded on the CPU, or are shapes alone; of a teacher that is asked the head alone is here.
    ``processes``: with several, each holds all of both models (DDP). ``device`` is where the training is to be; None: a
    GPU under bfloat16, which is meant for them, or where there is one.
    """
    half = config.precision == "bf16"
    if device is None:
        device = torch.device("cuda" if half or torch.cuda.is_available() else "cpu")
    held: Any = _HeadsAlone(teacher) if isinstance(teacher, Teacher) else teacher
    value_head = []
    if config.has_value_head:
        value_head = list(ValueHead(student.config.get_text_config().hidden_size).parameters())
    ours, theirs = list(student.parameters()), list(held.parameters())
    trained = [p for p in ours if p.requires_grad] + value_head
    number = HALF if half else FLOAT32  # bytes of a computed number
    rows, length = min(config.micro_batch_size, config.minibatch_size, config.batch_size), config.max_new_tokens
    if config.micro_batch_tokens:
        rows = min(rows, max(1, config.micro_batch_tokens // (prompt_length + length)))
    accumulates = rows < min(config.minibatch_size, config.batch_size)
    widths = [_output_width(model, config.logits) for model in (student, held)]
    cached = config.batch_size * length * widths[1] * number
    sampled = min(config.rollout_batch_size or config.batch_size, config.batch_size)
    head = head_bytes(config, student, held, rows * length, device)
    update = update_bytes(config, student, rows, prompt_length + length - 1)
    sampling = sampling_bytes(config, student, sampled, prompt_length, length)
    gradients = _bytes(trained)
    state, step = optimizer_bytes(config, trained, at_once=device.type != "cpu")
    away = {id(tensor) for tensor in layers_of(held)} if config.teacher_device == "offload" else set[int]()
    room = config.teacher_cache_mb * 2**20
    return MemoryEstimate(
        device=device.type,
        parameters=_count(ours),
        trained_parameters=_count(trained),
        teacher_parameters=_count(theirs),
        weights=_bytes(ours + value_head),
        teacher_weights=_bytes(theirs),
        teacher_in_update=_bytes([p for p in theirs if id(p) not in away]),
        gradients=0 if processes > 1 and not accumulates else gradients,  # else they lie in the buckets
        buckets=gradients if processes > 1 else 0,
        optimizer=state,
        optimizer_in_rollout=0 if config.offload_optimizer else (state or 0),
        step=step,
        copies=update and update.copies + head.copy,
        teacher_outputs=0 if config.teacher_cache_cpu else min(cached, room),
        activations=update and update.kept,
        outputs=rows * length * (widths[1] + (widths[0] if config.logits == "full" else 0)) * number,
        backward=max(head.backward, update.backward - head.copy if update else 0),
        cache=0 if config.rollout else sampling and sampling.cache,
        sampling=0 if config.rollout or not sampling else sampling.passing,
    )


class _HeadsAlone(nn.Module):
    """What the trainer holds of a teacher that is asked, or of several; of one that answers with its most likely
    tokens, nothing that counts."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        linear = []
        for each in sorted(teacher.each(), key=lambda each: each.about.hidden_size):
            columns, head = each.about.vocab_size, each.head
            if head is None:
                linear.append(nn.Linear(0, columns, bias=False, device="meta"))
            else:
                bias, dtype = head.bias is not None, head.weight.dtype
                linear.append(nn.Linear(head.weight.shape[1], columns, bias, device="meta", dtype=dtype))
        self.heads = nn.ModuleList(linear)

    def get_output_embeddings(self) -> nn.Module:
        return self.heads[-1]  # of several, hidden states are as wide as the widest


class UpdateBytes(NamedTuple):
    """Of a micro-batch, the head's part left out."""

    copies: int  # the layers' weights in bfloat16, as far as the backward pass has them
    kept: int  # by the layers, for the backward pass
    backward: int  # beyond these two at the peak of both passes


def update_bytes(config: TrainConfig, student: CausalLM, rows: int, length: int) -> UpdateBytes | None:
    """What the student's two passes take for ``rows`` sequences of ``length`` tokens.

    They are run on shapes alone, without numbers or memory for them, gradient checkpointing as it is switched on. The
    gradients themselves are not counted. None for a model whose shapes depend on numbers.
    """
    model: Any = student
    try:
        with torch.enable_grad(), on_shapes(model) as live:
            ids = torch.zeros(rows, length, dtype=torch.long)
            positions = torch.arange(length).expand(rows, length)
            with live:
                with _autocast(config):
                    hidden = cf.last_hidden_state(model, ids, position_ids=positions)
                copies, kept = live.copies, live.now - live.copies
                if hidden.requires_grad:  # not where the head alone is trained
                    hidden.backward(torch.ones_like(hidden))
            return UpdateBytes(copies, kept, live.peak - copies - kept)
    except RuntimeError:  # a shape that depends on a number: experts that choose their tokens, for one
        return None


class HeadBytes(NamedTuple):
    """Of the student's head and the statistics, for a micro-batch."""

    copy: int  # its weight in bfloat16
    backward: int


def head_bytes(
    config: TrainConfig, student: CausalLM, teacher: CausalLM, tokens: int, device: torch.device
) -> HeadBytes:
    """What the statistics of ``tokens`` tokens take.

    The head's gradient comes in the dtype of the head's copy, with tiled logits beside tiles and pieces of the heads.
    These are gone when it becomes float32, to be added to the gradient that other micro-batches have left.
    """
    weight, frozen = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    half = config.precision == "bf16"
    converted = half and weight.dtype == torch.float32
    copy = HALF * weight.numel() if converted else 0
    cast = weight.nbytes if converted and weight.requires_grad else 0
    gradient = (copy or weight.nbytes) if weight.requires_grad else 0
    if config.logits == "full":
        return HeadBytes(copy, gradient + cast)
    columns, (width, teacher_width) = min(len(weight), len(frozen)), (weight.shape[1], frozen.shape[1])
    widened = half and device.type == "cpu"  # pieces of both heads, and the hidden states, become float32
    per_column = FLOAT32 * (width * (1 + widened) + teacher_width * widened) if half else 0
    height, breadth = tile_shape(tokens, columns, 2 * FLOAT32, device, per_column)
    logits = height * breadth * (2 * FLOAT32 + (HALF if half and not widened else 0))
    rows = tokens * (width + teacher_width) * ((HALF if half else FLOAT32) + FLOAT32 * widened)  # those that count
    summed = tokens * width * 2 * FLOAT32  # the hidden states' gradient: its sum, and where it came from
    return HeadBytes(copy, gradient + max(cast, logits + breadth * per_column + rows + summed))


class SamplingBytes(NamedTuple):
    """Of completions that are sampled at once."""

    cache: int
    passing: int  # beside a full cache, at the peak of the pass over the prompts and of that over the last token


def sampling_bytes(
    config: TrainConfig, student: CausalLM, rows: int, prompt_length: int, length: int
) -> SamplingBytes | None:
    """What sampling takes, run on shapes alone: keys and values as the model keeps them, in the dtypes that they have.

    Under autocast rotary positions make float32 of keys, and transformers' cache has the values in the dtype of the
    keys. None for a model that has no such cache or whose shapes depend on numbers.
    """
    model: Any = student
    try:
        with torch.no_grad(), on_shapes(model) as live, _autocast(config), live:
            filled = _fill(model, rows, prompt_length)
            first = live.peak - live.most_copies
            del filled
            cache = _fill(model, rows, prompt_length + length - 2)  # all but the last token, which is not read
            live.peak = live.now
            model(input_ids=torch.zeros(rows, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
            full, last = _cache_bytes(cache), live.peak - live.copies
    except (RuntimeError, AttributeError, TypeError):
        return None
    # A token's logits in float32, their softmax, and the numbers that a sampler draws from
    logits = 3 * rows * len(student.get_output_embeddings().weight) * FLOAT32
    return SamplingBytes(full, max(first, last) - full + logits)


def _fill(model: Any, rows: int, length: int) -> Any:
    """The cache of some sequences."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _cache_bytes(cache: Any) -> int:
    """Keys and values, whatever else a layer of a hybrid model may hold."""
    layers = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))


def _autocast(config: TrainConfig) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")


def _count(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Sequence[Tensor]) -> int:
    return sum(p.nbytes for p in parameters)


def _output_width(model: CausalLM, logits: str) -> int:
    """Numbers per token that the trainer has from a model: its logits, or the hidden state that they are made from."""
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    return vocabulary if logits == "full" else hidden

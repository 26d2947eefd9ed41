"""`cmdp-fast train --dry-run`: everything that can fail before the first step, and the memory of the training."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from cmdp_fast.masking import told
from cmdp_fast.scoring import make_scoring
from cmdp_fast.terminal import drawn

from .engines import check_engines
from .first_tokens import check_first_tokens
from .material import load
from .models.memory_estimate import MemoryEstimate, estimate_memory
from .models.offload import check_offload
from .models.quantization import check_quantization
from .optimization import check_optimizer
from .padding import check_reading
from .records.metrics_log import check_trackers
from .records.origin import check_origin
from .records.report import Report
from .records.run_folder import check_run_folder
from .rollout import make_sampling
from .settings.config import TrainConfig
from .settings.unread import warnings_of
from .stored import check_stored, stored_by

NOT_CHECKED = (
    "--random-weights: not checked is that the models' files hold all weights, as safetensors and in the shapes of "
    "their configurations; --dry-run alone checks it"
)


def dry_run(config: TrainConfig) -> MemoryEstimate:
    """Loads and checks models and data, prints the settings and an estimate of the memory, and returns the latter.

    Nothing is sampled or trained and no run folder is made; the models that the package makes for itself are made.
    Raises InputError in the cases in which `train` does.
    """
    report = Report()
    check_trackers(config)
    check_optimizer(config)
    check_offload(config)
    check_quantization(config)
    check_run_folder(config)
    check_engines(config)
    material = load(config, report)
    if config.resume:
        check_origin(config, material.origin, report.say)
    assert material.teacher is not None  # a valid configuration names one
    models = (material.student, material.teacher)
    sampling = make_sampling(config, *models, material.tokenizer)
    loaded = {"student": material.student, "teacher": material.loaded_teacher}
    roles = {role: model for role, model in loaded.items() if model is not None}
    half = config.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=half):  # as in the training
        sampled = {"": {*roles}, "vllm": set()}.get(config.rollout, {"teacher"})
        check_first_tokens(config, roles, sampling, sampled)
        free = config.padding_free
        scoring = make_scoring(config.logits, models, sampling.vocab_size, config.temperature, padding_free=free)
        check_reading(roles, scoring.outputs, sampling, padding_free=free, half=half)
    if (stored := stored_by(material.teacher)) is not None:
        check_stored(stored, material.prompts, config, sampling)
    longest = max(len(ids) for ids in material.prompts)
    memory = estimate_memory(config, *models, longest, processes=_replicas())
    report.result(settings_text(config))
    for warning in warnings_of(config):
        report.result(told(f"warning: {warning}"))
    report.result(
        f"{len(material.problems)} problems to train on, {len(material.held_out)} to evaluate on, "
        f"prompts of up to {longest} tokens"
    )
    report.result(memory_text(config, memory))
    if config.random_weights:
        report.result(NOT_CHECKED)
    report.check("settings and memory are not shown, and all else is in order")
    return memory


def _replicas() -> int:
    """The processes that hold all of the models each, as accelerate's launcher or torchrun has set them up."""
    return 1 if os.environ.get("ACCELERATE_USE_FSDP") == "true" else int(os.environ.get("WORLD_SIZE", "1"))


def settings_text(config: TrainConfig) -> str:
    """The settings as TOML, a line each."""
    return "\n".join(f"{name} = {_toml(value)}" for name, value in asdict(config).items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


class MemoryRow(NamedTuple):
    """A kind of tensor, or what is held in a part of a step."""

    name: str
    size: int | None  # bytes; None: not known
    about: str


def memory_rows(config: TrainConfig, memory: MemoryEstimate) -> list[MemoryRow]:
    """The table of `memory_text`; the last two are what is held in rollout and update."""
    m = memory
    shared = not m.teacher_parameters
    kept = f"of {config.batch_size} completions, no more than --teacher-cache-mb"
    layers = "of a micro-batch" + (", inputs of the layers" if config.gradient_checkpointing else "")
    outputs = "the teacher's" if config.logits == "tiled" else "both models'"
    unknown = "not known for this model"
    rows = [
        MemoryRow("student", m.weights, f"{m.parameters:,} parameters"),
        MemoryRow("gradients", m.gradients, f"{m.trained_parameters:,} parameters trained"),
        MemoryRow("DDP's buckets", m.buckets, "gradients as they are exchanged") if m.buckets else None,
        MemoryRow("optimizer", m.optimizer, config.optim),
        MemoryRow(
            "teacher", m.teacher_weights, "the student's weights" if shared else f"{m.teacher_parameters:,} parameters"
        ),
        MemoryRow("teacher's outputs", m.teacher_outputs, kept),
        MemoryRow("weights in bfloat16", m.copies, "of the student, made by autocast") if m.copies != 0 else None,
        MemoryRow("outputs", m.outputs, f"{outputs}, of a micro-batch"),
        MemoryRow("activations", m.activations, layers if m.activations is not None else unknown),
        MemoryRow("backward", m.backward, "the head's gradient and tiles, or a layer's"),
        MemoryRow("optimizer's step", m.step, "instead of the four before") if m.step else None,
        *(_sampling_rows(m, unknown) if not config.rollout else [MemoryRow("sampling", None, "what --rollout takes")]),
        MemoryRow("rollout", m.rollout, "estimate, all that is held then"),
        MemoryRow("update", m.update, "estimate, all that is held then"),
    ]
    return [row for row in rows if row is not None]


def _sampling_rows(memory: MemoryEstimate, unknown: str) -> list[MemoryRow]:
    about = "of the completions sampled at once" if memory.cache is not None else unknown
    return [MemoryRow("keys and values", memory.cache, about), MemoryRow("sampling", memory.sampling, "beside them")]


def memory_text(config: TrainConfig, memory: MemoryEstimate) -> str:
    """A line per kind of tensor."""
    from rich.table import Table

    rows = memory_rows(config, memory)
    place = "on the CPU" if memory.device == "cpu" else "on a GPU"
    table = Table(title=f"memory of a process {place}, completions at full length")
    table.add_column("what", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("of what")
    for row in rows:
        size = "?" if row.size is None else readable(row.size)
        table.add_row(row.name, size, row.about, end_section=row is rows[-3])
    return drawn(table)


def readable(size: int) -> str:
    """Bytes in the largest binary unit of which there is at least one."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size} B"

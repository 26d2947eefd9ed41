"""`cmdp-fast train --dry-run`: everything that can fail before the first step, and the memory of the training."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from cmdp_fast.errors import InputError
from cmdp_fast.imports import import_function
from cmdp_fast.scoring import make_scoring

from .material import load
from .models.memory_estimate import MemoryEstimate, estimate_memory
from .padding import misled_by_padding
from .records.metrics_log import check_trackers
from .records.report import Report
from .records.run_folder import check_run_folder
from .rollout import make_sampling
from .settings.config import TrainConfig


def dry_run(config: TrainConfig) -> MemoryEstimate:
    """Loads and checks models and data, prints the settings and an estimate of the memory, and returns the latter.

    Nothing is sampled or trained and no run folder is made; the models that the package makes for itself are made.
    Raises InputError in the cases in which `train` does.
    """
    report = Report()
    check_trackers(config)
    check_run_folder(config)
    material = load(config, report)
    assert material.teacher is not None  # a valid configuration names one
    models = (material.student, material.teacher)
    sampling = make_sampling(config, *models, material.tokenizer)
    roles = dict(zip(("student", "teacher"), models, strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):  # as in the training
        scoring = make_scoring(config.logits, models, sampling.vocab_size, config.temperature)
        misled = misled_by_padding(roles, scoring.outputs, sampling.vocab_size, sampling.pad)
    if misled:
        raise InputError(misled)
    if config.rollout:
        import_function("--rollout", config.rollout)
    longest = max(len(ids) for ids in material.prompts)
    memory = estimate_memory(config, *models, longest)
    print(settings_text(config))
    print(
        f"{len(material.problems)} problems to train on, {len(material.held_out)} to evaluate on, "
        f"prompts of up to {longest} tokens"
    )
    print_memory(config, memory)
    return memory


def settings_text(config: TrainConfig) -> str:
    """The settings as TOML, a line each."""
    return "\n".join(f"{name} = {_toml(value)}" for name, value in asdict(config).items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def print_memory(config: TrainConfig, memory: MemoryEstimate) -> None:
    """A line per kind of tensor."""
    from rich.console import Console
    from rich.table import Table

    m = memory
    shared = not m.teacher_parameters
    kept = f"{config.batch_size} completions" if m.teacher_outputs else "computed again, see --teacher-cache-mb"
    layers = "estimate" + (", inputs of the layers and one layer" if config.gradient_checkpointing else "")
    rows = [
        ("student", m.weights, f"{m.parameters:,} parameters"),
        ("gradients", m.gradients, f"{m.trained_parameters:,} parameters trained"),
        ("optimizer", m.optimizer, "AdamW, two numbers for each of them"),
        ("teacher", m.teacher_weights, "the student's weights" if shared else f"{m.teacher_parameters:,} parameters"),
        ("teacher's outputs", m.teacher_outputs, kept),
        ("outputs", m.outputs, "of both models for a micro-batch"),
        ("activations", m.activations, layers if m.activations is not None else "not known for this model"),
        ("keys and values", m.cache, "estimate, of the completions sampled at once"),
        ("rollout", m.rollout, "estimate, all that is held then"),
        ("update", m.update, "estimate, all that is held then"),
    ]
    table = Table(title="memory of a process, completions at full length")
    table.add_column("what", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("of what")
    for index, (name, size, about) in enumerate(rows):
        table.add_row(name, "?" if size is None else readable(size), about, end_section=index == len(rows) - 3)
    Console().print(table)


def readable(size: int) -> str:
    """Bytes in the largest binary unit of which there is at least one."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size} B"

"""TRL's trainers and ours on random models small enough for a step to take milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tiny_pair import PROBLEMS
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from cmdp_fast.integrations.trl import (
    CMDPDistillationConfig,
    CMDPDistillationTrainer,
    CMDPGRPOConfig,
    CMDPGRPOTrainer,
)

COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_completion_length": 6,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
}


def digits(completions: list[Any], **_: Any) -> list[float]:
    """A reward that a random model varies in: the share of a completion that is digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def prompts() -> Dataset:
    return Dataset.from_list(PROBLEMS)


def student(folder: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def grpo(pair: dict[str, str], output: Any, *, plain: bool = False, trainer: dict[str, Any] | None = None, **changes):
    """A trainer of the tiny student: ours, or (`plain`) TRL's with the settings that TRL has."""
    settings = {**COMMON, "num_generations": 4, **changes}
    arguments = {
        "reward_funcs": digits,
        "train_dataset": prompts(),
        "processing_class": AutoTokenizer.from_pretrained(pair["student"], padding_side="left"),
        **(trainer or {}),
    }
    if plain:
        return GRPOTrainer(student(pair["student"]), args=GRPOConfig(str(output), **settings), **arguments)
    settings = {"budget": 2.0, **settings}
    arguments.setdefault("teacher_model", student(pair["teacher"]))
    return CMDPGRPOTrainer(student(pair["student"]), args=CMDPGRPOConfig(str(output), **settings), **arguments)


def distillation(
    pair: dict[str, str], output: Any, *, plain: bool = False, trainer: dict[str, Any] | None = None, **changes
):
    settings = {**COMMON, **changes}
    arguments = {
        "train_dataset": prompts(),
        "processing_class": AutoTokenizer.from_pretrained(pair["student"], padding_side="left"),
        "teacher_model": student(pair["teacher"]),
        **(trainer or {}),
    }
    kind, config = (
        (DistillationTrainer, DistillationConfig) if plain else (CMDPDistillationTrainer, CMDPDistillationConfig)
    )
    return kind(student(pair["student"]), args=config(str(output), **settings), **arguments)


def logged(trainer: Any, name: str) -> list[float]:
    """A metric by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trained(make: Any, *arguments: Any, **changes: Any) -> Any:
    """A trainer that has been made and trained. Both draw from the global random numbers: not one among two others."""
    trainer = make(*arguments, **changes)
    trainer.train()
    return trainer

"""The optimizer of a run and the course of its learning rate, made from the settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from .settings.config import TrainConfig

ParameterGroups = Iterable[dict[str, Any]]


def make_optimizer(config: TrainConfig, groups: ParameterGroups) -> torch.optim.Optimizer:
    """The optimizer of some groups of parameters, each of which has its own learning rate, ``lr``."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=config.weight_decay)


def make_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The course of the learning rates: one step of it for each step of the run."""
    from transformers import get_scheduler

    return get_scheduler(config.lr_schedule, optimizer, config.lr_warmup_steps, config.steps)

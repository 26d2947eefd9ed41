"""The optimizer of a run and the course of its learning rate, made from the settings."""

from __future__ import annotations

import warnings
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
    """The course of the learning rates: one step of it for each step of the run.

    With W steps of warm-up, step s, counted from 0, has (s + 1) / (W + 1) of the peak while s < W. From step W on,
    which has the peak, it is transformers' course. Theirs begins at 0, with which a rollout would be for nothing: so
    here it is laid out over one step more, and that step is behind it. No step has the rate 0, the last one neither.
    """
    from transformers import get_scheduler

    name, warmup = config.lr_schedule, config.lr_warmup_steps
    if not warmup:
        return get_scheduler(name, optimizer, 0, config.steps)
    with_warmup = "constant_with_warmup" if name == "constant" else name  # whose "constant" has none
    scheduler = get_scheduler(with_warmup, optimizer, warmup + 1, config.steps + 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # before the optimizer's
        scheduler.step()
    return scheduler

"""The optimizer of a run and the course of its learning rate, made from the settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from cmdp_fast.errors import InputError, first_line
from cmdp_fast.nearest import did_you_mean

from .settings.config import TrainConfig

BETAS = (0.9, 0.95)
_UNUSABLE = {  # parts of transformers' names
    "galore": "wants a list of modules",
    "apollo": "wants a list of modules",
    "lomo": "takes its step inside the backward pass",
    "schedule_free": "wants to be told of every evaluation",
    "xla": "needs a TPU",
    "npu": "needs an NPU",
}
ParameterGroups = Iterable[dict[str, Any]]


def make_optimizer(config: TrainConfig, groups: ParameterGroups) -> torch.optim.Optimizer:
    """The optimizer of some groups of parameters, each of which has its own learning rate, ``lr``."""
    kind, options = _optimizer_class(config)
    return kind([{**group, "weight_decay": config.weight_decay} for group in groups], **options)


def check_optimizer(config: TrainConfig) -> None:
    """Raises InputError for a name that is not in transformers' list, that the trainer cannot use, or whose package is
    missing."""
    _optimizer_class(config)


def _optimizer_class(config: TrainConfig) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """The class that `--optim` names and its options, as transformers' Trainer finds them."""
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    name = config.optim
    if name not in (known := [each.value for each in OptimizerNames]):
        raise InputError(
            f"--optim {name}: not in transformers' list, which is {', '.join(known)}{did_you_mean(name, known)}"
        )
    for part, reason in _UNUSABLE.items():
        if part in name:
            raise InputError(f"--optim {name} cannot be used here: it {reason}")
    # The arguments that it reads; a TrainingArguments would begin a set-up of several processes anew.
    asked: Any = SimpleNamespace(
        optim=OptimizerNames(name),
        optim_args=None,
        learning_rate=config.learning_rate,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=1e-8,
        weight_decay=config.weight_decay,
    )
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(asked)
    except (ImportError, ValueError) as error:
        raise InputError(f"--optim {name}: {first_line(error)}") from error
    return kind, options


def moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a parameter's state, without counters."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim()}


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

"""Settings that were asked for and that change nothing a run learns, spends or evaluates: each with what reads it.

Recipes and methods go over one another, so a configuration may hold any number of them. Only what the command line
itself has changed is refused: whoever writes `--gae-lambda 0.95` expects it to do something.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from cmdp_fast.constraint import KINDS
from cmdp_fast.errors import InputError
from cmdp_fast.reference import KindName

from ..methods import METHODS, MethodEntry
from .asked import is_served
from .config import TrainConfig
from .constraint import warning_of_scale


class Reader(NamedTuple):
    """Settings, whether they change anything in a run with a configuration, and in which one they do."""

    settings: tuple[str, ...]
    reads: Callable[[TrainConfig], object]
    which: str


def _algorithms(kept: Callable[[MethodEntry], object]) -> str:
    return f"--algorithm {' or '.join(name for name, entry in METHODS.items() if kept(entry))}"


def _compares(entry: MethodEntry) -> bool:
    return entry.compares


def _clips(entry: MethodEntry) -> bool:
    return entry.compares or entry.groups


def _of_kinds(settings: tuple[str, ...], kept: Callable[[KindName], object]) -> Reader:
    """Settings of some kinds of modified reward, which are for the methods that compare completions."""
    kinds = " or ".join(kind for kind in KINDS if kept(kind))
    which = _algorithms(lambda entry: entry.compares and (not entry.penalises or kept("lagrangian")))
    return Reader(settings, lambda c: c.entry.compares and kept(c.kind), f"{which} with --kind {kinds}")


_OF_A_SAMPLER = f"--rollout with {_algorithms(lambda entry: entry.on_policy)} (at --teacher-mix 0)"
PATTERNS = {"exact_answer", "brevity", "math_verify", "reasoning_gym"}
JUDGES = {"math_verify", "reasoning_gym"}

READERS = (
    Reader(("baseline", "kind", "gamma"), lambda c: _compares(c.entry), _algorithms(_compares)),
    Reader(
        ("gae_lambda", "value_learning_rate"),
        lambda c: c.has_value_head,
        f"{_algorithms(_compares)} with --baseline gae",
    ),
    Reader(("clip_low", "clip_high"), lambda c: _clips(c.entry), _algorithms(_clips)),
    Reader(("sampler_correction",), lambda c: c.has_sampler, _OF_A_SAMPLER),
    Reader(
        ("sampler_clip",),
        lambda c: c.has_sampler and c.correction,
        f"{_OF_A_SAMPLER}, unless --sampler-correction is off",
    ),
    Reader(("teacher_mix",), lambda c: c.entry.mixes, _algorithms(lambda entry: entry.mixes)),
    Reader(
        ("jsd_beta",),
        lambda c: c.entry.diverges or c.cost == "jsd",
        f"--cost jsd and {_algorithms(lambda entry: entry.diverges)}",
    ),
    _of_kinds(("penalty",), lambda kind: KINDS[kind].penalised),
    _of_kinds(("discrepancy_weight",), lambda kind: KINDS[kind].direct == "discrepancy"),
    _of_kinds(("budget_price",), lambda kind: KINDS[kind].coefficient == "price"),
    _of_kinds(("coefficient",), lambda kind: KINDS[kind].needs_price),
    Reader(("reward_unit",), lambda c: c.entry.compares, _algorithms(lambda entry: entry.compares)),
    Reader(("kl_loss_correction",), lambda c: c.entry.penalises, _algorithms(lambda entry: entry.penalises)),
    _of_kinds(("pid_gains",), lambda kind: kind == "pid"),
    Reader(("budget_start",), lambda c: c.budget_steps, "--budget-steps"),
    Reader(("teacher_timeout",), lambda c: is_served(c.teacher), "a --teacher on a server"),
    Reader(("lora_alpha", "lora_target"), lambda c: c.lora_rank, "--lora-rank"),
    Reader(("task_args", "task_size"), lambda c: c.task, "--task"),
    Reader(("dataset_split",), lambda c: c.dataset, "--dataset"),
    Reader(
        ("eval_split", "prompt_column", "answer_column", "reference_pattern", "max_rows"),
        lambda c: c.dataset or c.eval_dataset,
        "--dataset",
    ),
    Reader(
        ("dataset_config",), lambda c: c.dataset and not Path(c.dataset).is_file(), "a --dataset with configurations"
    ),
    Reader(
        ("answer_pattern",),
        lambda c: PATTERNS & {*c.rewards},
        "the --rewards exact_answer, brevity, math_verify and reasoning_gym",
    ),
    Reader(
        ("reward_timeout",),
        lambda c: any(":" in name for name in (*c.rewards, c.step_verifier)),
        "a function of your own in --rewards or --step-verifier",
    ),
    Reader(("judge_timeout",), lambda c: JUDGES & {*c.rewards}, "the --rewards math_verify and reasoning_gym"),
    Reader(
        (
            "rollout_url",
            "rollout_teacher_url",
            "rollout_transfer",
            "rollout_timeout",
            "rollout_tolerance",
            "rollout_folder",
        ),
        lambda c: c.rollout == "vllm",
        "--rollout vllm",
    ),
    Reader(
        ("rollout_ahead",),
        lambda c: c.rollout == "vllm" and (c.entry.on_policy or c.rollout_teacher_url or not c.rollout_url),
        "--rollout vllm where it samples what is learned from",
    ),
    Reader(
        ("rollout_python", "rollout_args", "rollout_devices"),
        lambda c: c.rollout == "vllm" and not c.rollout_url,
        "--rollout vllm without --rollout-url",
    ),
    Reader(("unisolated_judges",), lambda c: "reasoning_gym" in c.rewards, "the --rewards reasoning_gym"),
)


def changed(config: TrainConfig, base: TrainConfig) -> list[str]:
    """The names of the settings in which two configurations differ."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    return [name for name in names if getattr(config, name) != getattr(base, name)]


def check_read(config: TrainConfig, asked: Iterable[str]) -> None:
    """Raises InputError if one of the settings that were ``asked`` for would change nothing that a training learns.

    A few of them still change a figure that is logged, such as `cmdp/modified_reward` of a method without a reward.
    """
    for name in asked:
        for reader in READERS:
            value = getattr(config, name)
            if name in reader.settings and not reader.reads(config) and value != getattr(_DEFAULTS, name):
                option = name.replace("_", "-")
                raise InputError(f"--{option} {_shown(value)} would have no effect: it is for {reader.which}")


_DEFAULTS = TrainConfig()
LEAST_OF_ADAPTERS = 1e-5  # of a learning rate, an order below those that adapters are trained with


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def warnings_of(config: TrainConfig) -> list[str]:
    """What a training has to say of its settings before it begins."""
    warnings = (
        *(warning_of_scale(config), warning_of_reward(config), warning_of_warmup(config)),
        *(warning_of_sampler(config), warning_of_adapter(config)),
    )
    return [warning for warning in warnings if warning]


def warning_of_reward(config: TrainConfig) -> str:
    """The warning of a method that learns from no reward, with settings of the reward: they change what is logged of
    it alone. Empty if there are none."""
    names = [name for name in ("reward_weights", "missing_eos_penalty") if getattr(config, name)]
    if config.entry.compares or not names:
        return ""
    options = " and ".join(f"--{name.replace('_', '-')}" for name in names)
    return f"--algorithm {config.algorithm} learns from no reward: {options} change the logged reward alone"


def warning_of_sampler(config: TrainConfig) -> str:
    """The warning of a sampler whose difference from the student is left as it is, or is no small one by the settings.
    Empty if there is none."""
    if not config.has_sampler:
        return ""
    if config.sampler_correction == "off":
        return (
            "--sampler-correction off: what --rollout draws is taken for the student's, whatever its log-probabilities"
        )
    if config.sampler_correction == "sequence" and (config.top_k or config.top_p < 1.0):
        return (
            "--sampler-correction sequence with --top-k or --top-p: a completion's weight is the product of the "
            "probabilities that they keep at its tokens, so a long one has next to none; token has no such product"
        )
    return ""


def warning_of_adapter(config: TrainConfig) -> str:
    """The warning of an adapter with a learning rate for whole models: it begins as nothing, and hardly becomes more.
    Empty if there is none."""
    if not config.lora_rank or config.learning_rate >= LEAST_OF_ADAPTERS:
        return ""
    return (
        f"--learning-rate {config.learning_rate:g} with --lora-rank: an adapter hardly moves with less than "
        f"{LEAST_OF_ADAPTERS:g}; usual are 1e-4 to 1e-3"
    )


def warning_of_warmup(config: TrainConfig) -> str:
    """The warning of a warm-up that the run does not live to the end of. Empty if it does."""
    if config.lr_warmup_steps < config.steps:
        return ""
    return (
        f"--lr-warmup-steps {config.lr_warmup_steps} with --steps {config.steps}: no step has the whole learning rate, "
        f"the last one {config.steps}/{config.lr_warmup_steps + 1} of it"
    )

"""What a run is made of: one typed field a choice, filled from a TOML recipe and then from the command line.

Precedence, lowest first: the defaults below, the recipe, the command line. `validate` looks at every number
and name before a model is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ..reference import DIFFERENTIABLE_COSTS
from .errors import InputError, first_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"

Json = Annotated[dict[str, Any], tyro.conf.arg(constructor=json.loads, metavar="JSON")]


_POSITIVE = (
    *("budget", "temperature", "steps", "prompts_per_step", "max_completion_length", "epochs", "minibatch_size"),
    *("micro_batch_size", "learning_rate", "max_grad_norm", "clip_low", "clip_high", "task_size"),
    *("eval_prompts", "eval_generations"),
)
_NOT_NEGATIVE = (
    *("penalty", "discrepancy_weight", "coefficient", "weight_decay", "lr_warmup_steps", "teacher_cache_mb"),
    *("eval_every", "save_every"),
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `cmdp-fast train`."""

    # ---------------------------------------------------------------------------------------------- the run
    recipe: str = "quickstart"
    """Where the defaults of this run come from: a recipe of the package by name, or a path to a TOML file."""
    name: str = ""
    """Folder of the run inside `output_dir`, which must not exist yet. Empty: the recipe's name, numbered if taken."""
    output_dir: str = "runs"
    """Folder that holds the runs."""
    seed: int = 0
    """Seed of the prompts' order and of the sampling."""

    # ---------------------------------------------------------------------------------------------- the models
    student: str = ""
    """Hub id or folder of the causal language model to train, or `builtin:arithmetic-student`."""
    teacher: str = ""
    """Hub id or folder of the causal language model to stay close to, or `builtin:arithmetic-teacher`."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: the student runs under autocast and the teacher's weights are held in bfloat16 (for GPUs)."""

    # ---------------------------------------------------------------------------------------------- the task
    task: str = ""
    """Name of a reasoning-gym task, which makes its own problems. Either this or `dataset`."""
    task_args: Json = field(default_factory=dict)
    """Arguments of the reasoning-gym task, on the command line as JSON."""
    task_size: int = 4000
    """How many problems reasoning-gym is asked for; repeated ones are dropped."""
    dataset: str = ""
    """Hub id, or a JSON, JSONL, CSV or Parquet file, or a folder: a dataset with a prompt and an answer column."""
    dataset_config: str = ""
    """Configuration of a hub dataset that has several (`main` of `openai/gsm8k`)."""
    dataset_split: str = "train"
    """Split to train on."""
    eval_split: str = ""
    """Split to evaluate on. Empty: a part of the training split is held out, see `holdout_fraction`."""
    prompt_column: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages to which the chat template is applied."""
    answer_column: str = "answer"
    """Column with the reference answer, which the built-in rewards compare with."""
    prompt_template: str = ""
    """A format string over the columns that makes the prompt, such as `{prompt} Think step by step.`"""
    holdout_fraction: float = 0.2
    """Share of the problems that are never trained on; which ones depends on a hash of the prompt alone."""

    # ---------------------------------------------------------------------------------------------- the reward
    rewards: tuple[str, ...] = ("exact_answer",)
    """`exact_answer`, `math_verify`, `reasoning_gym` (the task's own judge), or your function as `module:function` or
    `path/file.py:function`. Several are added up."""
    answer_pattern: str = ""
    """Regular expression whose first group is the final answer; the last match in the completion counts. Empty: the
    whole completion is the answer."""
    correct_at: float = 1.0
    """A completion counts as right in `accuracy` when its reward is at least this."""

    # ---------------------------------------------------------------------------------------------- the budget
    budget: float = 2.0
    """What a completion may spend: nats of cumulative cost (nats a token for `worst_case`)."""
    cost: Literal["reverse_kl", "forward_kl", "k1", "k3", "nll"] = "reverse_kl"
    """Cost of a token. The first two are exact divergences and have a direct gradient."""
    kind: Literal["cmdp", "hinge", "saute", "lagrangian", "pid", "barrier", "worst_case"] = "cmdp"
    """Which modified reward: how being over the budget is paid for."""
    penalty: float = 1.0
    """Paid for crossing the budget (cmdp: once; saute, worst_case: at each token from there on)."""
    discrepancy_weight: float = 1.0
    """Weight of the excess cost (cmdp, hinge)."""
    coefficient: float = 0.0
    """The multiplier of lagrangian, the first one of pid, or the weight of the barrier."""
    pid_gains: tuple[float, float, float] = (0.1, 0.01, 0.01)
    """Proportional, integral and derivative gain of the pid controller."""

    # ---------------------------------------------------------------------------------------------- a step
    steps: int = 200
    """How many times to roll out and update."""
    prompts_per_step: int = 16
    """Prompts rolled out a step."""
    num_generations: int = 8
    """Completions a prompt: the group whose members are compared with one another."""
    max_completion_length: int = 256
    """Longest completion in tokens; the end-of-sequence token counts."""
    temperature: float = 1.0
    """Temperature of the policy that is sampled, trained, measured and evaluated."""
    baseline: Literal["rloo", "grpo", "position_rloo"] = "rloo"
    """What an action is compared with: the mean return of the group's other completions (`rloo`; `position_rloo`
    compares the returns-to-go at each position), or of the whole group and in units of its deviation (`grpo`)."""
    gamma: float = 1.0
    """Discount of the modified reward."""
    epochs: int = 2
    """PPO passes over the completions of a step."""
    minibatch_size: int = 32
    """Completions an optimizer step."""
    micro_batch_size: int = 32
    """Completions that go through a model at once; gradients of a minibatch are accumulated over them."""
    teacher_cache_mb: int = 512
    """The teacher's hidden states (or logits) are kept from scoring to update if they fit in this, otherwise computed
    again."""
    logits: Literal["tiled", "full"] = "tiled"
    """tiled: scoring and update go from hidden states to statistics a tile of the vocabulary at a time, and hold no
    logits; full: both models' logits are made in full, for a model whose head is not a plain linear layer."""
    clip_low: float = 0.2
    """PPO's clip below 1."""
    clip_high: float = 0.2
    """PPO's clip above 1."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after `lr_warmup_steps`; linear and cosine end at 0."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""

    # ---------------------------------------------------------------------------------------------- evaluation
    eval_prompts: int = 256
    """Held-out problems an evaluation; all of them if there are fewer."""
    eval_generations: int = 1
    """Completions a held-out problem, sampled as in training."""
    eval_every: int = 0
    """Evaluate each so many steps for the curves. 0: only before and after."""
    save_every: int = 0
    """Save the student each so many steps. 0: only at the end, or when interrupted."""

    def validate(self) -> None:
        """Raises InputError on the first value that cannot work; no model or dataset is touched."""
        for name in ("student", "teacher"):
            _check(getattr(self, name), f"--{name} is missing: give a hub id, a folder or a builtin:… model")
        _check(bool(self.task) != bool(self.dataset), "give exactly one of --task and --dataset")
        for name in _POSITIVE:
            value = getattr(self, name)
            _check(value > 0 and math.isfinite(value), f"--{_flag(name)} must be a positive number, not {value}")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            _check(value >= 0 and math.isfinite(value), f"--{_flag(name)} must not be negative, it is {value}")
        _check(0 < self.gamma <= 1, f"--gamma must be in (0, 1], not {self.gamma}")
        _check(
            0 < self.holdout_fraction < 1, f"--holdout-fraction must be between 0 and 1, not {self.holdout_fraction}"
        )
        _check(
            self.num_generations >= 2, f"--num-generations must be at least 2 to compare, not {self.num_generations}"
        )
        _check(len(self.rewards) > 0, "--rewards names no reward function")
        _check(len(self.pid_gains) == 3, f"--pid-gains must be three numbers, not {self.pid_gains}")
        _check_choices(self)
        if self.kind == "worst_case":
            _check(
                self.cost == "nll",
                f"--kind worst_case bounds the teacher's log-likelihood: --cost nll, not {self.cost}",
            )
        if self.kind == "lagrangian":
            _check(self.coefficient > 0, "--kind lagrangian needs its multiplier: --coefficient")
        if self.kind == "barrier":
            _check(self.coefficient > 0, "--kind barrier needs its weight: --coefficient")
        _check(
            "/" not in self.name and self.name not in (".", ".."), f"--name is the name of a folder, not {self.name!r}"
        )

    @property
    def run_name(self) -> str:
        """The name given, or that of the recipe."""
        return self.name or Path(self.recipe).stem

    @property
    def action_dependent(self) -> bool:
        """Whether the cost of a token depends on the token sampled, so that there is no direct gradient."""
        return self.cost not in DIFFERENTIABLE_COSTS

    @property
    def reduction(self) -> str:
        """How costs add up: their prefix mean for `worst_case`, otherwise their sum."""
        return "mean" if self.kind == "worst_case" else "sum"

    @property
    def account(self) -> str:
        """What the budget bounds, in words."""
        return f"mean {self.cost} a token (nats)" if self.reduction == "mean" else f"cumulative {self.cost} (nats)"

    @property
    def batch_size(self) -> int:
        """Completions a step."""
        return self.prompts_per_step * self.num_generations


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _check(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_choices(config: TrainConfig) -> None:
    for name, kind in get_type_hints(TrainConfig).items():
        choices, value = get_args(kind), getattr(config, name)
        if get_origin(kind) is Literal:
            _check(value in choices, f"--{_flag(name)} must be one of {', '.join(choices)}, not {value}")


def read_recipe(name: str) -> TrainConfig:
    """The configuration in a recipe of the package (by name) or in a TOML file (by path)."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise InputError(f"--recipe {name}: neither a TOML file nor one of the package's recipes ({known})")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--recipe {name}: not valid TOML: {first_line(error)}") from error
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"--recipe {name}: there is no setting named {key!r}")
        default = TrainConfig.__dataclass_fields__[key].default
        if isinstance(default, tuple):
            values[key] = value = tuple(value) if isinstance(value, list) else value
        elif isinstance(default, float) and type(value) is int:
            values[key] = value = float(value)
        expected = dict if default is dataclasses.MISSING else type(default)
        if type(value) is not expected:
            raise InputError(f"--recipe {name}: {key} must be {expected.__name__}, not {value!r}")
    config = TrainConfig(**{**values, "recipe": name})
    _check_choices(config)
    return config


def parse(args: Sequence[str], prog: str = "cmdp-fast train") -> TrainConfig:
    """The configuration that the command line asks for, validated.

    Raises InputError for what cannot work; tyro itself exits with code 2 on options that do not exist.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="quickstart")
    recipe, _ = first.parse_known_args(list(args))
    config = tyro.cli(
        TrainConfig,
        prog=prog,
        description="Distil a student from a teacher under a budget of divergence, with PPO.",
        default=read_recipe(recipe.recipe),
        args=list(args),
    )
    config.validate()
    return config

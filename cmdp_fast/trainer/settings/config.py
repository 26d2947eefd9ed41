"""The settings of a run: one typed field per choice, with the range of its numbers; `parse.py` fills them.

The fields stand in the modules beside this one, a class for each part of a run, and come together here. `validate`
looks at every number and name before a model is loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import regex

from cmdp_fast.errors import InputError
from cmdp_fast.nearest import did_you_mean
from cmdp_fast.teachers.open import is_asked

from ..methods import METHODS, MethodEntry
from .asked import check_teacher
from .budget import BudgetSettings
from .completion import CompletionSettings
from .evaluation import EvaluationSettings
from .memory import MemorySettings
from .models import ModelSettings
from .optimizer import OptimizerSettings
from .precision import faster_precision
from .random_weights import check_random_weights
from .ranges import LARGEST, Range
from .reward import RewardSettings
from .rollout import RolloutSettings, check_rollout
from .run import RunSettings
from .sampling import SamplingSettings
from .several import check_several
from .step import StepSettings
from .task import TaskSettings

LONGEST_NAME = 200  # bytes; file systems take 255, and a folder that is made has a longer one meanwhile

Config = TypeVar("Config", bound="TrainConfig")


@dataclass(frozen=True)
class TrainConfig(
    EvaluationSettings,
    RolloutSettings,
    MemorySettings,
    OptimizerSettings,
    StepSettings,
    CompletionSettings,
    SamplingSettings,
    BudgetSettings,
    RewardSettings,
    TaskSettings,
    ModelSettings,
    RunSettings,
):
    """Settings of `cmdp-fast train`; of several bases a dataclass takes the fields of the last one first."""

    REQUIRED_MODELS: ClassVar[tuple[str, ...]] = ("student", "teacher")
    TRAINS: ClassVar[bool] = True  # or evaluates alone
    ESSENTIAL: ClassVar[tuple[str, ...]] = (  # what `--help` shows
        *("recipe", "method", "fast", "student", "teacher", "task", "dataset", "rewards", "budget", "steps"),
        *("max_new_tokens", "learning_rate", "mixed_precision", "lora_rank", "seed", "name", "resume", "dry_run"),
    )

    def validate(self) -> None:
        """Raises InputError on the first value that cannot work; no model or dataset is touched."""
        for name in self.REQUIRED_MODELS:
            _check(getattr(self, name), f"--{name} is missing: give a hub id, a folder or a builtin:… model")
        has_own = not self.TRAINS and self.eval_dataset and not self.task and not self.dataset
        _check(has_own or bool(self.task) != bool(self.dataset), "give exactly one of --task and --dataset")
        check_ranges(self)
        _check(not self.streaming or self.max_rows > 0, "--streaming needs to know how much to read: --max-rows")
        _check(
            not self.streaming or self.dataset, "--streaming reads a --dataset, reasoning-gym makes its own problems"
        )
        for name in ("task_args", "chat_template_kwargs"):
            value = getattr(self, name)
            _check(isinstance(value, dict), f"--{_flag(name)} must be a JSON object, not {value!r}")
        _check(self.chat or not self.system_prompt, "--system-prompt is part of a chat: add --chat")
        check_choices(self)
        least = 2 if self.grouped else 1
        _check(
            self.num_generations >= least,
            f"--num-generations must be at least {least} to compare, not {self.num_generations}",
        )
        _check(len(self.rewards) > 0, "--rewards names no reward function")
        weights = self.reward_weights
        _check(
            len(weights) in (0, len(self.rewards)) and all(abs(weight) < 1e38 for weight in weights),  # in float32
            f"--reward-weights must be a finite number for each of the {len(self.rewards)} --rewards, not "
            f"{' '.join(map(str, weights))}",
        )
        names = [reward_name(spec) for spec in self.rewards]
        _check(
            self.accuracy_reward in ("", *names),
            f"--accuracy-reward must be one of {', '.join(names)}, not {self.accuracy_reward}",
        )
        for name in ("answer_pattern", "reference_pattern"):
            _check_pattern(f"--{_flag(name)}", getattr(self, name))
        _check(all(self.stop_tokens) and all(self.stop_strings), "--stop-tokens and --stop-strings take no empty text")
        _check(len(self.lora_target) > 0, "--lora-target names no module")
        _check(
            self.lora_rank or not self.lora_modules_to_save,
            "--lora-modules-to-save is for an adapter: it needs --lora-rank",
        )
        _check(
            len(self.pid_gains) == 3 and all(map(math.isfinite, self.pid_gains)),
            f"--pid-gains must be three finite numbers, not {' '.join(map(str, self.pid_gains))}",
        )
        check_rollout(self, self.rollout, self.TRAINS and self.mixes_teacher, self.lora_rank)
        samples = "mixture" if self.mixes_teacher else "" if self.entry.on_policy else "text"
        check_teacher(self, self.algorithm, samples if self.TRAINS else "", self.TRAINS)
        check_several(self, self, self.logits)
        check_random_weights(self, self)
        if self.TRAINS and self.kind == "worst_case":
            _check(
                self.cost == "nll", f"--kind worst_case bounds the teacher's likelihood: --cost nll, not {self.cost}"
            )
            _check(self.prefix_budget > 0, "--kind worst_case needs its budget: --prefix-budget, nats a token")
        if self.TRAINS and self.entry.penalises:
            _check(
                (self.kind, self.cost) == ("lagrangian", "k3"),
                f"--algorithm {self.algorithm} has k3 in its loss and keeps to no budget: --kind lagrangian --cost k3, "
                f"not {self.kind} and {self.cost}; --method {self.algorithm} has both",
            )
        _check(
            not self.cost_clamp or self.cost in ("k1", "k3", "nll"),
            f"--cost-clamp would take the gradient of --cost {self.cost}; it is for k1, k3 and nll",
        )
        _check(
            math.isfinite(self.budget_price / self.budget),
            f"--budget-price {self.budget_price} for --budget {self.budget} is more than a number for each nat",
        )
        if self.TRAINS and self.kind == "barrier":
            _check(self.coefficient > 0, "--kind barrier needs its weight: --coefficient")
        if self.TRAINS and self.budget_steps:
            _check(self.budget_start > 0, "--budget-steps needs the budget to start from: --budget-start")
        if self.TRAINS and self.logits == "full":
            _check(self.baseline != "gae", "--baseline gae reads hidden states: it needs --logits tiled")
        _check(
            self.has_value_head or not self.bootstrap_truncated,
            "--bootstrap-truncated asks a value head: it needs --baseline gae",
        )
        _check(
            "/" not in self.name
            and "\0" not in self.name
            and self.name not in (".", "..")
            and len(self.name.encode("utf-8", "surrogateescape")) <= LONGEST_NAME,
            f"--name is the name of a folder, of up to {LONGEST_NAME} bytes, not {self.name!r}",
        )

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher is asked, wherever it is, and not loaded as a model that can be sampled."""
        return is_asked(self.teacher)

    @property
    def evaluates_teacher(self) -> bool:
        """Whether a training samples the teacher once, for its figures."""
        return self.eval_before and not self.asks_teacher and self.teacher_device != "cpu"

    def resolved(self: Config) -> Config:
        """The settings with what this machine makes of them: a run that goes on, or another process of it, is to take
        the same, and not to measure again."""
        return replace(self, mixed_precision=self.precision)

    @property
    def precision(self) -> Literal["no", "bf16"]:
        """`mixed_precision`, or what it stands for on this machine."""
        return faster_precision() if self.mixed_precision == "auto" else self.mixed_precision

    @property
    def run_name(self) -> str:
        """The name given, or that of the recipe."""
        return self.name or Path(self.recipe).name.removesuffix(".toml")

    @property
    def entry(self) -> MethodEntry:
        """The entry of the algorithm in the table of methods."""
        return METHODS[self.algorithm]

    @property
    def in_range(self) -> bool:
        """Whether the task's reward is a share of its range where the constraint charges something beside it."""
        unit = ("one" if self.kind == "lagrangian" else "range") if self.reward_unit == "auto" else self.reward_unit
        return self.entry.compares and unit == "range"

    @property
    def has_value_head(self) -> bool:
        """Whether completions are compared with the prediction of a value head."""
        return self.entry.compares and self.baseline == "gae"

    @property
    def grouped(self) -> bool:
        """Whether completions of a prompt are compared with one another."""
        return self.entry.groups or (self.entry.compares and self.baseline != "gae")

    @property
    def mixes_teacher(self) -> bool:
        """Whether completions are sampled from a mixture of student and teacher."""
        return self.entry.mixes and self.teacher_mix > 0

    @property
    def has_sampler(self) -> bool:
        """Whether another sampler than the student draws the completions of a step for it."""
        return bool(self.rollout) and self.entry.on_policy and not self.mixes_teacher

    @property
    def correction(self) -> Literal["token", "sequence"] | None:
        """The weights of completions whose sampler reports log-probabilities; None: all the same."""
        if self.sampler_correction == "off":
            return None
        return "token" if self.sampler_correction == "auto" else self.sampler_correction

    @property
    def batch_size(self) -> int:
        """Completions per step, of each process."""
        return self.prompts_per_step * self.num_generations


def reward_name(spec: str) -> str:
    """The name under which a reward of `rewards` is logged."""
    return spec.rpartition(":")[2]


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _check(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_pattern(option: str, pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
        regex.compile(pattern)  # which searches, see data.last_group
    except (re.error, regex.error) as error:
        raise InputError(f"{option} {pattern!r}: {error}") from error
    _check(groups or not pattern, f"{option} {pattern!r} has no group to mark the answer")


def check_ranges(config: object) -> None:
    """Raises InputError for a number outside the range that stands beside its field, and for a whole number that is
    larger than any use of one."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for range_ in (extra for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, Range)):
            range_.check(f"--{_flag(name)}", value)
        for number in value if isinstance(value, tuple) else (value,):
            small = type(number) is not int or abs(number) <= LARGEST
            _check(small, f"--{_flag(name)} must be at most {LARGEST}, not {number}")


def check_choices(config: object) -> None:
    """Raises InputError for a name that is not one of its field's."""
    for name, kind in get_type_hints(type(config)).items():
        choices, value = get_args(kind), getattr(config, name)
        if get_origin(kind) is Literal:
            meant = did_you_mean(str(value), filter(None, choices))
            _check(value in choices, f"--{_flag(name)} must be one of {', '.join(choices)}, not {value}{meant}")
        elif choices and get_origin(choices[0]) is Literal:
            for item in value:
                allowed = get_args(choices[0])
                _check(item in allowed, f"--{_flag(name)} must be some of {', '.join(allowed)}, not {item}")

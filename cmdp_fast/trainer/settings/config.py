"""The settings of a run: one typed field per choice, with the range of its numbers; `parse.py` fills them.

`validate` looks at every number and name before a model is loaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import regex
import tyro

from cmdp_fast.errors import InputError

from ..methods import METHODS, MethodEntry
from .ranges import (
    ABOVE_0_UP_TO_1,
    BETWEEN_0_AND_1,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
)

Json = Annotated[dict[str, Any], tyro.conf.arg(constructor=json.loads, metavar="JSON")]

if TYPE_CHECKING:
    Algorithm = str  # a type checker reads no choices out of a table
else:
    Algorithm = Literal[tuple(METHODS)]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `cmdp-fast train`."""

    REQUIRED_MODELS: ClassVar[tuple[str, ...]] = ("student", "teacher")

    # ---------------------------------------------------------------------------------------------- the run
    recipe: str = "quickstart"
    """Where the defaults of this run come from: a recipe of the package by name, or a path to a TOML file."""
    method: str = ""
    """The way to deal with the budget: a method of the package by name (cmdp, hinge, saute, worst_case, lagrangian,
    pid, barrier, grpo, gkd, minillm, sft, kd), or a path to a TOML file. Its settings go over the recipe's."""
    name: str = ""
    """Folder of the run inside `output_dir`, which must not exist yet. Empty: the recipe's name, numbered if taken."""
    output_dir: str = "runs"
    """Folder that holds the runs."""
    resume: str = ""
    """Folder of a run that stopped, to be finished from its last checkpoint. Its settings are those of its
    `config.json`; only `steps`, `checkpoint_every`, `eval_every` and `trackers` may be changed. Code that it names
    runs only if you name it again, in the same words."""
    checkpoint_every: Annotated[int, NOT_NEGATIVE] = 0
    """Write a checkpoint every so many steps and after the last one; the last two are kept. 0: only when interrupted,
    and one for the time that the end of the run takes."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where the metrics go beside `metrics.jsonl`; wandb and trackio are packages that you install yourself."""
    seed: int = 0
    """Seed of the prompts' order and of the sampling."""
    dry_run: bool = False
    """Load and check models and data, print the settings and an estimate of the memory, and stop there."""

    # ---------------------------------------------------------------------------------------------- the models
    student: str = ""
    """Hub id or folder of the causal language model to train, or `builtin:arithmetic-student`,
    `builtin:arithmetic-shortcut-student`, `builtin:smollm2-pruned-student`."""
    teacher: str = ""
    """Hub id or folder of the causal language model to stay close to, or `builtin:arithmetic-teacher`,
    `builtin:smollm2-teacher`."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Weights are read from safetensors files only, with either value."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: the student runs under autocast and weights that are not trained, the teacher's or those under an adapter,
    are held in bfloat16 (for GPUs)."""
    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Train an adapter of this rank and leave the student's own weights as they are. If the teacher is the same model,
    its weights are shared. `student/` gets the merged model, `student/adapter` the adapter. 0: train all weights."""
    lora_alpha: Annotated[float, POSITIVE] = 32.0
    """The adapter's part of the output is multiplied by this over the rank."""
    lora_target: tuple[str, ...] = ("all-linear",)
    """Ends of the names of the modules that get an adapter, such as `q_proj v_proj`. `all-linear`: every linear layer
    but the head."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again: less memory, more time."""

    # ---------------------------------------------------------------------------------------------- the task
    task: str = ""
    """Name of a reasoning-gym task, which makes its own problems. Either this or `dataset`."""
    task_args: Json = field(default_factory=dict)
    """Arguments of the reasoning-gym task, on the command line as JSON."""
    task_size: Annotated[int, POSITIVE] = 4000
    """How many problems reasoning-gym is asked for; repeated ones are dropped."""
    dataset: str = ""
    """Hub id, or a JSON, JSONL, CSV or Parquet file, or a folder: a dataset with a prompt and an answer column."""
    dataset_config: str = ""
    """Configuration of a hub dataset that has several (`main` of `openai/gsm8k`)."""
    dataset_split: str = "train"
    """Split to train on."""
    streaming: bool = False
    """Read the dataset from where it is, row by row, instead of downloading all of it; needs `max_rows`."""
    max_rows: Annotated[int, NOT_NEGATIVE] = 0
    """Take the first so many rows of each split. 0: all."""
    eval_split: str = ""
    """Split to evaluate on. Empty: a part of the training split is held out, see `holdout_fraction`."""
    prompt_column: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages to which the chat template is applied."""
    answer_column: str = "answer"
    """Column with the reference answer, which the built-in rewards compare with."""
    reference_pattern: str = ""
    """Regular expression whose first group is the answer in that column; the last match counts. Empty: all of it."""
    prompt_template: str = ""
    """A format string over the columns that makes the prompt, such as `{prompt} Think step by step.`"""
    chat: bool = False
    """The prompt is a user's message: it goes through the student's chat template."""
    system_prompt: str = ""
    """The system's message before it (with `chat`)."""
    max_prompt_length: Annotated[int, NOT_NEGATIVE] = 0
    """Problems with a prompt of more tokens are left out, and their number is printed. 0: none may be too long."""
    holdout_fraction: Annotated[float, BETWEEN_0_AND_1] = 0.2
    """Share of the problems that are never trained on; which ones depends on a hash of the prompt alone."""

    # ---------------------------------------------------------------------------------------------- the reward
    rewards: tuple[str, ...] = ("exact_answer",)
    """`exact_answer`, `math_verify`, `reasoning_gym` (the task's own judge), `brevity` (a small bonus for short right
    answers), or your function as `module:function` or `path/file.py:function`. Several are added up."""
    answer_pattern: str = ""
    """Regular expression whose first group is the final answer; the last match in the completion counts. Empty: the
    whole completion is the answer, in which `math_verify` looks for one: it takes a sum that is only repeated for its
    result."""
    judge_timeout: Annotated[float, POSITIVE] = 3.0
    """Seconds that `math_verify` or `reasoning_gym` may take per completion. One that takes longer has no reward from
    it, as where the judge raises or dies: counted as `rewards/…/failed`."""
    unisolated_judges: bool = False
    """Run the judges of `reasoning_gym` where they cannot be isolated (they are on Linux, with Landlock and
    libseccomp). Many of them evaluate an answer as Python, so a completion can then do all that you can."""
    correct_at: float = 1.0
    """A completion counts as right in `accuracy` when its reward is at least this."""
    step_verifier: str = ""
    """The checker of a solution's steps, for `reasoning_success`: `arithmetic_chain` (the built-in models' sums),
    `equations` (every equation between numbers in free text), or your function as for `rewards`. Empty: nothing."""

    # ---------------------------------------------------------------------------------------------- the budget
    budget: Annotated[float, POSITIVE] = 2.0
    """The cumulative cost that a completion may have, in nats."""
    budget_per_token: bool = False
    """The budget is in nats per token of the completion, so that a long one may spend more."""
    budget_start: Annotated[float, NOT_NEGATIVE] = 0.0
    """The budget at the first step, from which it goes to `budget` in a straight line over `budget_steps`."""
    budget_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Length of that schedule. 0: the budget is `budget` from the beginning. Evaluations always use `budget`."""
    prefix_budget: Annotated[float, NOT_NEGATIVE] = 0.0
    """The bound, in nats per token, on the teacher's mean negative log-likelihood over any prefix of a completion.
    `worst_case` keeps to it, and `prefix_satisfaction` reports it. 0: neither."""
    cost: Literal["reverse_kl", "forward_kl", "jsd", "k1", "k3", "nll"] = "reverse_kl"
    """Cost of a token. The first three are exact divergences with a direct gradient."""
    cost_clamp: Annotated[float, NOT_NEGATIVE] = 0.0
    """The largest size in nats of a token's cost, for k1, k3 and nll: k3 of a single token may be 1e13. 0: as it is."""
    jsd_beta: Annotated[float, FROM_0_TO_1] = 0.5
    """Beta of the cost `jsd` and of the loss of `gkd`: 0 is forward KL, 1 reverse KL."""
    kind: Literal["cmdp", "hinge", "saute", "lagrangian", "pid", "barrier", "worst_case"] = "cmdp"
    """The modified reward: the price of being over the budget."""
    penalty: Annotated[float, NOT_NEGATIVE] = 1.0
    """Paid for crossing the budget (cmdp: once; saute, worst_case: at each token from there on)."""
    discrepancy_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of the excess cost (cmdp, hinge)."""
    coefficient: Annotated[float, NOT_NEGATIVE] = 0.0
    """The multiplier of lagrangian (0: the task's reward alone), the first one of pid, or the weight of the barrier."""
    pid_gains: tuple[float, float, float] = (0.1, 0.01, 0.01)
    """Proportional, integral and derivative gain of the pid controller."""

    # ---------------------------------------------------------------------------------------------- a step
    algorithm: Algorithm = "ppo"
    """ppo: the modified reward, by policy gradient and through the divergence; the others distil without a reward: gkd
    by a divergence on the student's own text, minillm by the policy gradient of reverse KL, sft and kd on the
    teacher's text by likelihood and by forward KL."""
    steps: Annotated[int, POSITIVE] = 200
    """How many times to roll out and update."""
    prompts_per_step: Annotated[int, POSITIVE] = 16
    """Prompts rolled out per step, by each process."""
    num_generations: int = 8
    """Completions per prompt: the group whose members are compared with one another."""
    max_new_tokens: Annotated[int, POSITIVE] = 256
    """Longest completion in tokens; the end-of-sequence token counts. One without it is counted as clipped."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Temperature of the policy that is sampled, trained, measured and evaluated."""
    top_k: Annotated[int, NOT_NEGATIVE] = 0
    """Sample from the so many most likely tokens. 0: from all. Anything but the whole softmax is sampled off-policy."""
    top_p: Annotated[float, ABOVE_0_UP_TO_1] = 1.0
    """Sample from the most likely tokens of this total probability. The same warning holds."""
    rollout: str = ""
    """A function of yours that samples instead of `generate`, as `module:function` or `path/file.py:function`; see
    rollout.py. Its log-probabilities are computed again and the difference is logged."""
    rollout_batch_size: Annotated[int, NOT_NEGATIVE] = 0
    """Prompts that are sampled at once, sorted by length. 0: all of a step."""
    baseline: Literal["rloo", "grpo", "position_rloo", "gae"] = "rloo"
    """The comparison that an action's advantage comes from: with the mean return of the group's other completions
    (`rloo`; `position_rloo` compares the returns-to-go at each position), or of the whole group and in units of its
    deviation (`grpo`), or with the prediction of a value head (`gae`)."""
    gae_lambda: Annotated[float, FROM_0_TO_1] = 0.95
    """Lambda of generalised advantage estimation: 1 trusts the returns, 0 the value head."""
    value_learning_rate: Annotated[float, POSITIVE] = 1e-3
    """Learning rate of the value head, a linear layer on the student's hidden states (which it does not change)."""
    teacher_mix: Annotated[float, FROM_0_BELOW_1] = 0.2
    """Share of the teacher in the policy that minillm samples from."""
    gamma: Annotated[float, ABOVE_0_UP_TO_1] = 1.0
    """Discount of the modified reward."""
    epochs: Annotated[int, POSITIVE] = 2
    """PPO passes over the completions of a step."""
    minibatch_size: Annotated[int, POSITIVE] = 32
    """Completions per optimizer step, of each process."""
    micro_batch_size: Annotated[int, POSITIVE] = 32
    """Completions that go through a model at once; gradients of a minibatch are accumulated over them."""
    teacher_cache_mb: Annotated[int, NOT_NEGATIVE] = 512
    """The teacher's hidden states (or logits) are kept from scoring to update if they fit in this, otherwise computed
    again."""
    logits: Literal["tiled", "full"] = "tiled"
    """tiled: scoring and update go from hidden states to statistics a tile of the vocabulary at a time, and hold no
    logits; full: both models' logits are made in full, for a model whose head is not a plain linear layer."""
    clip_low: Annotated[float, POSITIVE] = 0.2
    """PPO's clip below 1."""
    clip_high: Annotated[float, POSITIVE] = 0.2
    """PPO's clip above 1."""
    learning_rate: Annotated[float, POSITIVE] = 1e-6
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after `lr_warmup_steps`; linear and cosine end at 0."""
    lr_warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """The gradient is scaled down to this norm."""

    # ---------------------------------------------------------------------------------------------- evaluation
    eval_prompts: Annotated[int, POSITIVE] = 256
    """Held-out problems per evaluation; all of them if there are fewer."""
    eval_generations: Annotated[int, POSITIVE] = 1
    """Completions per held-out problem, sampled as in training."""
    eval_every: Annotated[int, NOT_NEGATIVE] = 0
    """Evaluate every so many steps for the curves. 0: only before and after."""

    def validate(self) -> None:
        """Raises InputError on the first value that cannot work; no model or dataset is touched."""
        for name in self.REQUIRED_MODELS:
            _check(getattr(self, name), f"--{name} is missing: give a hub id, a folder or a builtin:… model")
        _check(bool(self.task) != bool(self.dataset), "give exactly one of --task and --dataset")
        check_ranges(self)
        _check(not self.streaming or self.max_rows > 0, "--streaming needs to know how much to read: --max-rows")
        _check(
            not self.streaming or self.dataset, "--streaming reads a --dataset, reasoning-gym makes its own problems"
        )
        _check(self.chat or not self.system_prompt, "--system-prompt is part of a chat: add --chat")
        check_choices(self)
        least = 2 if self.grouped else 1
        _check(
            self.num_generations >= least,
            f"--num-generations must be at least {least} to compare, not {self.num_generations}",
        )
        _check(len(self.rewards) > 0, "--rewards names no reward function")
        for name in ("answer_pattern", "reference_pattern"):
            _check_pattern(f"--{_flag(name)}", getattr(self, name))
        _check(len(self.lora_target) > 0, "--lora-target names no module")
        _check(len(self.pid_gains) == 3, f"--pid-gains must be three numbers, not {self.pid_gains}")
        if self.kind == "worst_case":
            _check(
                self.cost == "nll", f"--kind worst_case bounds the teacher's likelihood: --cost nll, not {self.cost}"
            )
            _check(self.prefix_budget > 0, "--kind worst_case needs its budget: --prefix-budget, nats a token")
        _check(
            not self.cost_clamp or self.cost in ("k1", "k3", "nll"),
            f"--cost-clamp would take the gradient of --cost {self.cost}; it is for k1, k3 and nll",
        )
        if self.kind == "barrier":
            _check(self.coefficient > 0, "--kind barrier needs its weight: --coefficient")
        if self.budget_steps:
            _check(self.budget_start > 0, "--budget-steps needs the budget to start from: --budget-start")
        if self.logits == "full":
            _check(self.baseline != "gae", "--baseline gae reads hidden states: it needs --logits tiled")
        _check(
            "/" not in self.name and self.name not in (".", ".."), f"--name is the name of a folder, not {self.name!r}"
        )

    @property
    def run_name(self) -> str:
        """The name given, or that of the recipe."""
        return self.name or Path(self.recipe).name.removesuffix(".toml")

    @property
    def entry(self) -> MethodEntry:
        """The entry of the algorithm in the table of methods."""
        return METHODS[self.algorithm]

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
    def batch_size(self) -> int:
        """Completions per step, of each process."""
        return self.prompts_per_step * self.num_generations


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


def check_ranges(config: TrainConfig) -> None:
    """Raises InputError for a number outside the range that stands beside its field."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        for range_ in (extra for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, Range)):
            range_.check(f"--{_flag(name)}", getattr(config, name))


def check_choices(config: TrainConfig) -> None:
    """Raises InputError for a name that is not one of its field's."""
    for name, kind in get_type_hints(TrainConfig).items():
        choices, value = get_args(kind), getattr(config, name)
        if get_origin(kind) is Literal:
            _check(value in choices, f"--{_flag(name)} must be one of {', '.join(choices)}, not {value}")
        elif choices and get_origin(choices[0]) is Literal:
            for item in value:
                allowed = get_args(choices[0])
                _check(item in allowed, f"--{_flag(name)} must be some of {', '.join(allowed)}, not {item}")

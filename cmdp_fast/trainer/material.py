"""The material of a run or an evaluation: problems, models, rewards; loaded and checked before anything is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cmdp_fast.errors import InputError
from cmdp_fast.imports import import_function
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.teacher import Teacher
from cmdp_fast.topk_scoring import COSTS

from .causal_lm import CausalLM
from .models.pair import compare_quantised, find_pair, load_pair
from .records.origin import origin_of
from .records.report import Report
from .rollout import check_tokens, check_variables, drop_long_prompts, encode_prompts
from .routing import check_rows
from .settings.config import TrainConfig
from .sources import loading
from .tasks.data import Problem, load_problems
from .tasks.rewards import RewardFunction, check_columns, load_rewards
from .tasks.step_verifiers import StepVerifier, check_verifier, load_step_verifier
from .user_rollout import RolloutFunction


@dataclass(kw_only=True)
class Material:
    """Models (the teacher None where there is none), how completions are judged, and the problems."""

    student: CausalLM
    teacher: CausalLM | Teacher | None
    tokenizer: Any
    rewards: dict[str, RewardFunction]
    verifier: StepVerifier | None = None
    rollout: RolloutFunction | None = None
    problems: list[Problem] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)  # token ids
    held_out: list[Problem] = field(default_factory=list)
    sets: dict[str, list[Problem]] = field(default_factory=dict)  # to evaluate on, where nothing is trained
    longest: int = 0  # tokens of a prompt with its completion, at most
    origin: dict[str, str] = field(default_factory=dict)  # digests of problems and models, see `records/origin.py`

    @property
    def loaded_teacher(self) -> CausalLM | None:
        """The teacher where it is a model that can be sampled, and not one that is asked."""
        return None if isinstance(self.teacher, Teacher) else self.teacher


@loading()
def load(config: TrainConfig, report: Report, sets: dict[str, list[Problem]] | None = None) -> Material:
    """Everything, the models on the CPU and last: what can be refused without them is. ``sets``: of problems by name,
    for an evaluation without a training. Raises InputError for material that cannot be used."""
    with report.waiting(f"reading the problems of {config.task or config.dataset}"):
        parts = list(load_problems(config)) if sets is None else list(sets.values())
    # A built-in model is made of a task's problems to train on
    train = parts[0] if sets is None else load_problems(config).train if config.task else []
    rewards = load_rewards(config, parts[0][0])
    verifier = load_step_verifier(config, parts[0][0])
    for name, rows in (_by_source(config, parts) if sets is None else sets).items():
        check_columns(config, rewards, rows, where := name or config.dataset or config.task)
        check_verifier(config, verifier, rows[0], where)
    rollout = import_function("--rollout", config.rollout) if config.rollout not in ("", "vllm") else None
    for rows in parts:
        check_rows(config, rows)
    found = find_pair(config, train, report)
    check_variables(config.chat_template_kwargs, found.tokenizer)
    parts = drop_long_prompts(parts, found.tokenizer, config.max_prompt_length, report)
    evaluated = parts[1:] if sets is None else parts
    evaluated = [rows[: config.eval_prompts or None] for rows in evaluated]
    prompts = encode_prompts(parts[0], found.tokenizer) if sets is None else []
    every = prompts + [ids for rows in evaluated for ids in encode_prompts(rows, found.tokenizer)]
    longest = max(len(ids) for ids in every) + config.max_new_tokens
    limits = {
        about.name_or_path: getattr(about.get_text_config(), "max_position_embeddings", None)
        for about in found.configs.values()
    }
    if found.asked is not None:
        check_asked_cost(found.asked, config)
        check_asked_tokens(found.asked, config, every)
        limits[config.teacher] = found.asked.about.positions
    check_lengths(config, limits, longest)
    with report.waiting(f"loading {' and '.join(found.folders.values())}"):
        student, teacher, tokenizer = load_pair(config, train, report, found)
    held = teacher.model if isinstance(teacher, TeacherInProcess) else teacher
    if config.teacher_quantization:
        report.say(compare_quantised(config, found, held, every))
    origin = origin_of(found.folders, parts, found.asked)  # now, for the weights of a hub's model are there
    check_tokens(every, [model for model in (student, held) if model and not isinstance(model, Teacher)])
    return Material(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        rewards=rewards,
        verifier=verifier,
        rollout=rollout,
        problems=parts[0] if sets is None else [],
        prompts=prompts,
        held_out=evaluated[0],
        sets={} if sets is None else dict(zip(sets, evaluated, strict=True)),
        longest=longest,
        origin=origin,
    )


def _by_source(config: TrainConfig, parts: list[list[Problem]]) -> dict[str, list[Problem]]:
    """A training's problems, and those of its evaluation, by the name of what they come from."""
    if config.eval_dataset:
        return dict(zip(("", *config.eval_dataset), parts, strict=True))
    if config.dataset and config.eval_split:
        return dict(zip(("", f"--eval-split {config.eval_split}"), parts, strict=True))
    return {"": [row for rows in parts for row in rows]}


def check_asked_tokens(teacher: Teacher, config: TrainConfig, prompts: list[list[int]]) -> None:
    """Raises InputError for a token of a prompt that a teacher which is asked has no column for."""
    most, columns = max(max(ids) for ids in prompts), teacher.about.vocab_size
    if most >= columns:
        raise InputError(f"token {most} of a prompt is none of the {columns} of --teacher {config.teacher}")


def check_asked_cost(teacher: Teacher, config: TrainConfig) -> None:
    """Raises InputError for what a teacher's most likely tokens do not bound, or at a temperature at which it has not
    said them."""
    if teacher.about.answers != "topk":
        return
    name, temperature = f"--teacher {config.teacher}", config.teacher_temperature or config.temperature
    if temperature != 1.0:
        raise InputError(
            f"{name} answers with log-probabilities at temperature 1, and is compared with at {temperature:g}: "
            "--teacher-temperature 1"
        )
    if config.cost not in COSTS or config.prefix_budget:
        given = f"--prefix-budget {config.prefix_budget:g}" if config.prefix_budget else f"--cost {config.cost}"
        raise InputError(f"{name} answers with its most likely tokens, which bound {' and '.join(COSTS)}, not {given}")
    if config.TRAINS and (config.algorithm == "minillm" or (config.entry.diverges and config.jsd_beta not in (0, 1))):
        given = f"--algorithm {config.algorithm}" + (
            f" --jsd-beta {config.jsd_beta:g}" if config.entry.diverges else ""
        )
        raise InputError(f"{name} answers with its most likely tokens, which bound {' and '.join(COSTS)}, not {given}")


def check_lengths(config: TrainConfig, limits: dict[str, int | None], longest: int) -> None:
    """Raises InputError if a prompt and its completion, of so many tokens, may not fit into the positions of a model,
    of which these are known by its name."""
    for name, limit in limits.items():
        if limit and longest > limit:
            raise InputError(
                f"a prompt of {longest - config.max_new_tokens} tokens and --max-new-tokens {config.max_new_tokens} do "
                f"not fit the {limit} positions of {name}"
            )

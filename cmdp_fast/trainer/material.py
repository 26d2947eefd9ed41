"""The material of a run or an evaluation: problems, models, rewards; loaded and checked before anything is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cmdp_fast.errors import InputError

from .causal_lm import CausalLM
from .models.pair import load_pair
from .records.report import Report
from .rollout import check_tokens, drop_long_prompts, encode_prompts
from .settings.config import TrainConfig
from .tasks.data import Problem, load_problems
from .tasks.rewards import RewardFunction, load_rewards
from .tasks.step_verifiers import StepVerifier, load_step_verifier


@dataclass(kw_only=True)
class Material:
    """Models (the teacher None where there is none), how completions are judged, and the problems."""

    student: CausalLM
    teacher: CausalLM | None
    tokenizer: Any
    rewards: dict[str, RewardFunction]
    verifier: StepVerifier | None = None
    problems: list[Problem] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)  # token ids
    held_out: list[Problem] = field(default_factory=list)


def load(config: TrainConfig, report: Report) -> Material:
    """Everything, the models on the CPU. Raises InputError for material that cannot be used."""
    problems = load_problems(config)
    rewards = load_rewards(config, problems.train[0])
    verifier = load_step_verifier(config, problems.train[0])
    student, teacher, tokenizer = load_pair(config, problems.train, report)
    problems = drop_long_prompts(problems, tokenizer, config.max_prompt_length, report)
    material = Material(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        rewards=rewards,
        verifier=verifier,
        problems=problems.train,
        prompts=encode_prompts(problems.train, tokenizer),
        held_out=problems.held_out[: config.eval_prompts],
    )
    models = [model for model in (student, teacher) if model is not None]
    prompts = material.prompts + encode_prompts(material.held_out, tokenizer)
    check_tokens(prompts, models)
    _check_lengths(config, models, prompts)
    return material


def _check_lengths(config: TrainConfig, models: list[CausalLM], prompts: list[list[int]]) -> None:
    """Raises InputError if a prompt and its completion may not fit into a model's positions."""
    longest = max(len(ids) for ids in prompts)
    for model in models:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and longest + config.max_new_tokens > limit:
            raise InputError(
                f"a prompt of {longest} tokens and --max-new-tokens {config.max_new_tokens} do not fit "
                f"the {limit} positions of {model.config.name_or_path}"
            )

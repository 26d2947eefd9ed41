"""A pair of random models small enough for a step to take milliseconds, and ways to use it."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForCausalLM

from cmdp_fast.imports import import_function
from cmdp_fast.trainer.engines import make_engines
from cmdp_fast.trainer.material import Material
from cmdp_fast.trainer.models import builtin
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.rollout import encode_prompts
from cmdp_fast.trainer.run import make_learner
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.step import Learner
from cmdp_fast.trainer.tasks import data, rewards

PROBLEMS = [{"prompt": f"{i}+{9 - i}=", "answer": "9", "note": i} for i in range(10)]


def tiny_model(
    folder: Path,
    seed: int,
    layers: int = 1,
    alphabet: str = "0123456789+=;A",
    family: str = "llama",
    spare: int = 0,
    positions: int = 64,
    head_dim: int = 8,
    width: int = 16,
) -> str:
    """A random model with a character tokenizer; `spare` columns of its logits belong to no token."""
    tokenizer = builtin._tokenizer([alphabet])
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer) + spare,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        **({} if family == "falcon" else {"head_dim": head_dim}),
        max_position_embeddings=positions,
        initializer_range=0.3,  # far enough from uniform for the two to differ
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_pair(folder: Path) -> dict[str, str]:
    """A student, a teacher and a dataset in a folder, as the settings of a training name them."""
    problems = folder / "problems.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    problems.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return {
        "student": tiny_model(folder / "student", seed=1),
        "teacher": tiny_model(folder / "teacher", seed=2, layers=2),
        "dataset": str(problems),
    }


SMALL = {  # a training of two steps
    "holdout_fraction": 0.3,
    "steps": 2,
    "prompts_per_step": 3,
    "num_generations": 4,
    "max_new_tokens": 6,
    "minibatch_size": 6,
    "learning_rate": 1e-2,
    "eval_generations": 3,
}


LITERAL = {"reward_unit": "one", "budget_price": 0.0}  # the rewards as they are, and the formula of `modified_reward`


def settings(pair: dict[str, str], **changes) -> TrainConfig:
    base = TrainConfig(**pair, **SMALL, **LITERAL, micro_batch_size=5, budget=2.0, baseline="position_rloo")
    config = dataclasses.replace(base, **changes)
    config.validate()
    return config


def arguments(pair: dict[str, str], output: Path, **changes) -> list[str]:
    """A command line that says the same as `settings`, over the quickstart recipe."""
    values = {
        **pair,
        "task": "",
        "prompt_template": "",
        "answer_pattern": "",
        **SMALL,
        "micro_batch_size": 5,
        "eval_every": 1,
        "output_dir": output,
        "name": "r",
        **changes,
    }
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]


def learner_of(config: TrainConfig, held: ExitStack | None = None, **reward_functions) -> tuple[Learner, list, list]:
    """(learner, some problems, their prompts); ``held`` closes the engines of `--rollout vllm`."""
    problems = data.load_problems(config)
    student, teacher, tokenizer = load_pair(config, problems.train, Report())
    functions = reward_functions or rewards.load_rewards(config, problems.train[0])
    AcceleratorState._reset_state(reset_partial_state=True)  # or the first precision of the process would stay
    rollout = import_function("--rollout", config.rollout) if config.rollout not in ("", "vllm") else None
    prompts = encode_prompts(problems.train, tokenizer)
    material = Material(student=student, teacher=teacher, tokenizer=tokenizer, rewards=functions, rollout=rollout)
    material.prompts, material.longest = prompts, max(map(len, prompts)) + config.max_new_tokens
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    engines = make_engines(config, accelerator, material, Report(), held or ExitStack())
    learner = make_learner(config, accelerator, material, engines)
    return learner, problems.train[: config.prompts_per_step], prompts[: config.prompts_per_step]


def untimed(metrics: dict) -> dict:
    """Without the figures that depend on the machine, or on the number of processes."""
    timed = ("step_time", "tokens_per_second", "timing_s/", "perf/")
    return {name: value for name, value in metrics.items() if not name.startswith(timed)}

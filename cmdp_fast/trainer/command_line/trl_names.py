"""What options of TRL's scripts, of verl's and of others are called here: many who come from there type them first."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

HERE = {
    "model": "--student",
    "model_name_or_path": "--student",
    "teacher_model": "--teacher",
    "teacher_model_name_or_path": "--teacher",
    "train_dataset": "--dataset",
    "dataset_name": "--dataset",
    "dataset_train_split": "--dataset-split",
    "dataset_test_split": "--eval-split",
    "reward_funcs": "--rewards",
    "run_name": "--name",
    "resume_from_checkpoint": "--resume",
    "max_completion_length": "--max-new-tokens",
    "per_device_train_batch_size": "--micro-batch-size",
    "gradient_accumulation_steps": "--minibatch-size (it times per_device_train_batch_size)",
    "generation_batch_size": "--prompts-per-step (it over num_generations)",
    "steps_per_generation": "--prompts-per-step (it times per_device_train_batch_size, over num_generations)",
    "num_iterations": "--epochs",
    "num_train_epochs": "--steps (--epochs is TRL's num_iterations)",
    "max_steps": "--steps",
    "lr_scheduler_type": "--lr-schedule",
    "warmup_steps": "--lr-warmup-steps",
    "epsilon": "--clip-low and --clip-high",
    "epsilon_high": "--clip-high",
    "beta": "--method kl_loss with --coefficient, or --jsd-beta for the divergence of gkd",
    "use_bias_correction_kl": "--kl-loss-correction",
    "scale_rewards": "--baseline",
    "seq_kd": "--method sft",
    "lmbda": "--method gkd, which learns as with lmbda 1",
    "bf16": "--mixed-precision bf16",
    "use_vllm": "--rollout vllm",
    "vllm_server_base_url": "--rollout-url",
    "vllm_importance_sampling_mode": "--sampler-correction",
    "use_peft": "--lora-rank",
    "lora_r": "--lora-rank",
    "lora_target_modules": "--lora-target",
    "save_steps": "--checkpoint-every",
    "save_total_limit": "--keep",
    "eval_steps": "--eval-every",
    "per_device_eval_batch_size": "--micro-batch-size",
    "warmup_ratio": "--lr-warmup-steps (steps, no share)",
    "report_to": "--trackers",
}
"""TRL's name, and ours as an error suggests it. `guide/from_trl.md` says how they differ."""


_WEIGHT = "--coefficient with --method kl_reward or kl_loss"
_CLIPS = "--clip-low and --clip-high"
_GENERATIONS = "--num-generations (of an evaluation: --eval-generations)"
OTHERS: dict[str, tuple[str, ...]] = {
    "lambda": ("--coefficient, the multiplier of lagrangian (that of advantages is --gae-lambda)",),
    "lam": ("--gae-lambda",),
    "kl": (f"--budget, or {_WEIGHT}", "--budget"),
    "kl_penalty": (f"{_WEIGHT} (and --cost: how the KL is estimated)", "--cost"),
    **dict.fromkeys(("kl_coef", "kl_coeff", "init_kl_coef", "kl_loss_coef", "kl_weight"), (_WEIGHT,)),
    **dict.fromkeys(("kl_budget", "max_kl", "target_kl"), ("--budget",)),
    "use_kl_loss": ("--method kl_loss",),
    "use_kl_in_reward": ("--method kl_reward",),
    "adv_estimator": ("--baseline",),
    "advantage_estimator": ("--baseline",),
    **dict.fromkeys(("max_length", "max_len"), ("--max-new-tokens, a completion's (a prompt's: --max-prompt-length)",)),
    **dict.fromkeys(("max_tokens", "max_response_length", "response_length"), ("--max-new-tokens",)),
    "lr": ("--learning-rate",),
    "critic_lr": ("--value-learning-rate",),
    "grad_clip": ("--max-grad-norm",),
    "lr_scheduler": ("--lr-schedule",),
    "batch_size": (
        "--prompts-per-step, --minibatch-size or --micro-batch-size",
        "--micro-batch-size or --rollout-batch-size",
        "--batch-tokens",
    ),
    "train_batch_size": ("--prompts-per-step",),
    **dict.fromkeys(("ppo_mini_batch_size", "mini_batch_size"), ("--minibatch-size",)),
    **dict.fromkeys(("ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu"), ("--micro-batch-size",)),
    "ppo_epochs": ("--epochs",),
    **dict.fromkeys(("total_training_steps", "num_steps", "total_epochs", "num_epochs"), ("--steps",)),
    **dict.fromkeys(("clip", "clip_ratio", "cliprange"), (_CLIPS,)),
    "clip_ratio_low": ("--clip-low",),
    "clip_ratio_high": ("--clip-high",),
    **dict.fromkeys(("n", "num_samples", "n_samples_per_prompt", "num_return_sequences"), (_GENERATIONS,)),
    **dict.fromkeys(("test_freq", "eval_freq", "eval_interval"), ("--eval-every",)),
    **dict.fromkeys(("save_freq", "save_interval", "save_every"), ("--checkpoint-every",)),
    "val_before_train": ("--eval-before",),
    "logger": ("--trackers",),
    **dict.fromkeys(("experiment_name", "exp_name"), ("--name",)),
    **dict.fromkeys(
        ("output", "out", "output_file", "output_path", "save_dir"), ("--output-dir", "--json", "--output")
    ),
    **dict.fromkeys(("reward", "reward_fn", "reward_function", "custom_reward_function"), ("--rewards",)),
    **dict.fromkeys(("data", "data_path", "train_file", "prompt_data"), ("--dataset",)),
    **dict.fromkeys(("val_file", "eval_file", "test_file"), ("--eval-dataset",)),
    "prompt_key": ("--prompt-column",),
    "input_key": ("--prompt-column",),
    "label_key": ("--answer-column",),
    **dict.fromkeys(("model_path", "pretrain", "base_model", "student_model"), ("--student",)),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), ("--teacher-quantization",)),
}
"""Names of verl and of OpenRLHF, and what else is typed for a setting: what was meant, for a command that reads the
first, else for one that reads the second."""


class Meant(NamedTuple):
    """What to give in place of an option: a ``text`` with what a command reads, or empty, and the ``flags`` that
    `cmdp-fast train` has for it. ``trl``: the name is TRL's."""

    text: str
    flags: tuple[str, ...]
    trl: bool


def option_here(name: str, flags: Collection[str]) -> Meant:
    """What an option of another program is called here, in the singular or the plural; ``flags``: what the command
    reads."""
    plain = name.lower().replace("-", "_")
    for each in (plain, f"{plain}s", plain.removesuffix("s")):
        if texts := ((HERE[each],) if each in HERE else OTHERS.get(each, ())):
            usable = (text for text in texts if set(flags_in(text)) <= set(flags))
            return Meant(next(usable, ""), tuple(flags_in(texts[0])), each in HERE)
    return Meant("", (), False)


def flags_in(text: str) -> list[str]:
    """The options that a text names."""
    return re.findall(r"--[a-z][a-z-]*", text)

"""What options of TRL's scripts are called here: many who come from there type them first."""

from __future__ import annotations

import re
from collections.abc import Collection

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
    "report_to": "--trackers",
}
"""TRL's name, and ours as an error suggests it. `guide/from_trl.md` says how they differ."""


def option_here(name: str, flags: Collection[str]) -> str:
    """What to give in place of an option of TRL's, if it is one whose place here is among the flags; else empty."""
    here = HERE.get(name.lower().replace("-", "_"), "")
    return here if here and set(flags_in(here)) <= set(flags) else ""


def flags_in(text: str) -> list[str]:
    """The options that a text names."""
    return re.findall(r"--[a-z][a-z-]*", text)

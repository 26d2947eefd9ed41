"""The models of the recipes `qwen2.5-math` and `llama-3.2` as shapes alone, from the numbers of their configurations.

`python tests/support/recipe_models.py` prints the memory that stands in the heads of the recipes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from public_models import QWEN2_5_1_5B, QWEN2_5_7B
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, MllamaForCausalLM

from cmdp_fast.trainer.dry_run import memory_rows, readable
from cmdp_fast.trainer.models.memory_estimate import MemoryEstimate, estimate_memory
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.settings.recipe import read_recipe

QWEN: dict[str, Any] = {"model_type": "qwen2", "max_position_embeddings": 4096}
LLAMA_STUDENT = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}
LLAMA_TEACHER = {
    "model_type": "mllama_text_model",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    "max_position_embeddings": 131_072,
    "pad_token_id": 128_004,
}
MODELS = {"qwen2.5-math": (QWEN | QWEN2_5_1_5B, QWEN | QWEN2_5_7B), "llama-3.2": (LLAMA_STUDENT, LLAMA_TEACHER)}
ON_EIGHT = {"prompts_per_step": 2, "minibatch_size": 4, "micro_batch_size": 4}


def model_of(numbers: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model without its weights."""
    config = AutoConfig.for_model(**numbers)
    if numbers["model_type"] == "mllama_text_model":  # a part of a model of images and text
        return MllamaForCausalLM._from_config(config, dtype=dtype).eval()
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def memory_of(recipe: str, processes: int = 1) -> tuple[TrainConfig, MemoryEstimate]:
    """The settings, and what the dry run would say with prompts of the longest length."""
    config = dataclasses.replace(read_recipe(recipe), **(ON_EIGHT if processes > 1 else {}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = model_of(MODELS[recipe][0], torch.float32)
        teacher = model_of(MODELS[recipe][1], torch.bfloat16).requires_grad_(False)
    gpu = torch.device("cuda")
    return config, estimate_memory(config, student, teacher, config.max_prompt_length, processes=processes, device=gpu)


def table(recipe: str) -> list[str]:
    """The lines of the recipe's head."""
    return [f"#   {row.name:<22}{row.about:<58}{readable(row.size or 0):>9}" for row in memory_rows(*memory_of(recipe))]


if __name__ == "__main__":
    for name in MODELS:
        print(name, *table(name), sep="\n")
    print("qwen2.5-math, each of eight:", readable(memory_of("qwen2.5-math", 8)[1].update))

"""The models of the recipes for a hub's, as shapes alone, from the numbers of their configurations.

`python tests/support/recipe_models.py` prints the memory that stands in the heads of the recipes.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from public_models import QWEN2_5_0_5B, QWEN2_5_1_5B, QWEN2_5_3B, QWEN2_5_7B
from tokenizers.pre_tokenizers import ByteLevel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, MllamaForCausalLM, Qwen2Tokenizer

from cmdp_fast.trainer.dry_run import dry_run, memory_rows, readable
from cmdp_fast.trainer.models.memory_estimate import MemoryEstimate, estimate_memory
from cmdp_fast.trainer.parse import parse
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
MODELS = {
    "qwen2.5-math": (QWEN | QWEN2_5_1_5B, QWEN | QWEN2_5_7B),
    "llama-3.2": (LLAMA_STUDENT, LLAMA_TEACHER),
    "qwen2.5-24gb": (QWEN | QWEN2_5_0_5B, QWEN | QWEN2_5_3B),
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADAPTER = {"lora_rank": 16, "learning_rate": 1e-4, "micro_batch_tokens": 6144}  # of qwen2.5-24gb
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


def chat_tokenizer() -> Any:
    """Qwen's, with a token a byte, and its chat template but for a system prompt of its own."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def without_weights(folder: Path, numbers: dict[str, Any]) -> str:
    """A folder with a model's configuration and a small tokenizer, as a hub has them beside the weights."""
    AutoConfig.for_model(**numbers, eos_token_id=151_645).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


def problems(file: Path, settings: TrainConfig) -> str:
    """A file of problems like GSM8K's, with prompts of the longest length."""
    tokenizer, bare = chat_tokenizer(), (settings.prompt_template or "{prompt}").format(prompt="")
    if settings.chat:
        messages = [{"role": "system", "content": settings.system_prompt}, {"role": "user", "content": bare}]
        bare = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    width = settings.max_prompt_length - len(tokenizer(bare)["input_ids"])  # a byte each
    rows = [{"question": f"{i:0{width}}", "answer": f"{i}+0=<<{i}+0={i}>>{i}.\n#### {i}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def dry_run_of(recipe: str, folder: Path, changes: dict[str, Any]) -> tuple[TrainConfig, MemoryEstimate]:
    """The settings, and what the dry run says of models without weights that it finds in a folder."""
    settings = read_recipe(recipe)
    student, teacher = (without_weights(folder / str(i), numbers) for i, numbers in enumerate(MODELS[recipe]))
    dataset = problems(folder / "problems.jsonl", settings)
    own = {"student": student, "teacher": teacher, "dataset": dataset, "dataset_config": "", "eval_split": ""}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {**own, **changes}.items()]
    config = parse([f"--recipe={recipe}", *words, "--dry-run", "--random-weights"])
    return config, dry_run(config)


def table(config: TrainConfig, memory: MemoryEstimate) -> list[str]:
    """The lines of a recipe's head."""
    return [f"#   {row.name:<22}{row.about:<58}{readable(row.size or 0):>9}" for row in memory_rows(config, memory)]


if __name__ == "__main__":
    for name in MODELS:
        print(name, *table(*memory_of(name)), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        print("qwen2.5-24gb with the adapter", *table(*dry_run_of("qwen2.5-24gb", Path(folder), ADAPTER)), sep="\n")
    print("qwen2.5-math, each of eight:", readable(memory_of("qwen2.5-math", 8)[1].update))

"""Random models of public architectures and sizes, a byte tokenizer, and a task of sums: nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from public_models import QWEN2_5_1_5B, QWEN2_5_7B

STUDENT, TEACHER = QWEN2_5_1_5B, QWEN2_5_7B
TOY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOY_STUDENT = TOY | {"tie_word_embeddings": True}
TOY_TEACHER = TOY | {"hidden_size": 32, "vocab_size": 304, "tie_word_embeddings": False}
# Their widths with few layers and tokens: a checkpoint of Qwen2.5's vocabulary takes 13 s to write and to check.
SHALLOW = {"num_hidden_layers": 2, "vocab_size": 16384}


def make(settings: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Any:
    """A random Qwen2 on a device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2", max_position_embeddings=1024, bos_token_id=None, eos_token_id=2, pad_token_id=0, **settings
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def byte_tokenizer(size: int) -> Any:
    """A token per byte after three special ones, then names for the rest of a vocabulary of that size: a random model
    writes hardly any other, and completions without a text would all have the same reward."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<end>", *alphabet])}
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", padding_side="left"
    )


def problems(count: int) -> list[dict[str, str]]:
    """Sums, each with its answer."""
    rng = random.Random(0)
    pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(count)]
    return [{"prompt": f"What is {a} + {b}? Answer with the number alone: ", "answer": str(a + b)} for a, b in pairs]


def write_task(path: Path, count: int) -> None:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems(count)), encoding="utf-8")


def save(settings: dict[str, Any], dtype: torch.dtype, device: str, folder: Path, seed: int, size: int) -> None:
    """A random model and a tokenizer of ``size`` tokens in a folder."""
    make(settings, dtype, device, seed).save_pretrained(folder)
    byte_tokenizer(size).save_pretrained(folder)


def odd(completions: list[Any], **_: Any) -> list[float]:
    """A reward in which random completions differ: the share of their characters with an odd number."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ord(character) % 2 for character in text) / max(len(text), 1) for text in texts]

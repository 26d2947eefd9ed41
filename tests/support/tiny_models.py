"""Tiny causal language models with random weights, and the check that two halves of one are its logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cmdp_fast as cf

transformers = pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

BASE = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
# (family, its settings, softcap, scale)
FAMILIES = [
    ("llama", {}, None, 1.0),
    ("llama", {"tie_word_embeddings": True}, None, 1.0),  # SmolLM
    ("smollm3", {}, None, 1.0),
    ("qwen2", {"tie_word_embeddings": True}, None, 1.0),
    ("qwen3", {}, None, 1.0),
    ("mistral", {}, None, 1.0),
    ("gemma2", {"final_logit_softcapping": 0.5}, 0.5, 1.0),
    ("gemma2", {"final_logit_softcapping": None}, None, 1.0),
    ("gemma3_text", {}, None, 1.0),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, 30.0, 1.0),
    ("phi", {}, None, 1.0),  # a bias
    ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 2}, None, 1.0),
    ("opt", {"word_embed_proj_dim": 8, "ffn_dim": 32}, None, 1.0),  # a projection between base model and head
    ("cohere", {"logit_scale": 0.0625}, None, 0.0625),
    ("granite", {"logits_scaling": 6.0}, None, 1 / 6.0),  # divides by it
    ("hyperclovax", {"logits_scaling": 3.0}, None, 3.0),  # multiplies by it
    ("minicpm3", LATENT | {"dim_model_base": 8}, None, 1.0),  # divides before the head
]


def tiny(family: str = "llama", seed: int = 0, **changes) -> nn.Module:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(BASE | {"initializer_range": 0.2} | changes))
    model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        nn.init.normal_(head.bias)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    """Two sequences, the second padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 101, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order in which a few float32 numbers are rounded."""
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=0, atol=8 * eps * float(expected.detach().abs().max())
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_both_halves_are(model: nn.Module, inner: nn.Module | None = None, **inputs) -> None:
    """Logits, and the gradient of a function of them, are those of the model itself."""
    inner = inner or model
    inputs = batch() | inputs
    expected = inner(**inputs).logits
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected.log_softmax(-1) * target).sum().backward()
    by_logits = gradients(inner)

    hidden = cf.last_hidden_state(model, **inputs)
    head = cf.head_of(model)
    assert hidden.shape == (*expected.shape[:2], head.weight.shape[1])
    actual = head.logits(hidden)
    assert_same(actual, expected.detach())
    (actual.log_softmax(-1) * target).sum().backward()
    by_halves = gradients(inner)
    assert by_halves.keys() == by_logits.keys() != set()
    for name, grad in by_halves.items():
        assert_same(grad, by_logits[name])

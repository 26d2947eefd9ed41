"""Gradient checkpointing: the same gradients from less that is kept, and generation as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_pair import learner_of, settings, tiny_model, untimed
from transformers import AutoModelForCausalLM

import cmdp_fast as cf
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.models.recompute import recompute_layers

IDS = torch.tensor([[3, 4, 5, 6, 3, 4], [7, 8, 9, 3, 5, 5]])


def model_of(tmp_path, family: str):
    """In evaluation mode, with every dropout that the family has at a half."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / family, seed=1, layers=3, family=family)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        for name in ("attention_dropout", "dropout", "hidden_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    for name in ("attention_dropout", "dropout", "hidden_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.5)
    return model


def gradients(model) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of some loss and how many numbers were kept for them."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = cf.last_hidden_state(model, IDS).square().sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
def test_gradients_are_equal_and_less_is_kept(family, tmp_path):
    model = model_of(tmp_path, family)
    expected, kept = gradients(model)
    recompute_layers(model)
    found, kept_now = gradients(model)
    assert found.keys() == expected.keys() and found
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kept_now < kept / 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
def test_generation_uses_its_cache(family, tmp_path):
    model = model_of(tmp_path, family)
    widths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    expected = model.generate(IDS, **options)
    recompute_layers(model)
    gradients(model)  # which leaves the layers in training mode
    widths.clear()
    assert torch.equal(model.generate(IDS, **options), expected)
    assert widths == [6, 1, 1, 1, 1]


def test_steps_are_the_same(pair):
    histories = []
    for on in (False, True):
        learner, rows, prompts = learner_of(settings(pair, gradient_checkpointing=on))
        histories.append([untimed(learner.step(rows, prompts)) for _ in range(2)])
    assert histories[0] == histories[1]


def test_with_an_adapter(pair):
    pytest.importorskip("peft")
    histories = []
    for on in (False, True):
        same = {**pair, "teacher": pair["student"]}
        learner, rows, prompts = learner_of(settings(same, gradient_checkpointing=on, lora_rank=4, teacher_cache_mb=0))
        histories.append([untimed(learner.step(rows, prompts)) for _ in range(2)])
    assert histories[0] == histories[1]


def test_model_without_layers():
    with pytest.raises(InputError, match="--gradient-checkpointing: Linear has no layers"):
        recompute_layers(torch.nn.Linear(2, 2))

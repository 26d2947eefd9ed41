"""The numbers of a saved student: those that were evaluated, in the dtype that its configuration names."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import assert_no_worse
from safetensors.torch import load_file, save_file
from tiny_pair import learner_of, settings, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.models.saving import save_student
from cmdp_fast.trainer.records.report import Report

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])


def short(completion_ids, **_) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def trained_and_saved(pair, folder, **changes):
    """A student after two steps, and the weights and the configuration that are saved of it."""
    learner, rows, prompts = learner_of(settings(pair, **changes), short=short)
    for _ in range(2):
        learner.step(rows, prompts)
    save_student(learner.student, learner.collector.tokenizer, folder)
    weights = load_file(folder / "student" / "model.safetensors")
    return learner.student, weights, json.loads((folder / "student" / "config.json").read_text())


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}])
def test_others_may_read_a_student_as_they_may_read_its_configuration(lora, pair, tmp_path):
    if lora:
        pytest.importorskip("peft")
    before = os.umask(0o027)
    try:
        student, _, tokenizer = load_pair(settings(pair, **lora), [], Report())
        save_student(student, tokenizer, tmp_path)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "student").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 1 + len(lora)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_merge_over_bfloat16_keeps_every_change(tied, pair, tmp_path):
    pytest.importorskip("peft")
    base = tiny_model(tmp_path / "base", seed=1)
    if tied:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(base)
    with torch.enable_grad():
        changes = dict(lora_rank=4, mixed_precision="bf16", learning_rate=1e-4)
        student, weights, config = trained_and_saved({**pair, "student": base, "teacher": base}, tmp_path, **changes)
    changed = survived = 0
    for name, module in student.named_modules():
        if hasattr(module, "get_delta_weight"):
            frozen, delta = module.base_layer.weight.float(), module.get_delta_weight("default")
            assert torch.equal(weights.pop(f"{name}.weight"), frozen + delta)
            changed += int((delta != 0).sum())
            survived += int((frozen + delta != frozen).sum())
    assert changed and survived > 0.999 * changed
    assert not tied or "lm_head.weight" not in weights, "a tied weight is saved once"
    for name, weight in weights.items():  # where nothing was adapted
        assert weight.dtype == torch.float32 and torch.equal(weight, student.get_parameter(name).float())
    assert config["dtype"] == "float32"

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    exact = copy.deepcopy(student).double()(IDS).logits
    assert_no_worse(saved(IDS).logits, copy.deepcopy(student).float()(IDS).logits, exact)


@torch.no_grad()
def test_adapters_of_experts_are_merged(pair, tmp_path):
    """Whose weights are parameters of one module: peft puts a layer around it for each of them."""
    pytest.importorskip("peft")
    base = tiny_model(tmp_path / "base", seed=1, family="mixtral")
    with torch.enable_grad():
        student, _, _ = trained_and_saved({**pair, "student": base, "teacher": base}, tmp_path, lora_rank=2)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    changed = set()
    for name, module in student.named_modules():
        if hasattr(module, "get_delta_weight"):
            parameter = getattr(module, "parameter_name", "weight")  # of older versions, which have a layer per expert
            frozen = module.get_base_layer().get_parameter(parameter)
            merged = saved.get_parameter(f"{name.replace('.base_layer', '')}.{parameter}")
            assert torch.equal(merged, frozen + module.get_delta_weight("default")) and not torch.equal(merged, frozen)
            changed.add(parameter)
    assert "weight" in changed


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_full_training_saves_the_dtype_that_it_names(precision, pair, tmp_path):
    student, weights, config = trained_and_saved(pair, tmp_path, mixed_precision=precision)
    assert config["dtype"] == "float32" and {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(torch.equal(weight, student.get_parameter(name)) for name, weight in weights.items())


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_that_the_architecture_ignores_are_said(sharded, pair, tmp_path, monkeypatch, capsys):
    pair = {**pair, "student": tiny_model(tmp_path / "more", seed=1)}
    file = f"{pair['student']}/model.safetensors"
    more = {f"mtp.{name}.weight": torch.ones(2) for name in ("norm", "fc")}
    weights = load_file(file) | more
    save_file(weights, file, metadata={"format": "pt"})
    if sharded:
        part = "model-00001-of-00001.safetensors"
        Path(file).rename(Path(file).with_name(part))
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, part)}
        Path(f"{file}.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    student, _, _ = load_pair(settings(pair), [], Report())
    said = [line for line in capsys.readouterr().out.splitlines() if "without a place" in line]
    assert len(said) == 1 and "without a place in a LlamaForCausalLM (2, mtp.…): they are not read" in said[0]
    assert not any(name.startswith("mtp") for name in student.state_dict())


def test_other_tensors_without_a_place_are_said_too(pair, tmp_path, capsys):
    tiny_model(tmp_path / "deep", seed=0, layers=2)
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    (tmp_path / "deep" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    load_pair(settings({**pair, "student": str(tmp_path / "deep")}), [], Report())
    assert "without a place in a LlamaForCausalLM (9, model.layers.1.…)" in capsys.readouterr().out


def test_nothing_is_said_of_a_whole_model(pair, capsys):
    load_pair(settings(pair), [], Report())
    assert "without a place" not in capsys.readouterr().out

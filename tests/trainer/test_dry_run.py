"""--dry-run: the settings, the memory, and nothing else."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from tiny_pair import arguments, learner_of, settings

import cmdp_fast as cf
from cmdp_fast.cli import main
from cmdp_fast.trainer import parse
from cmdp_fast.trainer.dry_run import readable, settings_text
from cmdp_fast.trainer.models.memory_estimate import estimate_memory, update_bytes
from cmdp_fast.trainer.settings.values import typed
from cmdp_fast.trainer.step import Learner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROMPT = 4  # tokens of the tiny pair's prompts


def estimate(pair, **changes):
    """(the estimate, the same models ready to be trained)"""
    learner, rows, prompts = learner_of(settings(pair, **changes))
    return estimate_memory(learner.config, learner.student, learner.teacher, PROMPT), learner, rows, prompts


def test_prints_and_leaves_nothing(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Learner, "step", lambda *_: pytest.fail("a dry run must not train"))
    command = [*arguments(pair, tmp_path / "runs"), "--dry-run"]
    expected = dataclasses.asdict(parse.parse(command[1:]))
    capsys.readouterr()
    assert main(command) == 0
    assert not (tmp_path / "runs").exists()
    lines = capsys.readouterr().out.splitlines()
    assert typed(tomllib.loads("\n".join(lines[: len(expected)])), "dry run") == expected
    rest = "\n".join(lines[len(expected) :])
    for word in ("parameters", "gradients", "optimizer", "teacher", "activations", "estimate"):
        assert word in rest


def test_bad_input_is_found(pair, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    assert main([*arguments(pair, tmp_path), "--dry-run"]) == 2
    assert "choose another --name" in capsys.readouterr().err
    for changes, expected in (
        (dict(teacher="./no/such/model"), "--teacher ./no/such/model"),
        (dict(max_new_tokens=62), "do not fit the 64 positions"),
        (dict(rollout="math:no_such_function"), "no_such_function"),
    ):
        assert main([*arguments(pair, tmp_path, name="new", **changes), "--dry-run"]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"baseline": "gae"}, {"lora_rank": 4}, {"mixed_precision": "bf16"}])
def test_counts_are_those_of_a_step(changes, pair):
    if "lora_rank" in changes:
        pytest.importorskip("peft")
        pair = {**pair, "teacher": pair["student"]}
    memory, learner, rows, prompts = estimate(pair, **changes)
    learner.descend = lambda: {}  # keep the gradients
    learner.step(rows, prompts)
    modules = [learner.student] + ([learner.method.value_head] if learner.method.value_head else [])
    parameters = [p for module in modules for p in module.parameters()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert memory.gradients == sum(g.nbytes for g in gradients)
    assert memory.trained_parameters == sum(g.numel() for g in gradients)
    assert memory.weights == sum(p.nbytes for p in parameters)
    assert memory.teacher_weights == sum(p.nbytes for p in learner.teacher.parameters())
    assert (memory.teacher_weights == 0) == ("lora_rank" in changes)
    learner.optimizer.step()
    moments = [v for state in learner.optimizer.state.values() for v in state.values() if v.dim()]
    assert memory.optimizer == sum(v.nbytes for v in moments)


@pytest.mark.parametrize("logits", ["tiled", "full"])
def test_cached_teacher_outputs(logits, pair):
    memory, learner, rows, prompts = estimate(pair, logits=logits, max_new_tokens=3)
    group = [row for row in rows for _ in range(4)], [ids for ids in prompts for _ in range(4)]
    experience = learner.method.collect(*group, learner.constraint())
    kept = experience.teacher_outputs.outputs  # without padding; the estimate is of completions at their full length
    assert memory.teacher_outputs == 12 * 3 * kept[0].nbytes
    assert len(kept) == experience.rollout.mask.sum()
    assert estimate(pair, logits=logits, teacher_cache_mb=0)[0].teacher_outputs == 0


def test_cache_of_a_generation(pair):
    memory, learner, _, _ = estimate(pair, rollout_batch_size=2)
    ids = torch.ones(2, PROMPT + 6, dtype=torch.long)
    layers = learner.student(ids[:, 1:], use_cache=True).past_key_values.layers  # the last token is not read
    assert memory.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def test_cache_of_a_generation_under_autocast(pair):
    """Rotary positions make float32 of keys, and transformers' cache has the values in their dtype."""
    memory, learner, _, prompts = estimate(pair, rollout_batch_size=2, mixed_precision="bf16")
    ids = torch.tensor(prompts[:2])
    with learner.accelerator.autocast():
        options = dict(max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True)
        layers = learner.student.generate(ids, **options).past_key_values.layers
    assert layers[0].keys.dtype == torch.float32
    assert memory.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert memory.copies == sum(p.nbytes // 2 for p in learner.student.parameters() if p.dim() == 2) - (
        learner.student.get_input_embeddings().weight.nbytes // 2
    )


def test_buckets_of_several_processes(pair):
    """Gradients are views of them where a minibatch is one part; others are added up beside them."""
    learner, _, _ = learner_of(settings(pair, micro_batch_size=6))
    parts = [learner.config, dataclasses.replace(learner.config, micro_batch_size=5)]
    models = learner.student, learner.teacher
    alone = estimate_memory(parts[0], *models, PROMPT)
    assert (alone.buckets, alone.gradients) == (0, sum(p.nbytes for p in learner.student.parameters()))
    views, beside = (estimate_memory(config, *models, PROMPT, processes=2) for config in parts)
    assert (views.buckets, views.gradients) == (alone.gradients, 0)
    assert (beside.buckets, beside.gradients) == (alone.gradients, alone.gradients)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adafactor", "sgd"])
def test_state_of_an_optimizer(name, pair):
    memory, learner, rows, prompts = estimate(pair, optim=name)
    learner.step(rows, prompts)
    moments = [
        v for state in learner.optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()
    ]
    assert memory.optimizer == sum(v.nbytes for v in moments)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"lora_rank": 4}])
def test_activations_are_near_what_is_kept(changes, pair):
    """Counted on real tensors, without a layer that is computed again."""
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    learner, _, _ = learner_of(settings({**pair, "student": pair["teacher"]}, **changes))
    weights = {p.untyped_storage().data_ptr() for p in learner.student.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.ones(5, 20, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cf.last_hidden_state(learner.student, ids, position_ids=torch.arange(20).expand(5, 20))
    real = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
    before = {name: value.clone() for name, value in learner.student.state_dict().items()}
    found = update_bytes(learner.config, learner.student, 5, 20)
    if "gradient_checkpointing" in changes:
        assert real < found.kept + found.backward  # which has a layer that is computed again
    inputs = 5 * 20 * (16 * 4 + 3 * 8)  # hidden states of the last layer, ids and positions, which are not saved
    assert real <= found.kept <= 1.1 * real + inputs
    assert update_bytes(learner.config, learner.student, 10, 20).kept == pytest.approx(2 * found.kept, rel=0.01)
    assert all(torch.equal(before[name], value) for name, value in learner.student.state_dict().items())


def test_activations_of_a_model_whose_shapes_depend_on_numbers(pair):
    memory, learner, _, _ = estimate(pair)
    learner.student.register_forward_pre_hook(
        lambda _, args, kwargs: kwargs["input_ids"].sum().item(), with_kwargs=True
    )
    without = estimate_memory(learner.config, learner.student, learner.teacher, PROMPT)
    assert without.activations is None
    assert without.cache is None and without.update > 0
    assert memory.update > without.update


def test_settings_are_toml(pair):
    config = settings(pair, task_args={"min terms": 2, "nested": {"a": [1, 2]}}, prompt_template='say "{prompt}"\n')
    values = tomllib.loads(settings_text(config))
    assert values["task_args"] == config.task_args and values["prompt_template"] == config.prompt_template


def test_readable():
    assert [readable(size) for size in (12, 2048, 3 * 2**20, 5 * 2**29)] == ["12 B", "2.0 KiB", "3.0 MiB", "2.5 GiB"]

"""LoRA: what is trained, what is shared, and what is saved."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tiny_pair import arguments, arguments_for, learner_of, settings, tiny_model, untimed

import cmdp_fast as cf
from cmdp_fast.cli import main
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.models.adapter import FrozenBase

pytest.importorskip("peft")
from peft import PeftModel
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])


@pytest.fixture
def same(pair) -> dict[str, str]:
    """A pair whose teacher is the student's own model."""
    return {**pair, "teacher": pair["student"]}


def short(completion_ids, **_) -> list[float]:
    """A reward that differs between completions: a student that is its teacher has nothing else to learn from."""
    return [-float(len(ids)) for ids in completion_ids]


def prepared(pair, **changes):
    return learner_of(settings(pair, **{"lora_rank": 4, **changes}), short=short)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def test_teacher_is_the_student_without_its_adapter(same):
    learner, rows, prompts = prepared(same)
    original = AutoModelForCausalLM.from_pretrained(same["teacher"]).eval()
    assert isinstance(learner.teacher, FrozenBase) and not list(learner.teacher.parameters())
    assert not learner.teacher.state_dict() and not list(learner.teacher.children())
    for _ in range(2):
        learner.step(rows, prompts)
    with torch.no_grad():
        expected = original(IDS).logits
        assert torch.equal(learner.teacher(IDS).logits, expected)
        assert torch.equal(cf.last_hidden_state(learner.teacher, IDS), cf.last_hidden_state(original, IDS))
        assert torch.equal(cf.head_of(learner.teacher).weight, cf.head_of(original).weight)
        assert (learner.student(IDS).logits - expected).abs().max() > 1e-3
        drawn = [
            model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
            for model in (learner.teacher, original)
        ]
    assert torch.equal(*drawn)
    assert trained(learner.student), "the adapter is to be trained again once the teacher has been asked"


def test_adapter_comes_back_after_an_error(same):
    learner, _, _ = prepared(same)
    with pytest.raises(ValueError, match="input_ids"):
        learner.teacher()
    assert trained(learner.student)


def test_only_the_adapter_is_trained(same):
    learner, rows, prompts = prepared(same)
    before, base = trained(learner.student), frozen(learner.student)
    assert before and all(".lora_" in name for name in before)
    first = learner.step(rows, prompts)
    second = learner.step(rows, prompts)
    assert first["cmdp/cumulative_kl"] == 0.0 and second["cmdp/cumulative_kl"] > 0.0
    assert all(torch.equal(base[name], value) for name, value in frozen(learner.student).items())
    assert all(not torch.equal(before[name], value) for name, value in trained(learner.student).items())
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in learner.student.parameters() if p.requires_grad}


def test_shared_weights_give_what_a_second_copy_gives(same, tmp_path):
    copy = tiny_model(tmp_path / "copy", seed=1)  # the student's numbers under another name
    shared, rows, prompts = prepared(same)
    apart, _, _ = prepared({**same, "teacher": copy})
    assert not isinstance(apart.teacher, FrozenBase)
    for learner in (shared, apart):
        torch.manual_seed(0)
        learner.metrics = [untimed(learner.step(rows, prompts)) for _ in range(2)]
    assert shared.metrics == apart.metrics
    assert shared.metrics[1]["cmdp/cumulative_kl"] > 0


@pytest.mark.parametrize("method", ["gkd", "minillm", "kd"])
def test_methods_without_a_reward_share_as_well(same, method):
    learner, rows, prompts = prepared(same, algorithm=method, jsd_beta=1.0, teacher_cache_mb=0)
    for name, parameter in learner.student.named_parameters():
        if ".lora_B" in name:  # 0 until trained: a student that is its teacher has nothing to learn
            torch.nn.init.normal_(parameter, std=0.1)
    before = trained(learner.student)
    metrics = [learner.step(rows, prompts) for _ in range(2)]
    assert all(torch.tensor([m["loss"], m["grad_norm"]]).isfinite().all() for m in metrics)
    assert all(not torch.equal(before[name], value) for name, value in trained(learner.student).items())


def test_bf16_keeps_the_adapter_in_float32(same):
    learner, _, _ = prepared(same, mixed_precision="bf16")
    assert {p.dtype for p in trained(learner.student).values()} == {torch.float32}
    assert {p.dtype for p in frozen(learner.student).values()} == {torch.bfloat16}


def test_same_adapter_for_the_same_seed(same):
    one, again, other = (trained(prepared(same, seed=s)[0].student) for s in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["llama", "gpt2", "tied"])
def test_saved_student_is_merged_and_its_adapter_beside_it(family, pair, tmp_path):
    from cmdp_fast.trainer.models.saving import save_student

    model = tiny_model(tmp_path / "model", seed=3, family="gpt2" if family == "gpt2" else "llama")
    if family == "tied":
        tied = AutoModelForCausalLM.from_pretrained(model)
        tied.config.tie_word_embeddings = True
        tied.tie_weights()
        tied.save_pretrained(model)
    learner, rows, prompts = prepared({**pair, "student": model, "teacher": model})
    learner.step(rows, prompts)
    weights = {name: value.clone() for name, value in learner.student.state_dict().items()}
    save_student(learner.student, learner.collector.tokenizer, tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in learner.student.state_dict().items())

    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(merged) is type(learner.student) and not hasattr(merged, "peft_config")
    assert merged.generation_config.to_dict() == learner.student.generation_config.to_dict()
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, tmp_path / "student" / "adapter")
    with torch.no_grad():
        expected = learner.student(IDS).logits
        torch.testing.assert_close(merged.eval()(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(adapted.eval()(IDS).logits, expected)
        assert (learner.teacher(IDS).logits - expected).abs().max() > 1e-3


def test_run_and_evaluation_of_what_it_saved(same, tmp_path):
    (tmp_path / "mine.py").write_text("def short(completions, **_): return [-len(text) for text in completions]")
    options = arguments(same, tmp_path, lora_rank=4, lora_alpha=8, rewards=f"{tmp_path / 'mine.py'}:short")
    assert main([*options, "--gradient-checkpointing"]) == 0
    after = json.loads((tmp_path / "r" / "summary.json").read_text())["student_after"]
    command = arguments_for(EvaluateConfig, "evaluate", {**same, "student": str(tmp_path / "r" / "student")})
    assert main([*command, "--held-out", f"--json={tmp_path / 'figures.json'}"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["mean_cumulative_kl"] == pytest.approx(after["mean_cumulative_kl"], rel=1e-3)
    assert after["mean_cumulative_kl"] > 0


BAD_INPUT = {
    "rank": (dict(lora_rank=-1), "--lora-rank must not be negative"),
    "alpha": (dict(lora_rank=4, lora_alpha=0), "--lora-alpha must be a positive number"),
    "no such module": (dict(lora_rank=4, lora_target="query"), "--lora-target query: "),
    "the head": (dict(lora_rank=4, lora_target="lm_head"), "leave the embedding and the head out"),
    "the embedding": (dict(lora_rank=4, lora_target="embed_tokens"), "leave the embedding and the head out"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, same, tmp_path, capsys):
    changes, expected = BAD_INPUT[case]
    assert main(arguments(same, tmp_path / "runs", **changes)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error
    assert not (tmp_path / "runs").exists()


def test_without_peft(same, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    assert main(arguments(same, tmp_path / "runs", lora_rank=4)) == 2
    assert "[lora]'" in capsys.readouterr().err


def test_a_teacher_without_the_adapter_is_evaluated_once(same, tmp_path, capsys):
    """It and the student before are the same model, to the last bit of every completion."""
    words = arguments(same, tmp_path, lora_rank=2, steps=1)
    assert main(words) == 0
    assert "evaluating student_before" not in capsys.readouterr().out
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["student_before"] == summary["teacher"]
    assert main([*words, "--name=other", "--teacher-temperature=1"]) == 0
    assert "evaluating student_before" in capsys.readouterr().out
    apart = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert apart["student_before"] == apart["teacher"] == summary["teacher"]

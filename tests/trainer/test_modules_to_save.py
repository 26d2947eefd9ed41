"""Layers trained whole beside an adapter: a copy of the head, the gradient that it gets, and what is saved."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import assert_no_worse
from tiny_pair import arguments, learner_of, settings, tiny_model, untimed

import cmdp_fast as cf
from cmdp_fast.cli import main
from cmdp_fast.trainer.models.adapter import FrozenBase
from cmdp_fast.trainer.models.memory_estimate import estimate_memory
from cmdp_fast.trainer.models.saving import save_student

pytest.importorskip("peft")
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])


def short(completion_ids, **_) -> list[float]:
    """A reward that differs between completions: a student that is its teacher has nothing else to learn from."""
    return [-float(len(ids)) for ids in completion_ids]


@pytest.fixture(scope="module", params=["untied", "tied"])
def same(request, pair, tmp_path_factory) -> dict[str, str]:
    """A pair of one model, its head a layer of its own or the embedding."""
    folder = tiny_model(tmp_path_factory.mktemp("same") / "model", seed=3)
    if request.param == "tied":
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(folder)
    return {**pair, "student": folder, "teacher": folder}


def prepared(pair, **changes):
    return learner_of(settings(pair, **{"lora_rank": 4, "lora_modules_to_save": ("lm_head",), **changes}), short=short)


def test_copy_of_the_head_is_trained_and_the_teacher_keeps_the_original(same):
    learner, rows, prompts = prepared(same)
    original = AutoModelForCausalLM.from_pretrained(same["teacher"]).eval()
    before = {name: p.detach().clone() for name, p in learner.student.named_parameters()}
    first, second = learner.step(rows, prompts), learner.step(rows, prompts)
    assert isinstance(learner.teacher, FrozenBase)
    assert first["cmdp/cumulative_kl"] == 0.0 < second["cmdp/cumulative_kl"]
    moved = {name for name, p in learner.student.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name, p in learner.student.named_parameters() if p.requires_grad}
    assert "lm_head.modules_to_save.default.weight" in moved
    wrapper = learner.student.lm_head
    assert cf.head_of(learner.student).weight is wrapper.modules_to_save["default"].weight
    assert cf.head_of(learner.teacher).weight is wrapper.original_module.weight
    with torch.no_grad():
        logits = original(IDS).logits
        assert torch.equal(learner.teacher(IDS).logits, logits)
        halves = cf.head_of(learner.teacher).logits(cf.last_hidden_state(learner.teacher, IDS))
        assert torch.equal(halves, logits)
        halves = cf.head_of(learner.student).logits(cf.last_hidden_state(learner.student, IDS))
        assert torch.equal(halves, learner.student(IDS).logits), "the copy is on again after the teacher was asked"


def test_gradient_is_that_of_the_logits(same):
    """From hidden states and the head, as from logits that the model makes itself; both against float64."""
    learner, _, _ = prepared(same)
    for name, parameter in learner.student.named_parameters():
        if ".lora_B" in name or "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    weight = torch.randn(*IDS.shape, generator=torch.Generator().manual_seed(0))

    def gradients(model, by_halves: bool):
        if by_halves:
            hidden, teacher = cf.last_hidden_state(model, IDS), cf.last_hidden_state(learner.teacher, IDS)
            ours = cf.head_of(model), cf.head_of(learner.teacher)
            stats = cf.linear_token_stats(hidden, ours[0], teacher.detach(), ours[1], IDS)
        else:
            frozen = FrozenBase(model)
            with torch.no_grad():
                teacher = frozen(IDS).logits
            stats = cf.token_stats(model(IDS).logits, teacher, IDS)
        loss = (stats.reverse_kl * weight.to(stats.reverse_kl.dtype)).sum()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    ours, eager = gradients(learner.student, by_halves=True), gradients(learner.student, by_halves=False)
    exact = gradients(copy.deepcopy(learner.student).double(), by_halves=False)
    assert "lm_head.modules_to_save.default.weight" in ours and ours.keys() == exact.keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0
        assert_no_worse(gradient, eager[name], exact[name], name)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_saved_student_and_adapter_compute_what_was_trained(layer, precision, same, tmp_path):
    learner, rows, prompts = prepared(same, lora_modules_to_save=(layer,), mixed_precision=precision)
    learner.step(rows, prompts)
    save_student(learner.student, learner.collector.tokenizer, tmp_path)
    saved, about = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert saved.lm_head.weight is not saved.model.embed_tokens.weight and saved.dtype == torch.float32
    frozen = torch.bfloat16 if precision == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(same["student"], dtype=frozen)
    adapted = PeftModel.from_pretrained(base.float(), tmp_path / "student" / "adapter").eval()
    with torch.no_grad():
        exact = copy.deepcopy(learner.student).double()(IDS).logits
        eager = copy.deepcopy(learner.student).float()(IDS).logits
        assert_no_worse(saved.eval()(IDS).logits, eager, exact)
        assert_no_worse(adapted(IDS).logits, eager, exact)
        assert (learner.teacher(IDS).logits - eager).abs().max() > 1e-3


def test_run_goes_on_with_the_copy(same, tmp_path):
    (tmp_path / "mine.py").write_text("def short(completions, **_): return [-len(text) for text in completions]")
    options = dict(
        lora_rank=4, lora_modules_to_save="lm_head", rewards=f"{tmp_path / 'mine.py'}:short", lr_schedule="constant"
    )
    lines = []
    AcceleratorState._reset_state(reset_partial_state=True)  # or the first precision of the process would stay
    for name, steps in (("whole", 2), ("parts", 1)):
        command = arguments(same, tmp_path, name=name, steps=steps, checkpoint_every=1, **options)
        assert main(command) == 0
        if steps == 1:
            resumed = ["train", f"--resume={tmp_path / name}", "--steps=2", f"--rewards={options['rewards']}"]
            assert main(resumed) == 0
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines.append([untimed(json.loads(line)) for line in text.splitlines()])
    assert len(lines[0]) == 2 and lines[0] == lines[1]


def test_memory_counts_the_copy(same):
    with_copy, without = (
        estimate_memory(learner.config, learner.student, learner.teacher, 5)
        for learner in (prepared(same)[0], prepared(same, lora_modules_to_save=())[0])
    )
    size = cf.head_of(prepared(same)[0].student).weight.numel()
    assert with_copy.trained_parameters - without.trained_parameters == size
    assert with_copy.weights - without.weights == 4 * size
    assert with_copy.optimizer - without.optimizer == 8 * size


def test_head_of_a_peft_model_is_the_one_that_is_switched_on(same):
    base = AutoModelForCausalLM.from_pretrained(same["student"])
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    trained = base.lm_head.modules_to_save["default"]
    with torch.no_grad():
        trained.weight += 1.0
    for off in (False, True):
        if off:
            model.base_model.disable_adapter_layers()
        head = cf.head_of(model)
        assert head.weight is (base.lm_head.original_module if off else trained).weight
        with torch.no_grad():
            assert torch.equal(head.logits(cf.last_hidden_state(model, IDS)), model(IDS).logits)


BAD_INPUT = {
    "no adapter": (dict(lora_modules_to_save="lm_head"), "--lora-modules-to-save is for an adapter"),
    "no such layer": (dict(lora_rank=4, lora_modules_to_save="nothing"), "no module of the name nothing"),
    "a block": (dict(lora_rank=4, lora_modules_to_save="mlp"), "mlp is not a single layer"),
    "adapted": (dict(lora_rank=4, lora_modules_to_save="q_proj", lora_target="q_proj"), "q_proj is not a single layer"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, pair, tmp_path, capsys):
    changes, expected = BAD_INPUT[case]
    same = {**pair, "teacher": pair["student"]}
    assert main(arguments(same, tmp_path / "runs", **changes)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error
    assert not (tmp_path / "runs").exists()


def test_model_that_cannot_be_untied_is_refused(pair, tmp_path, capsys, monkeypatch):
    from cmdp_fast.trainer.models import adapter

    monkeypatch.setattr(adapter, "_is_tied", lambda model: True)
    same = {**pair, "teacher": pair["student"]}
    assert main(arguments(same, tmp_path / "runs", lora_rank=4, lora_modules_to_save="lm_head")) == 2
    assert "cannot be saved with two of them" in capsys.readouterr().err

"""Prompts of different length in one batch: every model reads each as it would alone, however it counts positions."""

from __future__ import annotations

import math
import pickle

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

import torch
import trl_pair
from datasets import Dataset
from helpers import assert_no_worse
from tiny_pair import tiny_model
from transformers import AutoTokenizer
from trl_pair import distillation, grpo, student

import cmdp_fast as cf
from cmdp_fast.errors import InputError

FAMILIES = ("gpt2", "opt", "llama")
PROMPTS = ["1=", "1+2+3+4=", "1+2=", "1+2+3="]
INFINITE = {"budget": math.inf, "discrepancy_weight": 0.0}  # TRL's loss, untouched
CASES = {
    "direct": (grpo, {}),
    "TRL's loss": (grpo, INFINITE),
    "distillation": (distillation, {"beta": 1.0, "num_generations": 4}),
    "distillation under a budget": (distillation, {"beta": 0.0, "num_generations": 4, "budget": 2.0}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A student and a teacher of two layers of each family."""
    root = tmp_path_factory.mktemp("families")
    return {
        family: {
            "student": tiny_model(root / f"{family}-student", seed=1, family=family),
            "teacher": tiny_model(root / f"{family}-teacher", seed=2, layers=2, family=family),
        }
        for family in FAMILIES
    }


def make(kind, pair, folder, **changes):
    """A trainer of all PROMPTS, four completions each."""
    arguments = {"train_dataset": Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])}
    arguments |= changes.pop("trainer", {})
    changes = {"per_device_train_batch_size": 16, "disable_dropout": True, **changes}
    return kind(pair, folder, trainer=arguments, **changes)


def one_batch(trainer):
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # OPT's, which TRL's disable_dropout does not reach
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert sorted(batch["prompt_mask"].sum(1).tolist()) == [length for length in (2, 4, 6, 8) for _ in range(4)]
    return batch


def alone(model, batch, dtype=torch.float32):
    """The logits [B, T, V] of completions that are read one by one, without any padding."""
    model, count = model.to(dtype).eval(), batch["completion_mask"].sum(1)
    rows = []
    for row, length in enumerate(count.tolist()):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, batch["completion_ids"][row, :length]])[None]
        rows.append(model(ids).logits[0, -length - 1 : -1])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_and_the_loss_are_those_of_prompts_read_alone(pairs, tmp_path, family, case):
    kind, changes = CASES[case]
    trainer = make(kind, pairs[family], tmp_path, **changes)
    batch = one_batch(trainer)
    mask, tokens = batch["completion_mask"].bool(), batch["completion_ids"]
    copies = [student(pairs[family][role]) for role in ("student", "teacher")]
    with torch.no_grad():
        exact, eager = (
            cf.token_stats(*(alone(copy, batch, dtype) for copy in copies), tokens, mask=mask, backend="torch")
            for dtype in (torch.float64, torch.float32)
        )
        models = trainer.model, trainer.teacher_model
        outputs = tuple(trainer.scoring.outputs(model.eval(), batch) for model in models)
        ours = trainer.scoring.token_stats(models, outputs, tokens, mask)
    for name in ("logprob", "teacher_logprob", "reverse_kl", "forward_kl"):
        assert_no_worse(getattr(ours, name), getattr(eager, name), getattr(exact, name), name)
    if "cmdp/cumulative_kl" in trainer._metrics["train"]:
        expected = exact.reverse_kl.sum(1).mean().item()
        assert trainer._metrics["train"]["cmdp/cumulative_kl"][-1] == pytest.approx(expected, rel=1e-5)

    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=mask.sum()).backward()
    copy = copies[0].float()
    logits = alone(copy, batch).log_softmax(-1)
    other = alone(copies[1].float(), batch).log_softmax(-1).detach()
    reverse, forward = (logits.exp() * (logits - other)).sum(-1), (other.exp() * (other - logits)).sum(-1)
    divergence = forward if changes.get("beta") == 0.0 else reverse
    logprob = logits.gather(-1, tokens[..., None])[..., 0]
    direct = batch.get("direct", float(kind is distillation))
    per_token = direct * divergence - batch.get("advantages", torch.zeros(1, 1)) * logprob
    (torch.where(mask, per_token, 0.0).sum() / mask.sum()).backward()
    for (name, parameter), expected in zip(trainer.model.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=2e-6, rtol=2e-4, msg=name)


def test_trls_own_log_probabilities_and_those_of_its_reference_model(pairs, tmp_path):
    trainer = make(grpo, pairs["gpt2"], tmp_path, beta=0.1, num_iterations=2, **INFINITE)
    batch = one_batch(trainer)
    with torch.no_grad():
        logits = alone(student(pairs["gpt2"]["student"]), batch).log_softmax(-1)
    mask = batch["completion_mask"].bool()
    expected = torch.where(mask, logits.gather(-1, batch["completion_ids"][..., None])[..., 0], 0.0)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(torch.where(mask, batch[name], 0.0), expected, atol=2e-5, rtol=2e-5)


def test_the_reference_model_of_a_student_that_an_earlier_trainer_had(pairs, tmp_path, monkeypatch):
    """Its hooks were there already, so the reference model got none: log-probabilities were off by up to 3.2 nats."""
    model = make(grpo, pairs["gpt2"], tmp_path / "earlier", **INFINITE).model
    monkeypatch.setattr(trl_pair, "student", lambda folder: model if "student" in folder else student(folder))
    trainer = make(grpo, pairs["gpt2"], tmp_path, beta=0.1, **INFINITE)
    assert trainer.model is model
    batch = one_batch(trainer)
    with torch.no_grad():
        logits = alone(student(pairs["gpt2"]["student"]), batch).log_softmax(-1)
    mask = batch["completion_mask"].bool()
    expected = torch.where(mask, logits.gather(-1, batch["completion_ids"][..., None])[..., 0], 0.0)
    torch.testing.assert_close(torch.where(mask, batch["ref_per_token_logps"], 0.0), expected, atol=2e-5, rtol=2e-5)


def test_models_that_need_no_positions_are_as_they_were(pairs, tmp_path):
    for family in ("llama", "opt"):
        trainer = make(grpo, pairs[family], tmp_path, beta=0.1)
        batch = one_batch(trainer)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        for role, model in (("student", trainer.model), ("student", trainer.ref_model)):
            assert not any(module._forward_pre_hooks for module in model.modules())
            hidden = [cf.last_hidden_state(m, ids, attention) for m in (model, student(pairs[family][role]))]
            assert torch.equal(*hidden)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_needs_is_measured_in_any_dtype(pairs, tmp_path, family, dtype):
    teacher = student(pairs[family]["teacher"]).to(dtype)
    make(grpo, pairs[family], tmp_path, trainer={"teacher_model": teacher})
    assert any(module._forward_pre_hooks for module in teacher.modules()) == (family == "gpt2")


def test_a_model_with_next_to_no_positions_is_measured(pairs, tmp_path):
    teacher = student(tiny_model(tmp_path / "short", seed=3, family="gpt2", positions=7))
    make(grpo, pairs["llama"], tmp_path, trainer={"teacher_model": teacher})
    assert any(module._forward_pre_hooks for module in teacher.modules())


def test_an_adapter_with_recomputed_layers(pairs, tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = make(
        grpo, pairs["gpt2"], tmp_path, gradient_checkpointing=True, beta=0.1, trainer={"peft_config": adapter}
    )
    batch = one_batch(trainer)
    with torch.no_grad():
        logits = [alone(student(pairs["gpt2"][role]), batch) for role in ("student", "teacher")]
    mask = batch["completion_mask"].bool()
    expected = cf.token_stats(*logits, batch["completion_ids"], mask=mask)
    total = expected.reverse_kl.sum(1).mean().item()
    assert trainer._metrics["train"]["cmdp/cumulative_kl"][-1] == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(
        torch.where(mask, batch["ref_per_token_logps"], 0.0), expected.logprob, atol=2e-5, rtol=2e-5
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_virtual_tokens_stand_before_the_padding_and_next_to_the_prompt(pairs, tmp_path, family, kind):
    adapter = getattr(pytest.importorskip("peft"), kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make(grpo, pairs[family], tmp_path, trainer={"peft_config": adapter})
    batch = one_batch(trainer)
    length = batch["completion_mask"].shape[1]
    with torch.no_grad():
        together = trainer.scoring.outputs(trainer.model.eval(), batch)
        for row, padding in enumerate((1 - batch["prompt_mask"]).sum(1).tolist()):
            one = {name: batch[name][row : row + 1] for name in ("completion_ids", "completion_mask")}
            one |= {name: batch[name][row : row + 1, padding:] for name in ("prompt_ids", "prompt_mask")}
            real = batch["completion_mask"][row].bool()
            hidden = trainer.scoring.outputs(trainer.model, one)[0]
            assert hidden.shape[0] == length
            torch.testing.assert_close(together[row][real], hidden[real], atol=1e-5, rtol=1e-5)


def test_sampling_caches_and_files_are_as_before(pairs, tmp_path):
    folder = pairs["gpt2"]["student"]
    trainer = make(grpo, pairs["gpt2"], tmp_path / "trainer")
    plain, model = student(folder).eval(), trainer.model.eval()
    assert any(module._forward_pre_hooks for module in model.modules())
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    sampled = [m.generate(**given, max_new_tokens=6, do_sample=False) for m in (plain, model)]
    assert torch.equal(*sampled)

    with torch.no_grad():  # the mask has the cache's columns, too
        start = model(**{name: value[:, :-1] for name, value in given.items()}, use_cache=True)
        last = model(given["input_ids"][:, -1:], attention_mask=given["attention_mask"], past_key_values=start[1])
        whole = model(**given).logits[:, -1:]
        positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        expected = plain(**given, position_ids=positions).logits[:, -1:]
    torch.testing.assert_close(last.logits, expected)
    assert torch.equal(whole, expected)

    again = pickle.loads(pickle.dumps(trainer.teacher_model))
    assert torch.equal(again(**given).logits, trainer.teacher_model(**given).logits)
    trainer.save_model(str(tmp_path / "saved"))
    saved = student(str(tmp_path / "saved"))
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), plain.parameters(), strict=True))


def test_models_that_positions_do_not_help_are_refused(pairs, tmp_path):
    recurrent = tiny_model(tmp_path / "rwkv", seed=3, layers=2, family="rwkv")
    with pytest.raises(InputError, match=r"^teacher_model cannot be used: RwkvForCausalLM .* takes no position_ids; "):
        make(grpo, pairs["llama"], tmp_path, trainer={"teacher_model": student(recurrent)})
    with pytest.raises(InputError, match=r"^the student cannot be used: RwkvForCausalLM "):
        make(distillation, {**pairs["llama"], "student": recurrent}, tmp_path)
    odd = student(pairs["gpt2"]["teacher"])
    table = odd.transformer.wpe
    table.forward = lambda ids: table.weight[: ids.shape[-1]]
    with pytest.raises(InputError, match=r"^teacher_model cannot be used: GPT2LMHeadModel .* position_ids do not help"):
        make(grpo, pairs["gpt2"], tmp_path, trainer={"teacher_model": odd})
    assert not any(module._forward_pre_hooks for module in odd.modules())


@pytest.mark.parametrize("kind", [grpo, distillation])
def test_more_tokens_than_positions_are_refused(pairs, tmp_path, kind):
    short = tiny_model(tmp_path / "short", seed=3, family="gpt2", positions=13)
    given = {"teacher_model": student(short)}
    with pytest.raises(InputError, match=r"^max_completion_length=13 leaves .* teacher_model has positions for 13 tok"):
        make(kind, pairs["llama"], tmp_path, max_completion_length=13, trainer=given)
    trainer = make(kind, pairs["llama"], tmp_path, trainer=given, max_steps=1, num_generations=4)
    trainer._generate_single_turn = lambda prompts, *_: [[3] * 6 for _ in prompts]
    if kind is grpo:
        trainer.rollout_func = lambda prompts, _: {
            "prompt_ids": AutoTokenizer.from_pretrained(short)(prompts)["input_ids"],
            "completion_ids": [[3] * 6 for _ in prompts],
            "logprobs": None,
        }
    with pytest.raises(InputError, match=r"^a prompt and its completion have 14 tokens, but teacher_model has "):
        trainer.train()

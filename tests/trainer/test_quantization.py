"""A teacher with quantised weights: what it costs is said, and it is the teacher that the steps compare with."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from tiny_pair import arguments, learner_of, settings
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cmdp_fast as cf
from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.models.quantization import check_quantization, effect, read_prompts

KINDS = ("torchao-int8", "bitsandbytes-8bit", "bitsandbytes-4bit")


def with_package(kind: str) -> str:
    if importlib.util.find_spec(kind.partition("-")[0]) is None:
        pytest.skip(f"{kind.partition('-')[0]} is not installed: the extra quantization brings it")
    return kind


def wide_teacher(pair: dict[str, str], folder: Path) -> str:
    """As bitsandbytes wants it on a CPU: rows of whole blocks of 64 numbers."""
    config = AutoConfig.from_pretrained(pair["teacher"], hidden_size=64, intermediate_size=128, head_dim=32)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pair["teacher"]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_how_far_a_quantised_teacher_is_from_the_full_one(kind, pair, tmp_path, capsys, monkeypatch):
    """The line has the divergence of the two on prompts; the teacher of the steps is the quantised one."""
    with_package(kind)
    monkeypatch.setenv("CI", "")  # whose quiet would swallow the line
    wide = {**pair, "teacher": wide_teacher(pair, tmp_path / "teacher")}
    assert main(arguments(wide, tmp_path, teacher_quantization=kind)) == 0
    said = capsys.readouterr()
    [line] = [each for each in (said.out + said.err).splitlines() if "quantised teacher is" in each]
    assert 0 < float(line.partition("teacher is ")[2].partition(" nats")[0]) < 0.5
    learner, rows, prompts = learner_of(settings(wide, teacher_quantization=kind))
    layer = learner.teacher.model.layers[0].mlp.up_proj
    assert type(layer.weight) is not torch.nn.Parameter or layer.weight.dtype not in (torch.float32, torch.bfloat16)
    assert math.isfinite(learner.step(rows, prompts)["cmdp/mean_cumulative"])


def test_the_effect_is_the_divergence_of_the_two():
    """Held against logits, in float64."""
    one, other, prompts = tiny("llama", seed=1), tiny("llama", seed=2), [[3, 4, 5, 6], [7, 8], [9] * 200]
    line = effect(read_prompts(one, prompts), read_prompts(other, prompts))
    logits = [
        torch.cat([model(torch.tensor([ids[-30:]])).logits[0].double().detach() for ids in prompts[:2]])
        for model in (one, other)
    ]
    p, q = (each.log_softmax(-1) for each in logits)
    some = effect(read_prompts(one, prompts[:2]), read_prompts(other, prompts[:2]))
    assert f"is {float((p.exp() * (p - q)).sum(-1).mean()):.2g} nats" in some
    assert "6 tokens of prompts" in some and "134 tokens of prompts" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_device": "offload"}, "without --teacher-device offload"),
        ({"lora_rank": 4, "teacher": "student"}, "shares its weights"),
    ],
)
def test_what_cannot_be_quantised_is_refused(changes, message, pair, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    changes = {name: pair.get(value, value) if name == "teacher" else value for name, value in changes.items()}
    config = settings(
        {**pair, **{n: v for n, v in changes.items() if n == "teacher"}},
        **{n: v for n, v in changes.items() if n != "teacher"},
        teacher_quantization="torchao-int8",
    )
    with pytest.raises(InputError, match=message):
        check_quantization(config)


def test_a_package_that_is_missing_is_named(pair, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs bitsandbytes, of the extra"):
        check_quantization(settings(pair, teacher_quantization="bitsandbytes-4bit"))


def test_a_reading_is_of_the_model():
    model = tiny("gemma2", seed=1)
    reading = read_prompts(model, [[3, 4, 5]])
    torch.testing.assert_close(reading.head.logits(reading.hidden)[None], model(torch.tensor([[3, 4, 5]])).logits)
    assert isinstance(reading.head, cf.Head) and reading.tokens.tolist() == [3, 4, 5]

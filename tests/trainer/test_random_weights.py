"""--dry-run --random-weights: the dry run of models whose weights are not here."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_pair import arguments, settings, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cmdp_fast as cf
from cmdp_fast.cli import main
from cmdp_fast.digest import read_sealed, write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.comparison.plan import SeededRun, Variant, summary_of
from cmdp_fast.trainer.dry_run import dry_run
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.models.random_weights import RandomCausalLM
from cmdp_fast.trainer.parse import parse
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.settings.recorded import recorded
from cmdp_fast.trainer.settings.values import typed

RANDOM = {"dry_run": True, "random_weights": True}


def without_weights(pair: dict[str, str], folder: Path) -> dict[str, str]:
    """The same pair as a hub has it beside its weights."""
    for role in ("student", "teacher"):
        shutil.copytree(pair[role], folder / role, ignore=shutil.ignore_patterns("*.safetensors"))
    return {**pair, **{role: str(folder / role) for role in ("student", "teacher")}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": "bf16", "baseline": "gae"},
        {"lora_rank": 4, "mixed_precision": "bf16"},
        {"logits": "full", "gradient_checkpointing": True},
        {"teacher_device": "offload"},
    ],
)
def test_memory_is_that_of_the_real_weights(changes, pair, tmp_path):
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    config = settings(pair, **changes)
    bare = settings(without_weights(pair, tmp_path), **changes, **RANDOM)
    assert dry_run(bare) == dry_run(config)
    with pytest.raises(InputError, match=r"--student .*: no .*in this folder"):
        dry_run(dataclasses.replace(bare, random_weights=False))


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2", "mixtral", "falcon"])
def test_a_model_is_the_real_one_but_for_its_numbers(family, pair, tmp_path):
    folder = tiny_model(tmp_path, seed=1, layers=2, family=family)
    made = RandomCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.bfloat16)
    real = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def shapes(model):
        return {name: (p.shape, p.dtype, p.requires_grad, p.stride()) for name, p in model.named_parameters()}

    assert type(made) is type(real) and shapes(made) == shapes(real)  # a weight that is two stands twice among these
    assert dict(made.named_buffers()).keys() == dict(real.named_buffers()).keys()
    for (name, buffer), (_, own) in zip(made.named_buffers(), real.named_buffers(), strict=True):
        assert torch.equal(buffer, own), name
    assert made.generation_config.to_dict() == real.generation_config.to_dict()
    assert cf.head_of(made)[2:] == cf.head_of(real)[2:]
    assert made(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    dry_run(settings({**pair, "student": folder}, **RANDOM))


def test_tied_weights_are_one(tmp_path):
    AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    ).save_pretrained(tmp_path)
    for tied in (True, False):
        values = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": tied}
        (tmp_path / "config.json").write_text(json.dumps(values))
        model = RandomCausalLM.from_pretrained(str(tmp_path), trust_remote_code=False, dtype=torch.float32)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_layers_take_no_memory_of_their_own(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 5000}
    AutoConfig.for_model("llama", num_hidden_layers=30, **sizes).save_pretrained(tmp_path)
    model = RandomCausalLM.from_pretrained(str(tmp_path), trust_remote_code=False, dtype=torch.bfloat16)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) < sum(p.nbytes for p in model.parameters()) / 5
    first, second = (model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    assert not torch.equal(first, second) and len(first.unique(dim=0)) == len(first)
    assert all((m.weight == 1).all() for m in model.modules() if type(m).__name__ == "LlamaRMSNorm")


def test_ends_are_those_of_the_generation_settings(pair, tmp_path):
    bare = without_weights(pair, tmp_path)
    path = tmp_path / "teacher" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 5]}))
    _, teacher, _ = load_pair(settings(bare, **RANDOM), [], Report())
    assert set(teacher.generation_config.eos_token_id) == {2, 5}


def test_what_is_no_setting_of_the_weights_is_still_found(pair, tmp_path, capsys):
    bare = without_weights(pair, tmp_path)
    for changes, expected in (
        (dict(max_new_tokens=62), "do not fit the 64 positions"),
        (dict(teacher="./no/such/model"), "--teacher ./no/such/model"),
        (dict(lora_rank=2, lora_target="no_such_module"), "--lora-target no_such_module"),
    ):
        command = arguments(bare, tmp_path / "runs", **changes)
        assert main([*command, "--dry-run", "--random-weights"]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(("family", "changes"), [("rwkv", {}), ("bloom", {"padding_free": True})])
def test_a_model_that_would_be_misled_is_still_refused(family, changes, pair, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 17, "bos_token_id": 0, "eos_token_id": 2}
    sizes |= {"attention_hidden_size": 16, "intermediate_size": 32} if family == "rwkv" else {"n_head": 2}
    AutoConfig.for_model(family, **sizes).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(pair["student"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the student cannot be used"):
        dry_run(settings({**pair, "student": str(tmp_path)}, **changes, **RANDOM))


def test_it_is_said_what_was_not_checked(pair, tmp_path, capsys):
    command = [*arguments(pair, tmp_path / "runs"), "--dry-run"]
    assert main(command) == 0
    assert "--random-weights" not in capsys.readouterr().out
    assert main([*command, "--random-weights"]) == 0
    assert "--random-weights: not checked is that the models' files hold all weights" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


ROUTED = {"teacher": "routed:a=T,b=builtin:smollm2", "teacher_column": "note"}


@pytest.mark.parametrize(
    ("words", "changes", "expected"),
    [
        ("", {}, "--random-weights is for --dry-run alone"),
        ("--no-dry-run", {}, "--random-weights is for --dry-run alone"),
        ("--dry-run", {"teacher_quantization": "torchao-int8"}, "--teacher-quantization torchao-int8 quantises"),
        ("--dry-run", {"student": "builtin:arithmetic-student"}, "builtin:arithmetic-student is made on this machine"),
        ("--dry-run", {"teacher": "builtin:smollm2"}, "builtin:smollm2 is made on this machine"),
        ("--dry-run", ROUTED, "builtin:smollm2 is made on this machine"),
    ],
)
def test_refused_before_anything_is_read(words, changes, expected, pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cmdp_fast.trainer.material.load_problems", None)
    assert main([*arguments({**pair, **changes}, tmp_path), "--random-weights", *words.split()]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["evaluate", "cache-teacher"])
def test_for_a_training_alone(command, pair, tmp_path, capsys):
    words = [command, f"--student={pair['student']}", f"--teacher={pair['teacher']}", "--random-weights"]
    if command == "cache-teacher":
        words.append(f"--output={tmp_path / 'said'}")
    assert main(words) == 2
    assert "--random-weights is for --dry-run" in capsys.readouterr().err


def test_quantised_weights_would_be_of_another_size(pair, tmp_path):
    bare = without_weights(pair, tmp_path)
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=r"the weights of --teacher .* are quantised \(gptq\)"):
        dry_run(settings(bare, **RANDOM))


def test_no_run_knows_of_it(pair, tmp_path, capsys):
    """Files of a run from before there was the setting are those of today: resumed, and in a comparison's table."""
    command = arguments(pair, tmp_path, steps=1, checkpoint_every=1, lr_schedule="constant")
    assert main(command) == 0
    began = read_sealed(tmp_path / "r" / "config.json")
    assert "dry_run" in began and "random_weights" not in began
    config = parse(command[1:])
    assert "random_weights" not in recorded(config)
    run = SeededRun(Variant("cmdp", "cmdp", {}, config), config)
    assert summary_of(run) is not None
    assert main(["train", f"--resume={tmp_path / 'r'}", "--steps=2"]) == 0
    capsys.readouterr()
    assert main(["train", f"--resume={tmp_path / 'r'}", "--dry-run", "--random-weights"]) == 2
    assert "goes on with the weights that the run began with" in capsys.readouterr().err
    write_sealed(tmp_path / "r" / "config.json", {**began, "random_weights": True})
    assert main(["train", f"--resume={tmp_path / 'r'}", "--steps=3"]) == 2
    assert "--random-weights is for --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["recipe", "method"])
def test_a_file_cannot_ask_for_it(option, tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text("dry_run = true\nrandom_weights = true\n")
    assert main(["train", f"--{option}={path}"]) == 2
    assert f"random_weights is for the command line, a {option} cannot set it" in capsys.readouterr().err
    assert typed({"random_weights": True}, "") == {"random_weights": True}

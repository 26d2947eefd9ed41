"""The recipes for models of the hub, run for two steps with tiny random models of the same architecture."""

from __future__ import annotations

import json
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest
import recipe_models
from tiny_pair import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MllamaConfig, MllamaForConditionalGeneration

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.dry_run import readable
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.settings.recipe import read_recipe

PARAMETERS = {  # of student and teacher, the real ones
    "qwen2.5-24gb": (494_032_768, 3_085_938_688),
    "qwen2.5-math": (1_543_714_304, 7_615_616_512),
}


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory) -> str:
    """Ten problems whose answers end as those of GSM8K do."""
    path = tmp_path_factory.mktemp("gsm8k") / "problems.jsonl"
    rows = [{"question": f"{i}+{9 - i}", "answer": f"{i}+{9 - i} = <<{i}+{9 - i}=9>>9.\n#### 9"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def vision_model(folder, tokenizer_of: str) -> str:
    """A random model of images and text, in the layout of the hub's Llama-3.2-11B-Vision."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = MllamaConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "cross_attention_layers": [1],
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 14,
            "patch_size": 14,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
    )
    MllamaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe_text(name: str) -> str:
    return (files("cmdp_fast.trainer") / "recipes" / f"{name}.toml").read_text()


def run(recipe: str, student: str, teacher: str, dataset: str, output) -> tuple[dict, list[dict]]:
    overrides = {
        "student": student,
        "teacher": teacher,
        "mixed_precision": "no",
        "dataset": dataset,
        "dataset_config": "",
        "eval_split": "",
        "holdout_fraction": 0.3,
        "steps": 2,
        "prompts_per_step": 2,
        "num_generations": 3,
        "max_new_tokens": 6,
        "eval_prompts": 2,
        "budget": 1.0,  # so little that it is overrun, or there would be no gradient
        "output_dir": output,
    }
    assert main(["train", f"--recipe={recipe}", *(f"--{k.replace('_', '-')}={v}" for k, v in overrides.items())]) == 0
    lines = [json.loads(line) for line in (output / recipe / "metrics.jsonl").read_text().splitlines()]
    return json.loads((output / recipe / "summary.json").read_text()), lines


def check(summary: dict, lines: list[dict]) -> None:
    steps = [line for line in lines if "rewards/math_verify/mean" in line]
    assert len(steps) == 2 and summary["steps"] == 2
    for line in steps:
        assert line["cmdp/cumulative_kl"] > 0 and line["grad_norm"] > 0
    assert summary["teacher"]["mean_cumulative_kl"] == pytest.approx(0, abs=1e-5)
    assert summary["student_before"]["mean_cumulative_kl"] > 0


def test_qwen_math_in_small(gsm8k, tmp_path):
    """As with the real ones, the teacher's logits are wider than the student's, and both than the tokenizer."""
    student = tiny_model(tmp_path / "s", seed=1, family="qwen2", spare=2, positions=256)
    teacher = tiny_model(tmp_path / "t", seed=2, family="qwen2", spare=5, positions=256, layers=2)
    check(*run("qwen2.5-math", student, teacher, gsm8k, tmp_path / "runs"))


def test_qwen_of_a_chat_in_small(gsm8k, tmp_path):
    folders = []
    for seed in (1, 2):
        folders.append(tiny_model(tmp_path / str(seed), seed=seed, family="qwen2", spare=300, positions=512))
        recipe_models.chat_tokenizer().save_pretrained(folders[-1])
    check(*run("qwen2.5-24gb", *folders, gsm8k, tmp_path / "runs"))


def test_llama_in_small(gsm8k, tmp_path):
    student = tiny_model(tmp_path / "s", seed=1, positions=256)
    check(*run("llama-3.2", student, vision_model(tmp_path / "t", student), gsm8k, tmp_path / "runs"))


def test_language_model_of_a_vision_model(tmp_path):
    """What is loaded as a causal language model computes what the whole model does for a text."""
    import torch

    student = tiny_model(tmp_path / "s", seed=1, positions=256)
    folder = vision_model(tmp_path / "t", student)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        whole = MllamaForConditionalGeneration.from_pretrained(folder).eval()(input_ids=ids).logits
        _, teacher, _ = load_pair(TrainConfig(student=student, teacher=folder), [], Report())
        assert torch.equal(teacher(input_ids=ids).logits, whole)


@pytest.mark.parametrize("name", ["qwen2.5-math", "llama-3.2", "qwen2.5-24gb"])
def test_recipe_is_valid_and_names_its_run(name):
    recipe = read_recipe(name)
    recipe.validate()
    assert recipe.run_name == name


@pytest.mark.parametrize("name", ["qwen2.5-math", pytest.param("llama-3.2", marks=pytest.mark.slow), "qwen2.5-24gb"])
def test_memory_in_the_head_is_that_of_a_dry_run(name):
    of_this_project()
    missing = [
        line
        for line in recipe_models.table(*recipe_models.memory_of(name))
        if line not in recipe_text(name).splitlines()
    ]
    assert not missing, "`python tests/support/recipe_models.py` prints the lines"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"), [("qwen2.5-24gb", {}), ("qwen2.5-24gb", recipe_models.ADAPTER), ("qwen2.5-math", {})]
)
def test_a_dry_run_without_weights_has_the_memory_in_the_head(name, changes, tmp_path):
    """Of models of the real shapes, in 3 and 7 GB."""
    of_this_project()
    if changes:
        pytest.importorskip("peft")
    config, memory = recipe_models.dry_run_of(name, tmp_path, changes)
    student = memory.parameters - (memory.trained_parameters if changes else 0)
    assert (student, memory.teacher_parameters) == PARAMETERS[name]
    lines, table = recipe_text(name).splitlines(), recipe_models.table(config, memory)
    assert any(lines[i : i + len(table)] == table for i in range(len(lines)))
    if name == "qwen2.5-24gb":
        assert max(memory.rollout, memory.update) < 19 * 2**30  # of 24


def test_the_adapters_line_in_the_head_is_the_one_that_was_computed():
    words = (f"--{name.replace('_', '-')} {value}" for name, value in recipe_models.ADAPTER.items())
    text = recipe_text("qwen2.5-24gb").replace("1e-4", str(1e-4))
    assert f"#   cmdp-fast train --recipe qwen2.5-24gb {' '.join(words)}" in text.splitlines()


@pytest.mark.slow
def test_memory_on_eight_is_that_in_the_head():
    of_this_project()
    _, each = recipe_models.memory_of("qwen2.5-math", processes=8)
    assert f"# Each of eight processes holds all of the models: {readable(each.update)}." in recipe_text("qwen2.5-math")
    _, memory = recipe_models.memory_of("llama-3.2")
    spread = memory.weights + memory.gradients + (memory.optimizer or 0) + memory.teacher_weights
    assert f"are {readable(spread // 8)} together on each" in recipe_text("llama-3.2")


def of_this_project() -> None:
    """Skips where other versions keep other tensors than those of constraints.txt."""
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    pins = [line.split(";")[0].strip() for line in lines]
    for name in ("torch", "transformers"):
        if f"{name}=={metadata.version(name).split('+')[0]}" not in pins:
            pytest.skip(f"the heads are computed with the {name} of constraints.txt")


def test_weights_that_are_missing_are_not_made_up(pair, tmp_path):
    """transformers would fill them with random numbers, and say so where nobody looks."""
    model = AutoModelForCausalLM.from_pretrained(pair["student"])
    state = model.state_dict()
    del state["model.layers.0.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "s", state_dict=state)
    AutoTokenizer.from_pretrained(pair["student"]).save_pretrained(tmp_path / "s")
    config = TrainConfig(**{**pair, "student": str(tmp_path / "s")})
    with pytest.raises(InputError, match=r"--student .* lacks 1 of the weights .*up_proj"):
        load_pair(config, [], Report())

"""Settings that a training would not read are refused where they were asked for, and only there."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace

import pytest

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.cache_teacher import CacheConfig, parse_cache
from cmdp_fast.trainer.command_line.options import sections_of
from cmdp_fast.trainer.evaluate_student import EvaluateConfig, _check_method, parse_evaluate
from cmdp_fast.trainer.parse import parse
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.settings.unread import READERS, check_read, warnings_of

OF_PPO = "it is for --algorithm ppo"
UNREAD = {
    "--gae-lambda 0.9": f"{OF_PPO} or kl_loss with --baseline gae",
    "--method sft --baseline gae": OF_PPO,
    "--method minillm --gamma 0.9": OF_PPO,
    "--method gkd --clip-low 0.1": "it is for --algorithm ppo or kl_loss or minillm",
    "--method kd --teacher-mix 0.5": "it is for --algorithm minillm",
    "--jsd-beta 0.1": "it is for --cost jsd and --algorithm gkd",
    "--method lagrangian --penalty 2": f"{OF_PPO} with --kind cmdp or saute or worst_case",
    "--method pid --discrepancy-weight 2": f"{OF_PPO} with --kind cmdp or hinge",
    "--method hinge --coefficient 0.3": f"{OF_PPO} or kl_loss with --kind lagrangian or pid or barrier",
    "--pid-gains 1 1 1": f"{OF_PPO} with --kind pid",
    "--method kl_loss --penalty 2": f"{OF_PPO} with --kind cmdp or saute or worst_case",
    "--method sft --penalty 2": f"{OF_PPO} with --kind cmdp or saute or worst_case",
    "--method kl_reward --kl-loss-correction": "it is for --algorithm kl_loss",
    "--budget-start 5": "it is for --budget-steps",
    "--lora-target q_proj": "it is for --lora-rank",
    "--sampler-correction off": (
        "it is for --rollout with --algorithm ppo or kl_loss or gkd or minillm (at --teacher-mix 0)"
    ),
    "--method minillm --rollout a.py:f --sampler-correction token": "it is for --rollout with --algorithm ppo",
    "--method kd --rollout a.py:f --sampler-clip 3": "it is for --rollout with --algorithm ppo or kl_loss or gkd",
    "--rollout a.py:f --sampler-correction off --sampler-clip 3": "it is for --rollout with --algorithm ppo or kl_loss",
    "--prompt-column question": "it is for --dataset",
    "--dataset-config main": "it is for a --dataset with configurations",
    "--task= --dataset a.jsonl --task-size 9": "it is for --task",
    "--rewards a.py:f --answer-pattern (x)": "it is for the --rewards exact_answer, brevity",
    "--judge-timeout 9": "it is for the --rewards math_verify and reasoning_gym",
    "--unisolated-judges": "it is for the --rewards reasoning_gym",
}


@pytest.mark.parametrize("words", UNREAD)
def test_what_nothing_reads_is_refused(words):
    with pytest.raises(InputError, match=f"would have no effect: {re.escape(UNREAD[words])}"):
        parse(words.split())


READ = (
    *("--baseline gae --gae-lambda 0.9", "--method gkd --jsd-beta 0.1", "--cost jsd --jsd-beta 0.1"),
    *(
        "--method minillm --teacher-mix 0.5 --clip-low 0.1",
        "--method saute --penalty 2",
        "--lora-rank 4 --lora-alpha 8",
    ),
    *("--budget-start 5 --budget-steps 3", "--eval-dataset a.jsonl --prompt-column question --max-rows 3"),
    "--task= --dataset=a --dataset-config main --eval-split test --answer-column solution",
    "--method sft --mask-truncated-completions --teacher-temperature 0.5 --accuracy-reward exact_answer",
    "--rollout a.py:f --sampler-correction sequence --sampler-clip 3",
    "--method gkd --rollout a.py:f --sampler-correction token",
    "--method minillm --teacher-mix 0 --rollout a.py:f --sampler-clip 3",
    "--method kl_loss --baseline gae --gae-lambda 0.9 --coefficient 0.1 --cost-clamp 10 --gamma 0.9",
    "--method kl_reward --coefficient 0.1 --cost-clamp 10",
    "--gae-lambda 1.0 --jsd-beta 0.5",  # as they are
)


@pytest.mark.parametrize("words", READ)
def test_what_is_read_is_not(words):
    parse(words.split())


@pytest.mark.parametrize("method", ["sft", "gkd", "lagrangian"])
def test_recipes_and_methods_go_with_each_other(method):
    """They set what others of them do not read; nobody asked for that on the command line."""
    parse(["--recipe=tempting", f"--method={method}"])


OF_A_TRAINING = {
    "--seed 5": "--seed is for cmdp-fast train: did you mean --seeds, of the sampling?",
    "--seed=0": "--seed is for cmdp-fast train: did you mean --seeds",  # as it is; it was asked for all the same
    "--output_dir x --name y": "--output-dir and --name are for cmdp-fast train: did you mean --json, a file",
    "--keep 1 --trackers wandb --no-eval-before": "--keep, --trackers and --eval-before are for cmdp-fast train, and",
    "--gae-lambda 0.9": "--gae-lambda is for cmdp-fast train, and nothing that cmdp-fast evaluate reads",
    "--rollout vllm --rollout-ahead 1": "--rollout-ahead is for cmdp-fast train",
    "--dry-run": "--dry-run is for cmdp-fast train",
    "--recipe tempting --method hinge": "--method hinge would have no effect",
    "--method grpo": "--method grpo would have no effect",
}


@pytest.mark.parametrize("words", OF_A_TRAINING)
def test_an_evaluation_refuses_what_a_training_alone_reads(words):
    with pytest.raises(InputError, match=re.escape(OF_A_TRAINING[words])):
        parse_evaluate(words.split())


def test_an_evaluation_takes_what_it_reads(tmp_path):
    """Whatever the recipe says of the training; and a method that changes what is measured."""
    method = tmp_path / "forward.toml"
    method.write_text('cost = "forward_kl"\n')
    assert parse_evaluate(["--method", str(method)]).cost == "forward_kl"
    with pytest.raises(InputError, match="would have no effect"):
        parse_evaluate(["--method", str(method), "--cost", "jsd"])  # which goes over the method's
    assert parse_evaluate(["--recipe", "smollm2"]).method == "cmdp"  # which the recipe names
    # Beside the cost of the recipe, without the method's, this clamp could not be
    assert (
        parse_evaluate(
            [
                "--recipe",
                "pair",
                "--student=s",
                "--teacher=t",
                "--dataset=d.jsonl",
                "--method",
                "kl_loss",
                "--cost-clamp",
                "10",
            ]
        ).cost
        == "k3"
    )
    recipe = tmp_path / "mine.toml"
    of_training = 'seed = 3\nkind = "barrier"\nbaseline = "gae"\nlogits = "full"\nsteps = 2\ntrackers = ["wandb"]\n'
    recipe.write_text(f'student = "s"\nteacher = "t"\ntask = "sums"\n{of_training}')
    words = ["--recipe", str(recipe), "--num-generations", "3", "--prompts-per-step", "2", "--missing-eos-penalty", "1"]
    assert parse_evaluate([*words, "--seeds", "1", "2", "--jsd-beta", "0.1"]).batch_size == 6


def test_storing_refuses_it_too():
    with pytest.raises(InputError, match="--output-dir is for cmdp-fast train: did you mean --output"):
        parse_cache(["--output", "x", "--output-dir", "y"])
    with pytest.raises(InputError, match="--steps and --budget are for cmdp-fast train, and nothing that"):
        parse_cache(["--output", "x", "--steps", "3", "--budget", "4"])
    assert parse_cache(["--output", "x", "--method", "kd", "--seed", "4"]).seed == 4


@pytest.mark.parametrize("kind", [EvaluateConfig, CacheConfig])
def test_what_is_refused_is_there(kind):
    sections = {section.name: section.options for section in sections_of(kind, None, "")}
    of_training = {option.name for name in kind.UNREAD for option in sections[name]}
    assert {*kind.REFUSED} <= {field.name for field in dataclasses.fields(kind)} - of_training
    assert not {*kind.ESSENTIAL} & {*kind.REFUSED, *of_training}


BESIDE_A_RUN = ("--method=hinge", "--recipe=tempting", "--fast")


@pytest.mark.parametrize("word", BESIDE_A_RUN)
def test_a_run_that_is_evaluated_has_its_own_recipe(word, tmp_path):
    config = replace(EvaluateConfig(), resume=str(tmp_path))
    with pytest.raises(InputError, match=f"{word.partition('=')[0]} would have no effect: the settings are those of"):
        _check_method(config, [word])


def test_readers_are_of_settings_that_there_are():
    names = [name for reader in READERS for name in reader.settings]
    assert len({*names}) == len(names) and {*names} <= {field.name for field in dataclasses.fields(TrainConfig)}
    check_read(TrainConfig(), names)


def test_settings_of_the_reward_beside_a_method_without_one():
    changes = {"missing_eos_penalty": 1.0, "reward_weights": (2.0,)}
    [warning] = warnings_of(TrainConfig(algorithm="sft", **changes))
    told = "--reward-weights and --missing-eos-penalty change the logged reward alone"
    assert warning == f"--algorithm sft learns from no reward: {told}"
    assert not warnings_of(TrainConfig(**changes)) and not warnings_of(TrainConfig(algorithm="sft"))


def test_a_sampler_that_is_not_corrected_for_is_told():
    sampled = {"rollout": "a.py:f", "sampler_correction": "off"}
    [warning] = warnings_of(TrainConfig(**sampled))
    assert warning.startswith("--sampler-correction off: what --rollout draws is taken for the student's")
    assert warnings_of(TrainConfig(rollout="vllm", sampler_correction="off")) == [warning]
    [warning] = warnings_of(TrainConfig(rollout="vllm", sampler_correction="sequence", top_p=0.9))
    assert warning.startswith("--sampler-correction sequence with --top-k or --top-p: a completion's weight is the")
    assert not warnings_of(TrainConfig(rollout="vllm", top_p=0.9))
    assert not warnings_of(TrainConfig(rollout="a.py:f")) and not warnings_of(TrainConfig(algorithm="sft", **sampled))


def test_a_warm_up_that_never_ends_is_told():
    assert not warnings_of(TrainConfig(steps=6, lr_warmup_steps=5))
    [warning] = warnings_of(TrainConfig(steps=5, lr_warmup_steps=5))
    assert warning.endswith("the last one 5/6 of it")


def test_an_adapter_with_a_rate_for_whole_models_is_told():
    [warning] = warnings_of(TrainConfig(lora_rank=8, learning_rate=9e-6))
    assert warning.startswith("--learning-rate 9e-06 with --lora-rank: an adapter hardly moves with less than 1e-05")
    assert not warnings_of(TrainConfig(lora_rank=8, learning_rate=1e-5))
    assert not warnings_of(TrainConfig(learning_rate=1e-6))

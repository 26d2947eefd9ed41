"""Settings that a training would not read are refused where they were asked for, and only there."""

from __future__ import annotations

import dataclasses
import re

import pytest

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.evaluate_student import parse_evaluate
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


def test_an_evaluation_takes_the_settings_of_a_training():
    parse_evaluate(["--gae-lambda", "0.9"])


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

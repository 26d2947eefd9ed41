"""Two processes against one with the doubled batch, and whole runs of two processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_pair import arguments, tiny_model, untimed
from transformers import AutoModelForCausalLM
from two_processes import (
    HURTS,
    PROCESSES,
    adds_up_in_float32,
    close,
    gloo_averages,
    gradients,
    hurt_in_one,
    in_two_processes,
    loss_of,
    lost_while_loading,
    refused_sharded,
    run_command,
    run_sharded,
    run_unlike,
    same_steps,
    same_steps_sharded,
    take_steps,
)

from cmdp_fast.batches import gathered
from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.distributed import share
from cmdp_fast.trainer.records.resume import spread_again
from cmdp_fast.trainer.settings.config import TrainConfig

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo"
)


@pytest.fixture(scope="module")
def tied(pair, tmp_path_factory) -> dict[str, str]:
    """Models whose head is their embedding, with a softcap."""
    root = tmp_path_factory.mktemp("tied")
    student = tiny_model(root / "student", seed=1, family="gemma2")
    return {**pair, "student": student, "teacher": tiny_model(root / "teacher", seed=2, layers=2, family="gemma2")}


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_share_goes_round():
    class Process:
        num_processes = 3

        def __init__(self, index):
            self.process_index = index

    shares = [share("abcdefg", Process(i)) for i in range(3)]
    assert shares == [["a", "b", "c"], ["d", "e", "f"], ["g", "a", "b"]]


def test_masks_are_sent_as_bytes():
    sent = []

    class Two:
        num_processes = 2

        def pad_across_processes(self, tensor, dim):
            return tensor

        def gather(self, tensor):
            sent.append(tensor.dtype)
            return torch.cat([tensor, tensor])

    (whole,) = gathered((torch.tensor([[True, False]]),), Two())
    assert whole.tolist() == [[True, False]] * 2 and whole.dtype == torch.bool and sent == [torch.uint8]


def test_steps_are_those_of_one_process_with_the_doubled_batch(pair, tied):
    cases = [
        (pair, {}),
        (tied, {}),
        (tied, {"logits": "full", "cost": "jsd"}),
        (pair, {"kind": "pid", "coefficient": 0.5, "baseline": "gae", "sampler_correction": "sequence"}),
        (pair, {"algorithm": "gkd", "jsd_beta": 0.0}),
        (
            pair,
            {"micro_batch_tokens": 18, "micro_batch_size": 8},
        ),  # not as many micro-batches in one process as in the other
        (pair, {"micro_batch_tokens": 18, "padding_free": True}),
    ]
    if importlib.util.find_spec("peft"):
        cases.append(({**tied, "teacher": tied["student"]}, {"lora_rank": 4, "lora_modules_to_save": ("lm_head",)}))
    in_two_processes(same_steps, [(*case, take_steps(*case)) for case in cases])


def test_sharded_steps_are_those_of_one_process(pair, tied, tmp_path):
    if not gloo_averages():
        pytest.skip(f"gloo takes a sum for the mean over ranks in torch {torch.__version__}")
    cases = [
        (pair, {}),
        (tied, {}),
        (pair, {"logits": "full"}),
        (pair, {"teacher_cache_mb": 0, "micro_batch_tokens": 18, "micro_batch_size": 8}),
        (pair, {"teacher_cache_mb": 0, "padding_free": True}),
    ]
    if importlib.util.find_spec("peft"):
        cases += [(pair, {"lora_rank": 4}), ({**tied, "teacher": tied["student"]}, {"lora_rank": 4})]
        apart = ({**tied, "teacher": tied["student"]}, {"lora_rank": 4, "lora_modules_to_save": ("lm_head",)})
        in_two_processes(refused_sharded, *apart, "ties its head to its embedding")
    in_two_processes(same_steps_sharded, [(*case, take_steps(*case)) for case in cases], tmp_path)


def test_sharded_gradients_are_added_up_in_float32(pair):
    """As those of one process are, whose layers compute in bfloat16 as well."""
    if not gloo_averages():
        pytest.skip(f"gloo takes a sum for the mean over ranks in torch {torch.__version__}")
    tokens = torch.randint(3, 13, (512, 1, 12), generator=torch.Generator().manual_seed(1))
    found = []
    for half in (False, True):
        model = AutoModelForCausalLM.from_pretrained(pair["student"]).eval()
        for some in tokens:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                (loss_of(model, some) / len(tokens)).backward()
        found.append(gradients(model))
    exact, halved = found
    off = float((halved - exact).norm() / exact.norm())
    in_two_processes(adds_up_in_float32, pair["student"], tokens, exact, 1.4 * off)


def lines(folder: Path) -> list[dict]:
    return [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_two_processes_and_its_second_half(pair, tmp_path):
    options = {"checkpoint_every": 2, "lr_schedule": "constant", "baseline": "gae"}
    # as a user starts it, in processes that share nothing, not even the order of a set
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    run = [*launch, "-m", "cmdp_fast.cli", *arguments(pair, tmp_path, name="whole", steps=4, **options)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(run, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert shown.count("student_after  accuracy") == 1  # one process prints
    run = arguments(pair, tmp_path, name="half", steps=2, **options)
    in_two_processes(run_command, run, tmp_path / "half.txt", 0)
    in_two_processes(run_command, ["train", f"--resume={tmp_path / 'half'}", "--steps=4"], tmp_path / "resumed.txt", 0)
    assert (tmp_path / "half.txt-1").read_text() == ""
    assert len(lines(tmp_path / "whole")) == 4 and lines(tmp_path / "half") == lines(tmp_path / "whole")
    found = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "half")]
    assert found[0]["student_after"] == found[1]["student_after"]
    samples = (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 3 * found[0]["student_after"]["examples"]
    again = ["train", f"--resume={tmp_path / 'half'}"]
    in_two_processes(run_command, again, tmp_path / "finished.txt", 0)
    in_two_processes(lost_while_loading, [*again, "--steps=5"], tmp_path / "lost", 2)
    assert "error: another process is gone" in (tmp_path / "lost-0").read_text()


def test_what_comes_to_one_of_two_is_known_to_both(pair, tmp_path, monkeypatch):
    """Numbers that are not finite, and signals: both stop at the same place, with the student of a whole step or with
    none, and the run goes on from there."""
    monkeypatch.setenv("CMDP_FAST_PATIENCE", "20")  # where they do not, this ends all the same
    run, shown = tmp_path / "r", tmp_path / "shown"
    shown.mkdir()
    began = arguments(pair, tmp_path, steps=4, checkpoint_every=1, prompts_per_step=2, eval_every=0)
    in_two_processes(hurt_in_one, began, ["train", f"--resume={run}"], shown)
    signals, weight, gradient, error = ((shown / f"{name}-0").read_text() for name in HURTS)
    assert not any((shown / f"{name}-1").read_text() for name in list(HURTS)[:-1])
    assert "interrupted after step 2 of 4; " in signals
    for text, what in ((weight, "a weight of the student"), (gradient, "the gradient")):
        assert f"error: {what} is not finite" in text
        assert "stopped by an error after step 2 of 4; student/ has the weights of step 2; " in text
    assert "stopped by an error after step 2 of 4; student/ stays as it was; " in error
    assert "error: another process is gone" in error
    found = json.loads((run / "summary.json").read_text())
    assert (found["steps"], found["student_step"]) == (2, None)
    kept = torch.load(run / "checkpoints" / "step-000002" / "model.bin", weights_only=True)
    student = load_file(run / "student" / "model.safetensors")
    assert student and all(torch.equal(value, kept[f"student.{name}"]) for name, value in student.items())


FUNCTIONS_OF_THE_PROMPT = """
def reward(completions, **columns):
    return [len(set(text)) / 4 for text in completions]
def rollout(prompts, sampling, policy):
    return {"completion_ids": [[4 + sum(ids) % 8, 4 + len(ids) + i % 4] for i, ids in enumerate(prompts)]}
"""


def test_a_run_goes_on_in_another_number_of_processes(pair, tmp_path, capsys):
    """One, two that are sharded, two, and one again: the same problems, and the same steps to rounding."""
    (tmp_path / "mine.py").write_text(FUNCTIONS_OF_THE_PROMPT)
    functions = {"rewards": f"{tmp_path / 'mine.py'}:reward", "rollout": f"{tmp_path / 'mine.py'}:rollout"}
    options = {"prompts_per_step": 4, "minibatch_size": 16, "eval_every": 0, "checkpoint_every": 1, **functions}
    options |= {"lr_schedule": "constant", "lora_rank": 2 if importlib.util.find_spec("peft") else 0}
    options |= {"budget_price": 0}  # completions of a prompt are equal, and with it their worth is nothing but rounding
    assert main(arguments(pair, tmp_path, name="whole", steps=4, **options)) == 0
    assert main(arguments(pair, tmp_path, name="parts", steps=1, **options)) == 0
    again = ["train", f"--resume={tmp_path / 'parts'}", *(f"--{name}={value}" for name, value in functions.items())]
    if gloo_averages():
        in_two_processes(run_sharded, [*again, "--steps=2"], tmp_path / "sharded", 0)
        assert "step-000001 is of 1 process, here are 2" in (tmp_path / "sharded-0").read_text()
    in_two_processes(run_command, [*again, "--steps=3"], tmp_path / "two", 0)
    capsys.readouterr()
    assert main([*again, "--steps=4", "--prompts-per-step=2"]) == 2
    assert "--prompts-per-step 2: " in capsys.readouterr().err
    assert main([*again, "--steps=4"]) == 0
    assert "step-000003 is of 2 processes, here are 1 process on cpu" in capsys.readouterr().out
    close(lines(tmp_path / "parts"), lines(tmp_path / "whole"))


def test_a_step_that_does_not_divide():
    began = TrainConfig(prompts_per_step=4, num_generations=3, minibatch_size=5)  # three optimizer steps
    assert spread_again(began, 3, 2) == replace(began, prompts_per_step=6, minibatch_size=6)
    assert spread_again(began, 1, 4) == replace(began, prompts_per_step=1, minibatch_size=1)
    for minibatch, processes in ((3, 2), (1, 2)):  # 6 in four parts, and in twelve
        with pytest.raises(InputError, match=f"no --minibatch-size makes as many of the .* of {processes} processes"):
            spread_again(replace(began, minibatch_size=minibatch), 1, processes)
    with pytest.raises(InputError, match="takes 4 prompts a step, 4 in each of 1: they do not divide by 3"):
        spread_again(began, 1, 3)


FUNCTIONS_THAT_TELL = """
import os
RANK = int(os.environ["RANK"])
async def reward(completions, trainer_state, log_metric, log_extra, **columns):
    assert trainer_state.is_world_process_zero == (RANK == 0)
    log_metric("everywhere", RANK)
    log_metric("epoch", trainer_state.epoch)
    if RANK:
        log_metric("in one", 3.0)
        log_metric("in one", 4.0)
        log_extra("rank", [RANK] * len(completions))
    return [1.0] * len(completions)
def rollout(prompts, sampling, policy):
    # log-probabilities in one process alone: the gathers of the other were others, and both were aborted
    return {"completion_ids": [[4, 5]] * len(prompts), "logprobs": None if RANK else [[-1.0, -1.0]] * len(prompts)}
"""


def test_what_functions_tell_is_that_of_both(pair, tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS_THAT_TELL)
    functions = {"rewards": f"{tmp_path / 'mine.py'}:reward", "rollout": f"{tmp_path / 'mine.py'}:rollout"}
    run = arguments(pair, tmp_path / "runs", eval_every=0, steps=2, **functions)
    in_two_processes(run_command, run, tmp_path / "shown", 0)
    logged = [(step["everywhere"], step["in one"]) for step in lines(tmp_path / "runs" / "r")]
    assert logged == [(0.5, 3.5)] * 2
    assert not any("sampling/" in name for step in lines(tmp_path / "runs" / "r") for name in step)
    assert [step["epoch"] for step in lines(tmp_path / "runs" / "r")] == [0.0, pytest.approx(2 * 3 / 9)]
    samples = (tmp_path / "runs" / "r" / "samples.jsonl").read_text().splitlines()
    assert {sample.get("extra", {}).get("rank") for sample in map(json.loads, samples)} == {None, 1}


def test_commands_that_differ(pair, tmp_path):
    in_two_processes(run_unlike, arguments(pair, tmp_path / "runs", budget=2), tmp_path / "shown", 2)
    assert "process 1 has another --budget than process 0 (3.0, not 2.0)" in (tmp_path / "shown-0").read_text()
    assert not (tmp_path / "runs").exists()


REWARD_THAT_FAILS_IN_ONE = """
import os
from cmdp_fast.errors import InputError
calls = 0
def reward(completions, **columns):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == {at}:
        raise InputError("this will not do")
    return [1.0] * len(completions)
"""


def test_an_error_of_one_ends_both_and_is_said_once(pair, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD_THAT_FAILS_IN_ONE.format(at=4))
    run = arguments(pair, tmp_path / "runs", eval_every=0, steps=9, rewards=f"{tmp_path / 'mine.py'}:reward")
    in_two_processes(run_command, run, tmp_path / "shown", 2)
    assert (tmp_path / "shown-0").read_text().count("error: reward function reward: this will not do") == 1
    assert (tmp_path / "shown-1").read_text() == ""
    found = json.loads((tmp_path / "runs" / "r" / "summary.json").read_text())
    assert found["error"] == "reward function reward: this will not do" and found["steps"] == 1
    assert (tmp_path / "runs" / "r" / "student" / "model.safetensors").exists()

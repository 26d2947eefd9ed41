"""Two gloo processes on the CPU, and what each of them does in test_distributed.py."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from fsdp_on_cpu import SHARDING, pretend
from tiny_pair import settings, untimed
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.distributed import prepare_student, share, whole_student
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.launch import make_accelerator
from cmdp_fast.trainer.material import Material
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.models.saving import save_student
from cmdp_fast.trainer.records import checkpoint as run_checkpoints
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.rollout import encode_prompts
from cmdp_fast.trainer.run import make_learner
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.step import Learner
from cmdp_fast.trainer.tasks import data

PROCESSES = 2
STEPS = 3


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """Forks: the models and libraries are there already. An error in one ends both and is raised."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _process, args=(port, function, arguments), nprocs=PROCESSES, start_method="fork"
    )


def gloo_averages() -> bool:
    """Whether gloo gives each rank its part of the mean, on which sharded gradients rest; that of torch 2.8 adds up."""
    try:
        in_two_processes(_scatter_ones)
    except torch.multiprocessing.ProcessRaisedException:
        return False
    return True


def _scatter_ones() -> None:
    dist.init_process_group("gloo")
    part = torch.zeros(1)
    dist.reduce_scatter_tensor(part, torch.ones(PROCESSES), op=dist.ReduceOp.AVG)
    assert part.item() == 1.0


def _process(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        function(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------- steps


def completions(prompts: list[list[int]], sampling: Any, policy: Any) -> dict[str, Any]:
    """A rollout that depends on a prompt and on its place in a group of four, and on nothing else; its steps are
    corrected for it."""
    seen: Counter[tuple[int, ...]] = Counter()
    ids: list[list[int]] = []
    logprobs: list[list[float]] = []
    for prompt in prompts:
        seen[tuple(prompt)] = seen[tuple(prompt)] % 4 + 1
        seed = sum((i + 1) * token for i, token in enumerate(prompt)) + 7 * seen[tuple(prompt)]
        length = 2 + seed % (sampling.max_new_tokens - 1)
        ids.append([3 + (seed + 5 * i * i) % 10 for i in range(length)])
        logprobs.append([-2.0 - (seed + i) % 3 / 2 for i in range(length)])
    return {"completion_ids": ids, "logprobs": logprobs}


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text)) / 4 for text in completions]


def make(pair: dict[str, str], accelerator: Any, changes: dict[str, Any]) -> tuple[Learner, data.Problems]:
    """A learner whose minibatch is the whole batch, of eight completions a step in all."""
    prompts = 4 // accelerator.num_processes
    config = settings(
        pair,
        prompts_per_step=prompts,
        minibatch_size=4 * prompts,
        holdout_fraction=0.4,
        eval_generations=1,
        **{"micro_batch_size": 3, **changes},
    )
    problems = data.load_problems(config)
    student, teacher, tokenizer = load_pair(config, problems.train, Report())
    material = Material(
        student=student, teacher=teacher, tokenizer=tokenizer, rewards={"mine": reward}, rollout=completions
    )
    return make_learner(config, accelerator, material), problems


def steps(learner: Learner, problems: data.Problems, first: int = 0) -> list[dict[str, float]]:
    """Metrics of the steps, the same problems whatever the number of processes."""
    prompts = encode_prompts(problems.train, learner.collector.tokenizer)
    batches = data.shuffled(len(problems.train), 4, seed=0)
    found = []
    for step in range(STEPS):
        chosen = share(next(batches), learner.accelerator)
        if step >= first:
            found.append(untimed(learner.step([problems.train[i] for i in chosen], [prompts[i] for i in chosen])))
    return found


def take_steps(pair: dict[str, str], changes: dict[str, Any]) -> tuple[list[dict[str, float]], dict, dict]:
    """(metrics, figures of an evaluation, weights)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    learner, problems = make(pair, make_accelerator(TrainConfig()), changes)
    if learner.accelerator.num_processes > 1:
        learner.optimizer.optimizer.register_step_pre_hook(_gradients_are_views)
    metrics = steps(learner, problems)
    figures, samples = evaluate(learner.collector, learner.student, problems.held_out, Clock())
    assert len(samples) == figures["examples"] == len(problems.held_out)
    model, _ = whole_student(learner.student, learner.accelerator)
    return metrics, figures, {name: value.detach().clone() for name, value in model.state_dict().items()}


def _gradients_are_views(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Of DDP's buckets, which would be a second copy of them otherwise."""
    found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    assert len({gradient.untyped_storage().data_ptr() for gradient in found}) < len(found)


def close(ours: Any, expected: Any) -> None:
    """To float32 tolerance: sums are taken in another order."""
    if isinstance(expected, dict):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.as_tensor(ours[name]),
                torch.as_tensor(value),
                rtol=2e-4,
                atol=2e-5,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    else:
        for a, b in zip(ours, expected, strict=True):
            close(a, b)


def same_steps(cases: list[tuple[dict[str, str], dict[str, Any], Any]]) -> None:
    for pair, changes, expected in cases:
        close(take_steps(pair, changes), expected)


# ------------------------------------------------------------------------------------- fully sharded


def sharding_accelerator(**settings: Any) -> Any:
    """As the trainer makes it on GPUs from fsdp2.yaml."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(SHARDING)
    pretend()
    return make_accelerator(TrainConfig(**settings))


def same_steps_sharded(cases: list[tuple[dict[str, str], dict[str, Any], Any]], folder: Path) -> None:
    for number, (pair, changes, (metrics, _, weights)) in enumerate(cases):
        learner, problems = make(pair, sharding_accelerator(), changes)
        for model in (learner.student, learner.teacher):  # the head's group stays together after a forward pass
            model = getattr(model, "get_base_model", lambda model=model: model)()
            assert all(isinstance(parameter, DTensor) for parameter in model.model.layers.parameters())
        prompts = encode_prompts(problems.train, learner.collector.tokenizer)
        batches = data.shuffled(len(problems.train), 4, seed=0)
        for step in range(STEPS):
            chosen = share(next(batches), learner.accelerator)
            found = learner.step([problems.train[i] for i in chosen], [prompts[i] for i in chosen])
            close(untimed(found), metrics[step])
            if step == 1:
                evaluate(learner.collector, learner.student, problems.held_out, Clock())  # leaves the head together
                run_checkpoints.save_checkpoint(
                    learner.accelerator, learner.trained, folder / str(number), 2, {"ppo": learner.state_dict()}
                )
        evaluate(learner.collector, learner.student, problems.held_out, Clock())
        model, ours = whole_student(learner.student, learner.accelerator)
        if learner.accelerator.is_main_process:
            close(ours, weights)
            if "lora_rank" in changes:
                save_student(model, learner.collector.tokenizer, folder / str(number), ours)

        again, problems = make(pair, sharding_accelerator(), changes)
        run = folder / str(number)
        again.load_state_dict(run_checkpoints.load_checkpoint(again.accelerator, again.trained, run, Report())["ppo"])
        close(steps(again, problems, first=2), metrics[2:])
        # sampling keeps step although completions end at different times
        again.collector.rollout = None
        evaluate(again.collector, again.student, problems.held_out, Clock())
        evaluate(again.collector, again.teacher, problems.held_out, Clock())


# ------------------------------------------------------------------------------------- whole runs


def run_command(arguments: list[str], shown: Path, expected: int) -> None:
    """Runs the command line; what a process prints goes to a file of its own."""
    with (
        open(f"{shown}-{os.environ['RANK']}", "w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        code = main(arguments)
    assert code == expected, code


def lost_while_loading(arguments: list[str], shown: Path, expected: int) -> None:
    """The same; the second process goes while the checkpoint's optimizer is sent to it."""
    if os.environ["RANK"] == "1":
        state_dict.set_optimizer_state_dict = lambda *_, **__: os._exit(0)
    run_command(arguments, shown, expected)


def hurt_in_one(began: list[str], again: list[str], shown: Path) -> None:
    """A run of four steps that goes on after each of several ends that come to the second process alone; what each
    prints is in files of the end's name. With the last that process is gone."""
    for name, (hurt, code) in HURTS.items():
        with pytest.MonkeyPatch.context() as patch:
            if os.environ["RANK"] == "1":
                patch.setattr(Learner, "update", hurt)
            run_command(began if name == "signals" else again, shown / name, code)


def _signals(self: Learner, *given: Any) -> Any:
    """Two at once, in the second step."""
    for _ in range(2 if self.steps_done == 1 else 0):
        signal.raise_signal(signal.SIGINT)
    return update(self, *given)


def _weight(self: Learner, *given: Any) -> Any:
    """One that is none, in what this process has of the weights, once the optimizer has made its last step."""
    check = self.check_weights

    def spoilt() -> None:
        with torch.no_grad():
            next(p for p in self.student.parameters() if p.requires_grad).view(-1)[-1] = torch.nan
        check()

    self.check_weights = spoilt  # type: ignore[method-assign]
    return update(self, *given)


def _gradient(self: Learner, *given: Any) -> Any:
    """Of this process's part of a minibatch."""
    backward = self.backward
    self.backward = lambda loss, outputs: backward(loss * torch.nan, outputs)  # type: ignore[method-assign]
    return update(self, *given)


def _error(self: Learner, *given: Any) -> Any:
    """In the step's second minibatch, of which the others cannot be told."""
    accumulate = self._accumulate

    def fails(*parts: Any) -> Any:
        if self.between:
            raise InputError("this will not do")
        return accumulate(*parts)

    self._accumulate = fails  # type: ignore[method-assign]
    return update(self, *given)


update = Learner.update
HURTS = {"signals": (_signals, 130), "weight": (_weight, 2), "gradient": (_gradient, 2), "error": (_error, 2)}


def refused_sharded(pair: dict[str, str], changes: dict[str, Any], reason: str) -> None:
    """A learner that is not made."""
    with pytest.raises(InputError, match=reason):
        make(pair, sharding_accelerator(), changes)


def run_unlike(arguments: list[str], shown: Path, expected: int) -> None:
    """The same with another budget in the second process."""
    run_command([*arguments, "--budget=3"] if os.environ["RANK"] == "1" else arguments, shown, expected)


def run_sharded(arguments: list[str], shown: Path, expected: int) -> None:
    """The same with FSDP2."""
    os.environ.update(SHARDING)
    pretend()
    run_command(arguments, shown, expected)


# ------------------------------------------------------------------------------------- sums of many gradients


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1]).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: Any) -> Tensor:
    """Those of all parameters, one after the other."""
    found = [parameter.grad for parameter in model.parameters()]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten().double() for g in found])


def adds_up_in_float32(student: str, tokens: Tensor, exact: Tensor, most: float) -> None:
    """The gradient of many micro-batches, this process's part of `tokens` [N, 1, T], is off by at most so much."""
    accelerator = sharding_accelerator(mixed_precision="bf16")
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    model, _ = prepare_student(model, torch.optim.AdamW(model.parameters()), accelerator)
    mine = tokens[accelerator.process_index :: accelerator.num_processes]
    for number, some in enumerate(mine):
        with accelerator.no_sync(model) if number + 1 < len(mine) else contextlib.nullcontext():
            with accelerator.autocast():
                loss = loss_of(model, some)
            accelerator.backward(loss / len(mine))
    off = float((gradients(model) - exact).norm() / exact.norm())
    assert off <= most, off

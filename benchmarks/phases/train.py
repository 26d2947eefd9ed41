"""Do the trainers work at the size of real models? Steps of this package's and of TRL's, a kill and what comes after.

Student and teacher are random, of the architectures and sizes of Qwen2.5-1.5B (float32 masters, bfloat16 autocast) and
7B (bfloat16). They are made on the device and saved nowhere. The run that is killed has their width and two layers, so
that its checkpoints fit a small disk.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from phases import models, processes
from phases.record import Part
from phases.setting import Setting, need_package

STEPS = 3
PACKAGES = ("transformers", "accelerate", "tyro", "datasets", "regex")


def parts(setting: Setting) -> list[Part]:
    """The trainer with tiles first, then with full logits, then what is beside them."""
    seconds = 10 if setting.small else 70

    def steps(name: str, **changes: Any) -> Part:
        return Part(name, seconds, lambda: _steps(setting, **changes))

    return [
        steps("three steps, tiled"),
        steps("three steps, full logits", logits="full"),
        steps("three steps, tiled, gradient checkpointing", gradient_checkpointing=True),
        Part("TRL, two steps", seconds, lambda: _trl(setting)),
        Part("kill and resume", 2 * seconds if setting.small else 90, lambda: _killed(setting)),
    ]


# --------------------------------------------------------------------------------------------------------------
# Steps of the trainer


def _config(setting: Setting, **changes: Any) -> Any:
    from cmdp_fast.trainer.settings.config import TrainConfig

    base = TrainConfig(
        student="made here",
        teacher="made here",
        dataset="made here",
        mixed_precision="no" if setting.small else "bf16",
        budget=0.005 if setting.small else 2.0,  # which completions of random models exceed
        steps=STEPS,
        prompts_per_step=2 if setting.small else 8,
        num_generations=2 if setting.small else 4,
        max_new_tokens=4 if setting.small else 128,
        minibatch_size=4 if setting.small else 32,
        micro_batch_size=4 if setting.small else 16,
        epochs=1,
        learning_rate=1e-6,
    )
    return dataclasses.replace(base, **changes)


def _steps(setting: Setting, **changes: Any) -> dict[str, Any]:
    """Steps of a learner: seconds of each phase, tokens per second, the peak of the memory, the metrics."""
    for package in PACKAGES:
        need_package(package)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from cmdp_fast.trainer.material import Material
    from cmdp_fast.trainer.models.recompute import recompute_layers
    from cmdp_fast.trainer.rollout import encode_prompts
    from cmdp_fast.trainer.run import make_learner

    setting.free()
    config = _config(setting, **changes)
    student = models.make(_student(setting), torch.float32, setting.device, 1)
    if config.gradient_checkpointing:
        recompute_layers(student)
    frozen = torch.float32 if setting.small else torch.bfloat16
    teacher = models.make(_teacher(setting), frozen, setting.device, 2).requires_grad_(False)
    tokenizer = models.byte_tokenizer(_student(setting)["vocab_size"])
    rows = models.problems(config.prompts_per_step * STEPS)
    AcceleratorState._reset_state(reset_partial_state=True)  # or the first precision of the process would stay
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=setting.device == "cpu")
    material = Material(student=student, teacher=teacher, tokenizer=tokenizer, rewards={"odd": models.odd})
    learner = make_learner(config, accelerator, material)
    prompts = encode_prompts(rows, tokenizer)
    found: list[dict[str, Any]] = []
    for step in range(STEPS):
        before = dict(learner.clock.seconds)
        _reset_peak(setting)
        batch = slice(step * config.prompts_per_step, (step + 1) * config.prompts_per_step)
        metrics = learner.step(rows[batch], prompts[batch])
        seconds = {name: total - before.get(name, 0.0) for name, total in learner.clock.seconds.items()}
        found.append({"seconds": seconds, "peak_bytes": _peak(setting), "metrics": metrics})
    values = [(name, value) for step in found for name, value in step["metrics"].items() if name.startswith("loss")]
    problems = [f"{name} is {value}" for name, value in values if not math.isfinite(value)]
    last = found[-1]
    phases = ", ".join(f"{name} {s:.2f}" for name, s in last["seconds"].items())
    peak = f"{last['peak_bytes'] / 2**30:.1f} GiB, " if last["peak_bytes"] else ""
    rate = last["metrics"]["tokens_per_second"]
    del learner, material, student, teacher
    setting.free()
    return {"steps": found, "problems": problems, "summary": f"{rate:.0f} tokens/s, {peak}s: {phases}"}


def _student(setting: Setting) -> dict[str, Any]:
    return models.TOY_STUDENT if setting.small else models.STUDENT


def _teacher(setting: Setting) -> dict[str, Any]:
    return models.TOY_TEACHER if setting.small else models.TEACHER


def _reset_peak(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(setting: Setting) -> int | None:
    return torch.cuda.max_memory_allocated() if setting.device == "cuda" else None


# --------------------------------------------------------------------------------------------------------------
# A run that is killed


def _killed(setting: Setting) -> dict[str, Any]:
    """`cmdp-fast train` killed after its first checkpoint and resumed ends with the figures of the run that was not."""
    for package in PACKAGES:
        need_package(package)
    setting.free()
    end = time.monotonic() + setting.left() - 10
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shallow = {} if setting.small else models.SHALLOW
        size = (_student(setting) | shallow)["vocab_size"]
        models.save(_student(setting) | shallow, torch.float32, setting.device, folder / "student", 1, size)
        models.save(_teacher(setting) | shallow, torch.bfloat16, setting.device, folder / "teacher", 2, size)
        models.write_task(folder / "task.jsonl", 40)
        setting.free()
        whole = _run(setting, folder, "whole", end, kill=False)
        _run(setting, folder, "killed", end, kill=True)
        resumed = _run(setting, folder, "killed", end, kill=False)
    problems = []
    if len(resumed) != STEPS:
        problems.append(f"{len(resumed)} steps are in the log of the run that was resumed, expected {STEPS}")
    for one, other in zip(whole, resumed, strict=False):
        for key in ("loss", "reward", "cmdp/mean_cumulative", "grad_norm"):
            if key in one and not math.isclose(one[key], other.get(key, math.nan), rel_tol=1e-3, abs_tol=1e-6):
                problems.append(f"step {one['step']}: {key} {one[key]:.6g}, after the kill {other.get(key)}")
    bitwise = [_untimed(step) for step in whole] == [_untimed(step) for step in resumed]
    said = "every figure the same" if bitwise else "the same but for rounding"
    return {"steps": whole, "resumed": resumed, "bitwise": bitwise, "problems": problems, "summary": said}


def _untimed(step: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a step that no clock and no allocator has a part in."""
    timed = ("step_time", "tokens_per_second", "timing_s/", "perf/")
    return {name: value for name, value in step.items() if not name.startswith(timed)}


def _run(setting: Setting, folder: Path, name: str, end: float, *, kill: bool) -> list[dict[str, Any]]:
    """A run by the command line, begun or resumed; the metrics of its steps. ``kill``: once it has a checkpoint."""
    run = folder / "runs" / name
    if run.exists():
        arguments = [f"--resume={run}"]
    else:
        arguments = [f"--{key}={value}" for key, value in _options(setting, folder, name).items()]
    command = [sys.executable, "-m", "cmdp_fast.cli", "train", *arguments]
    if not kill:
        ended = processes.run(command, max(5.0, end - time.monotonic()), setting.log, os.environ)
        if ended.code != 0:
            raise RuntimeError(f"train ended with {ended.code}: {' '.join(ended.tail(3))}")
    else:
        with open(setting.log, "a", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            try:
                while process.poll() is None and time.monotonic() < end and not _has_checkpoint(run):
                    time.sleep(0.02)
                if process.poll() is not None:
                    raise RuntimeError(f"train ended by itself with {process.returncode}, before it could be killed")
                process.send_signal(signal.SIGKILL)
            finally:
                processes.kill(process)
        return []
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    if name == "whole":
        shutil.rmtree(run)  # its checkpoints and weights are large
    return steps


def _has_checkpoint(run: Path) -> bool:
    from cmdp_fast.trainer.records.checkpoint import checkpoints

    return run.is_dir() and bool(checkpoints(run))


def _options(setting: Setting, folder: Path, name: str) -> dict[str, Any]:
    trackers = _tracker()
    return {
        "recipe": str(_recipe(folder)),
        "student": folder / "student",
        "teacher": folder / "teacher",
        "dataset": folder / "task.jsonl",
        "output-dir": folder / "runs",
        "name": name,
        **({"trackers": trackers} if trackers else {}),
    } | {
        key.replace("_", "-"): value
        for key, value in dataclasses.asdict(_config(setting)).items()
        if key in ("mixed_precision", "steps", "prompts_per_step", "num_generations", "minibatch_size", "budget")
    }


def _recipe(folder: Path) -> Path:
    """A recipe with what is not a number: options that are lists differ from one version of tyro to the next."""
    path = folder / "recipe.toml"
    trackers = "" if _tracker() else "trackers = []\n"
    path.write_text(
        f'rewards = ["exact_answer"]\n{trackers}checkpoint_every = 1\neval_prompts = 2\nepochs = 1\n'
        "max_new_tokens = 8\nmicro_batch_size = 8\nlearning_rate = 1e-6\n"
    )
    return path


def _tracker() -> str:
    import importlib.util

    return "" if importlib.util.find_spec("tensorboard") is None else "tensorboard"


# --------------------------------------------------------------------------------------------------------------
# TRL


def _trl(setting: Setting) -> dict[str, Any]:
    """Two steps of `CMDPGRPOTrainer`."""
    for package in ("trl", "datasets", "transformers"):
        need_package(package)
    from datasets import Dataset

    from cmdp_fast.integrations.trl import CMDPGRPOConfig, CMDPGRPOTrainer

    setting.free()
    config = _config(setting)
    student = models.make(_student(setting), torch.float32, setting.device, 1)
    frozen = torch.float32 if setting.small else torch.bfloat16
    teacher = models.make(_teacher(setting), frozen, setting.device, 2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = CMDPGRPOConfig(
            folder,
            budget=config.budget,
            scale_rewards="none",
            use_cpu=setting.device == "cpu",
            bf16=not setting.small,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            gradient_checkpointing=not setting.small,
            learning_rate=1e-6,
            max_completion_length=config.max_new_tokens,
            max_steps=2,
            per_device_train_batch_size=config.minibatch_size // 2,
            num_generations=config.num_generations,
        )
        trainer = CMDPGRPOTrainer(
            student,
            reward_funcs=models.odd,
            args=arguments,
            train_dataset=Dataset.from_list(models.problems(32)),
            processing_class=models.byte_tokenizer(_student(setting)["vocab_size"]),
            teacher_model=teacher,
        )
        _reset_peak(setting)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    history, peak = list(trainer.state.log_history), _peak(setting)
    problems = [f"loss is {loss}" for loss in losses if not math.isfinite(loss)]
    if len(losses) != 2:
        problems.append(f"{len(losses)} losses were logged, expected 2")
    del trainer, student, teacher
    setting.free()
    said = f"losses {', '.join(f'{loss:.3g}' for loss in losses)}; {seconds / 2:.2f} s a step"
    said += f", {peak / 2**30:.1f} GiB" if peak else ""
    return {"history": history, "seconds": seconds, "peak_bytes": peak, "problems": problems, "summary": said}

"""A run of verl's launcher with random models on a CPU: `python tests/support/verl_run.py FOLDER [KEY=VALUE ...]`.

The configuration is `cmdp.yaml`, with other sizes and devices. Ray starts the workers, the actor is verl's FSDP engine,
the student's rollout and the teacher are those of `verl_rollout.py`; with VERL_RUN_ENGINE=vllm they are vLLM's own.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import Dataset
from tiny_pair import tiny_model
from transformers import AutoTokenizer

LIMIT = 600.0
"""Seconds after which a run hangs: it takes 1 to 3 minutes on two cores."""

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: object = None, **_: object
) -> float:
    """verl's signature of a reward function: how many of a completion's signs are digits."""
    return sum(sign.isdigit() for sign in solution_str) / max(len(solution_str), 1)


def modules() -> str:
    """What verl imports in each of its processes: its engine is vLLM with VERL_RUN_ENGINE=vllm, else transformers."""
    engine = [] if os.environ.get("VERL_RUN_ENGINE") == "vllm" else ["verl_rollout"]
    return ",".join(["verl_cpu", *engine, "cmdp_fast.integrations.verl"])


def prepare(folder: Path) -> None:
    """Writes the models and the data of a run into a folder, where they are not yet."""
    if (folder / "train.parquet").exists():
        return
    for name, seed in (("student", 0), ("teacher", 1)):
        path = tiny_model(folder / name, seed)
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(path)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+{9 - i}="}],
            "data_source": "sums",
            "reward_model": {"ground_truth": "9"},
        }
        for i in range(8)
    ]
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")


def command(folder: Path, *changes: str) -> list[str]:
    """verl's launcher with the configuration of this package, made small; ``changes`` are hydra's KEY=VALUE."""
    small = {
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "train.parquet",
        "data.train_batch_size": 4,
        "data.max_prompt_length": 8,
        "data.max_response_length": 8,
        "data.dataloader_num_workers": 0,
        "actor_rollout_ref.model.path": folder / "student",
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.actor.strategy": "fsdp2",  # torch keeps its first FSDP from a CPU
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": "false",
        "actor_rollout_ref.actor.optim.lr": 0.03,  # a step shows in what is sampled next
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "distillation.n_gpus_per_node": 1,
        "distillation.teacher_models.teacher_model.model_path": folder / "teacher",
        "distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size": 1,
        "distillation.distillation_loss.topk": 8,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": __file__,
        "algorithm.cmdp.budget": 1.0,
        "trainer.n_gpus_per_node": 1,
        "trainer.device": "cpu",
        "trainer.val_before_train": "false",
        "trainer.test_freq": -1,
        "trainer.save_freq": 1,
        "trainer.total_training_steps": 2,
        "trainer.total_epochs": 100,
        "trainer.logger": "[console,file]",
        "trainer.default_local_dir": folder / "checkpoints",
        "+ray_kwargs.ray_init.num_gpus": 2,  # places, of which verl counts one for the student and one for the teacher
        "ray_kwargs.ray_init.num_cpus": 12,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "+ray_kwargs.ray_init.include_dashboard": "false",
        "+ray_kwargs.ray_init.address": "local",  # never a cluster that RAY_ADDRESS names
        "ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES": f"'{modules()}'",
    }
    config = files("cmdp_fast.integrations") / "verl"
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "cmdp", "--config-path", str(config)),
        *(f"{key}={value}" for key, value in small.items()),
        *changes,
    ]


def environment(folder: Path, name: str, scratch: str) -> dict[str, str]:
    """What verl and Ray are started with: our modules, no GPU, one thread a process, a place for what they leave."""
    paths = os.pathsep.join([str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": paths,
        "VERL_USE_EXTERNAL_MODULES": modules(),
        "VERL_PLATFORM": "cpu",
        # verl/workers/engine/fsdp/transformer_impl.py, line 1143, has its FSDP engine for cuda and npu alone
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_FILE_LOGGER_PATH": str(folder / f"{name}.jsonl"),
        "VERL_RUN_SCORED": str(folder / f"{name}.scored"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": scratch,  # verl's locks
        "RAY_TMPDIR": scratch,
        "HF_DATASETS_CACHE": scratch,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # Ray would keep one in the home directory
    }


def run(folder: Path, *changes: str, name: str = "run") -> dict[int, dict[str, Any]]:
    """Trains from the last checkpoint in a folder, or from the beginning; returns the metrics of each step, which
    verl's logger has written to ``name``.jsonl. Nothing that it starts outlives it, nor do Ray's files. Raises
    CalledProcessError where verl fails, and TimeoutError after `LIMIT`."""
    prepare(folder)
    with tempfile.TemporaryDirectory(prefix="verl-", dir="/tmp") as scratch:  # a socket's path is short
        launcher = subprocess.Popen(
            command(folder, *changes), env=environment(folder, name, scratch), cwd=folder, start_new_session=True
        )
        try:
            status = launcher.wait(LIMIT)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"verl's launcher hangs: it has not ended in {LIMIT:g} s") from error
        finally:
            end(launcher)
    if status:
        raise subprocess.CalledProcessError(status, launcher.args)
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return {line["step"]: line["data"] for line in map(json.loads, lines)}


def end(launcher: subprocess.Popen[bytes]) -> None:
    """Kills what is left of a launcher's session: itself, Ray's servers, all workers. Returns when there is none."""
    while members := [
        pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if session(pid) == launcher.pid
    ]:
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.poll()
        time.sleep(0.1)


def session(pid: int) -> int | None:
    """The session of a process, None where it has ended, even if nobody has asked how."""
    try:
        state, _, _, number = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else int(number)


if __name__ == "__main__":
    for step, metrics in run(Path(sys.argv[1]).absolute(), *sys.argv[2:]).items():
        ours = {name: value for name, value in metrics.items() if "cmdp" in name or name == "actor/loss"}
        print(f"step {step}", *(f"{name}={value:.5g}" for name, value in ours.items()))

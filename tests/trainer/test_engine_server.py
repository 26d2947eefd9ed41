"""Rollouts on vLLM, the trainer's side: a server that the run starts, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from engine_runs import stepper
from tiny_pair import settings
from vllm_stand_in import StandIn

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.engine import engine, keeper


def fake_python(folder: Path, script: str) -> str:
    """A Python "with vLLM" that runs a script in its place."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exit 0; fi\n{script}\n')
    program.chmod(0o755)
    return str(program)


def test_a_server_that_does_not_start_says_why(pair, held, tmp_path):
    python = fake_python(
        tmp_path, "echo 'INFO fine'; echo '(Worker) RuntimeError: head_dim=24 is not supported'; exit 3"
    )
    config = settings(pair, rollout="vllm", rollout_python=python, rollout_timeout=3.0)
    _, step = stepper(config, held)
    with pytest.raises(InputError, match=r"has ended \(exit code 3\): RuntimeError: head_dim=24 .* its log: (\S+)"):
        step()


def test_a_server_that_never_starts_is_waited_for_so_long(pair, held, tmp_path):
    python = fake_python(tmp_path, "exec sleep 1000")
    _, step = stepper(settings(pair, rollout="vllm", rollout_python=python, rollout_timeout=1.0), held)
    with pytest.raises(InputError, match=r"has not started in 1 s"):
        step()
    held.close()
    assert not _running("sleep 1000")


def test_a_server_sees_nothing_of_the_runs_processes(pair, held, tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_PORT", "ACCELERATE_USE_FSDP", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    python = fake_python(tmp_path, f'env > {tmp_path}/env; echo "$@" > {tmp_path}/words; exit 1')
    words = {"rollout_args": "--tensor-parallel-size 2", "rollout_devices": "6,7"}
    _, step = stepper(settings(pair, rollout="vllm", rollout_python=python, **words), held)
    with pytest.raises(InputError, match="has ended"):
        step()
    seen = (tmp_path / "env").read_text()
    assert "CUDA_VISIBLE_DEVICES=6,7" in seen and "VLLM_NO_USAGE_STATS=1" in seen
    assert not [
        line for line in seen.splitlines() if line.startswith(("RANK=", "MASTER_", "ACCELERATE_", "TORCHELASTIC"))
    ]
    assert "--tensor-parallel-size 2" in (tmp_path / "words").read_text()
    assert "--host 127.0.0.1" in (tmp_path / "words").read_text()


def test_a_server_of_the_runs_own_is_given_the_key_that_it_asks_for(pair, held, tmp_path, monkeypatch):
    """vLLM takes VLLM_API_KEY out of its environment, which is the run's."""
    monkeypatch.setenv("VLLM_API_KEY", "k")
    python = fake_python(tmp_path, "exec sleep 1000")
    stand_in = held.enter_context(StandIn(pair["student"]).served())
    monkeypatch.setattr(engine, "Server", lambda *_: Elsewhere(stand_in.url))
    stepper(settings(pair, rollout="vllm", rollout_python=python), held)[1]()
    assert stand_in.keys == {"Bearer k"}


class Elsewhere:
    """In the place of a server of the run's own."""

    def __init__(self, url: str) -> None:
        self.url = url

    def wait(self, *_) -> None:
        pass

    def gone(self) -> str:
        return ""

    def close(self) -> None:
        pass


def _running(words: str) -> bool:
    return words in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True).stdout


def test_a_killed_run_leaves_no_server(tmp_path):
    """Nor what the server has started, nor its weights: all goes with a parent that could say nothing."""
    folder = tmp_path / "weights"
    folder.mkdir()
    mark = f"{1000 + os.getpid()}.25"
    child = f"import subprocess, sys, time; subprocess.Popen(['sleep', '{mark}']); time.sleep(1000)"
    parent = (
        "import os, subprocess, sys, time\n"
        f"keeper = [sys.executable, '-I', {keeper.__file__!r}, str(os.getpid()), {str(folder)!r}]\n"
        f"subprocess.Popen([*keeper, sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "time.sleep(1000)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", parent])
    _until(lambda: _running(f"sleep {mark}"))
    run.send_signal(signal.SIGKILL)
    run.wait()
    _until(lambda: not _running(f"sleep {mark}") and not folder.exists())


@pytest.mark.parametrize(("kind", "kept"), [(InputError, ["vllm.log"]), (KeyboardInterrupt, []), (None, [])])
def test_the_log_stays_after_an_error_alone(pair, tmp_path, monkeypatch, kind, kept):
    stand_in = StandIn(pair["student"])
    held = ExitStack()
    with stand_in.served():
        monkeypatch.setattr(engine, "Server", lambda *_: Elsewhere(stand_in.url))
        python = fake_python(tmp_path, "exit 1")
        (where := tmp_path / "of-engines").mkdir()
        stepper(settings(pair, rollout="vllm", rollout_python=python, rollout_folder=str(where)), held)[1]()
        [folder] = where.iterdir()
        (folder / "vllm.log").touch()
        held.__exit__(kind, kind and kind(), None)
    assert [path.name for folder in where.iterdir() for path in folder.iterdir()] == kept


def _until(holds) -> None:
    for _ in range(300):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it never was so")

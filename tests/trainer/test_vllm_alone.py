"""Trainings on vLLM in which each test starts servers of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

from hosts import hosts, torchrun
from on_vllm import EXACT, PYTHON, needs_vllm, pair
from tiny_pair import arguments

import cmdp_fast
from cmdp_fast.trainer.engine.server import SHARED_PROCESSORS

__all__ = ["pair"]
pytestmark = needs_vllm


def test_two_machines_train_and_a_third_samples(pair, tmp_path):
    """Each a network namespace with an address of its own; the weights go through a folder that all see."""
    with hosts(3, tmp_path) as (*machines, third):
        url = f"http://{third.address}:8000"
        words = ["--host", third.address, "--port", "8000", "--model", pair["student"], "--dtype", "float32"]
        words += ["--enforce-eager", "--max-model-len", "64", "--generation-config", "vllm"]
        words += ["--logprobs-mode", "processed_logprobs"]
        places = {"VLLM_HOST_IP": third.address, "VLLM_SERVER_DEV_MODE": "1", **SHARED_PROCESSORS}
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *words]
        server = third.start(command, tmp_path / "vllm.log", **places)
        try:
            asked = f"import requests; assert requests.get({url + '/health'!r}).ok"
            until = time.monotonic() + 300
            while machines[0].start([sys.executable, "-c", asked], tmp_path / "asked").wait():
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "vllm.log").read_text()[-2000:]
                time.sleep(1)
            (tmp_path / "weights").mkdir()
            given = {"rollout": "vllm", "rollout_url": url, "rollout_folder": tmp_path / "weights"}
            train = arguments(pair, tmp_path / "runs", eval_every=0, **given)
            runs = [
                host.start(
                    torchrun(host, machines, "cmdp_fast.cli", *train), host.folder / "log", ACCELERATE_USE_CPU="true"
                )
                for host in machines
            ]
            assert [run.wait(300) for run in runs] == [0, 0], (machines[0].folder / "log").read_text()
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    said = (machines[0].folder / "log").read_text()
    assert "2 hosts, 2 processes, DDP, float32" in said
    records = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all(record["sampling/sampling_logp_difference/max"] < EXACT for record in records)


def test_trl_trains_on_what_vllm_drew(pair, tmp_path):
    """In an environment with the packages of both, vLLM's before ours; its name and version say that it is for a CPU.
    vLLM computes in bfloat16 there, which the weights see and hardly correct."""
    environment = tmp_path / "both"
    venv.create(environment, with_pip=False)
    [packages] = environment.glob("lib/python*/site-packages")
    own = subprocess.run([PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True)
    places = [own.stdout.decode().strip(), sysconfig.get_path("purelib"), str(Path(cmdp_fast.__file__).parents[1])]
    (packages / "both.pth").write_text("\n".join(places))
    about = packages / "vllm-0.32.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    script = Path(__file__).parents[1] / "support" / "trl_on_vllm.py"
    ran = subprocess.run(
        [environment / "bin" / "python", script, pair["student"], pair["teacher"], tmp_path],
        env={**os.environ, **SHARED_PROCESSORS, "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    records = [record for record in json.loads(ran.stdout.splitlines()[-1]) if "loss" in record]
    assert len(records) == 3
    for record in records:
        assert 0 < record["sampling/sampling_logp_difference/max"] < 0.1
        assert 0.9 < record["sampling/effective_sample_ratio"] <= 1 + 1e-6
        assert record["cmdp/mean_cumulative"] > 0

"""Two machines, each with a disk and an address of its own: what a user starts on them, and a machine that vanishes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist
from fsdp_on_cpu import SHARDING
from hosts import Host, accelerate, hosts, torchrun
from tiny_pair import arguments, untimed
from two_processes import close, gloo_averages

import cmdp_fast.trainer
from cmdp_fast.cli import main

CONFIGURATIONS = Path(cmdp_fast.trainer.__file__).parent / "accelerate"
SUPPORT = Path(__file__).parents[1] / "support"

pytestmark = [
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo"
    ),
    pytest.mark.skipif(shutil.which("ip") is None, reason="no network namespaces here: there is no `ip`"),
]

MINE = """
import os, pathlib, time
place = pathlib.Path({place!r})
def reward(completions, trainer_state, **columns):
    if trainer_state.global_step == 2 and not (place / "go").exists():
        (place / os.environ["RANK"]).touch()
        while not (place / "go").exists():
            time.sleep(0.05)
    return [len(set(text)) / 4 for text in completions]
def rollout(prompts, sampling, policy):
    # of the prompt alone: the same in any number of processes
    return {{"completion_ids": [[4 + sum(ids) % 8, 4 + len(ids) + i % 4] for i, ids in enumerate(prompts)]}}
"""


def lines(folder: Path) -> list[dict]:
    return [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Machines(NamedTuple):
    """Two hosts, and where what they print is kept."""

    hosts: list[Host]
    logs: Path

    def start(self, command: Callable[[Host], list[str]], log: str, **more: str) -> list[subprocess.Popen[bytes]]:
        """A command on each, with a cache of its own, and a CPU in place of a GPU."""
        return [
            host.start(
                command(host),
                self.logs / f"{log}-{number}",
                **{"ACCELERATE_USE_CPU": "true", "XDG_CACHE_HOME": str(host.folder / "cache"), **more},
            )
            for number, host in enumerate(self.hosts)
        ]

    def ended(self, started: list[subprocess.Popen[bytes]]) -> list[int]:
        try:
            return [process.wait(300) for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def shown(self, log: str) -> list[str]:
        return [(self.logs / f"{log}-{number}").read_text() for number in range(len(self.hosts))]


@pytest.fixture
def machines(tmp_path):
    with hosts(2, tmp_path) as made:
        yield Machines(made, tmp_path)


def test_a_machine_vanishes_and_the_run_goes_on(pair, tmp_path, machines):
    """Begun with DDP in a folder that both see, by accelerate's launcher; ended by torchrun, with FSDP2 and in a folder
    that only the main one sees. The steps are those of one process."""
    (tmp_path / "mine.py").write_text(MINE.format(place=str(tmp_path)))
    functions = {"rewards": f"{tmp_path / 'mine.py'}:reward", "rollout": f"{tmp_path / 'mine.py'}:rollout"}
    options = {"steps": 4, "checkpoint_every": 2, "eval_every": 0, "minibatch_size": 64, **functions}
    options |= {"budget_price": 0}  # completions of a prompt are equal, and with it their worth is nothing but rounding
    shared = machines.hosts[0].folder / "runs"
    run, configuration = shared / "r", CONFIGURATIONS / "ddp.yaml"
    given = arguments(pair, shared, prompts_per_step=2, **options)
    started = machines.start(
        lambda host: accelerate(host, machines.hosts, configuration, "cmdp_fast.cli", *given),
        "lost",
        CMDP_FAST_PATIENCE="10",
    )
    while not all((tmp_path / rank).exists() for rank in "01"):  # both are in the third step
        assert all(process.poll() is None for process in started), machines.shown("lost")
        time.sleep(0.1)
    machines.hosts[1].link("down")
    (tmp_path / "go").touch()
    assert 0 not in machines.ended(started)
    for number, shown in enumerate(machines.shown("lost")):  # each has a user who looks at it
        assert "error: another process is gone, or cannot be reached (Timed out waiting" in shown
        assert f"{run} stopped in step 3 of 4; its last checkpoint is of step 2. Start it again on all" in shown
        assert "student/ summary.json" not in shown  # two were needed for it, or one could not know
        assert ("2 hosts, 2 processes, DDP, float32\n" in shown) == (number == 0)

    machines.hosts[1].link("up")
    again = ["train", "--resume=runs/r", *(f"--{name}={value}" for name, value in functions.items())]
    sharded = gloo_averages()
    module, more = ("fsdp_on_cpu", SHARDING) if sharded else ("cmdp_fast.cli", {})
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    started = machines.start(
        lambda host: torchrun(host, machines.hosts, module, *again), "again", PYTHONPATH=path, **more
    )
    assert machines.ended(started) == [0, 0], machines.shown("again")
    shown = machines.shown("again")[0]
    assert f"2 hosts, 2 processes, {'FSDP2 over 2' if sharded else 'DDP'}, float32\n" in shown
    assert "runs/r goes on after step 2" in shown and (run / "student").exists()
    assert not (machines.hosts[1].folder / "runs").exists()

    assert main(arguments(pair, tmp_path / "one", prompts_per_step=4, **options)) == 0
    close(lines(run), lines(tmp_path / "one" / "r"))

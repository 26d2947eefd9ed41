"""benchmarks/host_cost.py: every function of the backend is called, without a GPU and without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "host_cost.py"


def test_every_function_is_measured(tmp_path):
    from cmdp_fast import kernels

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, SCRIPT, "--rounds", "1", "--calls", "2", "--json", tmp_path / "figures.json"]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"torch.add(out=)"} | {name for name in kernels.__all__ if name.islower()}
    assert all(figure["microseconds"] > 0 and figure["units"] > 0 for figure in figures.values())

"""benchmarks/call_cost.py: what it times is every public operation, and it prints and writes what it says."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmdp_fast.cpu import native
from cmdp_fast.ops.operator import DECLARED, Operator

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "call_cost.py"
ELSEWHERE = ("sharded_", "test_")  # for ranks that share a vocabulary; those of tests


def script():
    spec = importlib.util.spec_from_file_location("call_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(native is None, reason="the native module is not built")
def test_every_operator_is_called(monkeypatch):
    called = set()
    call = Operator.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            Operator, "__call__", lambda operator, given: (called.add(operator.name), call(operator, given))[1]
        )
        for timed in script().calls("cpu").values():
            timed()
    left_out = {"token_stats_backward_", "constrained_scan"}  # another way to write; for jsd and linear heads
    assert called | left_out == {name for name in DECLARED if not name.startswith(ELSEWHERE)}


def test_it_prints_a_line_per_operation_and_writes_the_same(tmp_path):
    file = tmp_path / "cost.json"
    command = [sys.executable, str(SCRIPT), "--rounds", "1", "--json", str(file)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    written = json.loads(file.read_text())
    assert written["torch"] == torch.__version__ and written["calls"]["torch.add(out=)"]["units"] == 1
    assert [line.split("  ")[0].strip() for line in printed] == list(written["calls"])
    assert all(cost["microseconds"] > 0 for cost in written["calls"].values())

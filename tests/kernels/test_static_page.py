"""Tables of the page on the GPU kernels' machine code; the page itself is held by tests/bench/test_bench_results.py."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "gpu-static"
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
sys.path.append(str(ROOT / "benchmarks"))
static_page = importlib.import_module("static_page")


@pytest.fixture(scope="module")
def found():
    return json.loads((FOLDER / "static_gpu.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def versions():
    return json.loads((FOLDER / "triton_versions.json").read_text(encoding="utf-8"))


def test_a_bound_in_milliseconds(found):
    limits = {"memory": 2.0, "issue": 1.0, "exponentials": 3.0, "bound": "issue"}
    rows = static_page.bounds([found["reports"][0] | {"predicted": {"A100": limits}}])
    # 1024 x 151936 columns at 10^12 a second
    assert rows[1][3:] == ["A100", "2.00", "1.00", "3.00", "issue", "0.156"]


def test_versions_stand_beside_each_other(versions):
    names = list(versions)
    assert names == sorted(names, key=lambda name: [int(n) for n in name.split(".")]) and len(names) >= 2
    one, other = names[0], names[-1]
    row = {"kernel": "a.kernel", "dtype": "bfloat16", "registers": 40, "occupancy": 0.75, "spills": 0}
    row |= {"spills_in_loop": 0, "instructions_a_column": 16.96}
    spills = row | {"spills": 2, "spills_in_loop": 1, "instructions_a_column": 0.0}
    alone = row | {"kernel": "another.kernel"}
    assert static_page.versions_table({one: [row], other: [spills, alone]}) == [
        ["kernel", "dtype", one, other],
        ["a.kernel", "bfloat16", "17.0, 40 registers, 75%", "40 registers, 75%, 2 spills, 1 in the loop"],
        ["another.kernel", "bfloat16", "", "17.0, 40 registers, 75%"],
    ]


def test_the_plot(tmp_path, found):
    static_page.draw(tmp_path / "plots" / "bounds.png", found["reports"])
    assert (tmp_path / "plots" / "bounds.png").read_bytes().startswith(b"\x89PNG")

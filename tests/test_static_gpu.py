"""The machine code of the kernels for a GPU that need not be there: benchmarks/static_gpu.py must find the bars met."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "static_gpu.py"
FOLD, BACKWARD = "token_stats.fold_kernel", "token_stats_backward.backward_kernel"
MIXTURE, SEQUENCE = "mixture.mixture_kernel", "constrained.sequence_kernel"

# Two nested loops and a branch forwards, as nvdisasm prints them.
SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.U16 R4, desc[UR6][R2.64] ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0030*/              @!P1 LDG.E.64.CONSTANT R8, desc[UR6][R2.64] ;
        /*0040*/                   MUFU.EX2 R8, R8 ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   LDG.E R9, desc[UR6][R2.64] ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
"""


@pytest.fixture(scope="module")
def static_gpu():
    spec = importlib.util.spec_from_file_location("static_gpu", SCRIPT)
    module = sys.modules["static_gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """What the script says of bfloat16 logits on sm_90: in a process of its own, because the tests may run with the
    interpreter instead of the compiler."""
    out = tmp_path_factory.mktemp("static") / "reports.json"
    command = [sys.executable, SCRIPT, "--arch", "90", "--dtype", "bfloat16", "--vocab", "151936", "50257"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    outcome = subprocess.run([*command, "--json", out], env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(out.read_text()), outcome.stdout


@pytest.fixture(scope="module")
def reports(survey):
    """By kernel: rows that begin at multiples of 16 bytes."""
    return {report["kernel"]: report for report in survey[0] if report["vocab"] == 151936}


def test_statistics_kernel_reaches_its_bars(static_gpu, reports):
    report = static_gpu.Report(**reports[FOLD])
    report.loads = {int(bits): times for bits, times in report.loads.items()}
    assert static_gpu.missed_bars(report) == []
    assert report.columns == 16 and report.bytes_a_column == 4


def test_bars_can_be_missed(static_gpu, reports):
    report = static_gpu.Report(**reports[FOLD])
    report.loads, report.barriers, report.local, report.registers = {128: 3, 16: 2}, 1, 8, 255
    report.exponentials_a_column, report.instructions_a_column, report.occupancy = 2.6, 23.1, 0.4
    report.shuffles, report.loop = 5, False
    assert len(static_gpu.missed_bars(report)) == 8


def test_no_kernel_spills(reports):
    assert len(reports) >= 8
    for name, report in reports.items():
        assert report["local"] == 0, name


def test_backward_moves_three_matrices_by_wide_loads(reports):
    report = reports[BACKWARD]
    assert report["bytes_a_column"] == 6
    assert report["loads"] == {"128": 4} and report["columns"] == 16
    assert report["barriers"] == 0 and report["shuffles"] == 0
    assert report["instructions_a_column"] <= 18 and report["occupancy"] >= 0.5


def test_sums_are_added_in_the_same_order_wherever_a_row_lies(survey, reports):
    """Rows that do not begin at multiples of 16 bytes are loaded otherwise, but reduced over the same lanes."""
    odd = {report["kernel"]: report for report in survey[0] if report["vocab"] == 50257}
    assert {FOLD, MIXTURE, BACKWARD} <= odd.keys()
    for kernel in (FOLD, MIXTURE):
        assert set(odd[kernel]["loads"]) == {"16"} and set(reports[kernel]["loads"]) == {"128"}
        assert odd[kernel]["lanes"] == reports[kernel]["lanes"] and len(odd[kernel]["lanes"]) == 1, kernel
    assert odd[BACKWARD]["lanes"] == []
    # A statistic is the same whichever of the two kernels finishes it.
    finish, sequence = (set(reports[name]["lanes"]) for name in ("token_stats.finish_kernel", SEQUENCE))
    assert finish and finish <= sequence


def test_bounds_are_labelled(survey):
    _, printed = survey
    bounds = printed[printed.index("PREDICTED, NOT MEASURED") :]
    assert "H100" in bounds and "H200" in bounds
    assert all("predicted" in line for line in bounds.splitlines()[1:])


def test_the_innermost_loop_that_loads_most(static_gpu):
    code = static_gpu.parse_sass(SASS)
    assert len(code) == 12
    names = [i.name for i in static_gpu.main_loop(code)]
    assert names == ["LDG.E.128", "LDG.E.64.CONSTANT", "MUFU.EX2", "BRA"]
    assert static_gpu.main_loop(code[-2:]) is None


def test_widths_of_loads(static_gpu):
    bits = {"LDG.E.128": 128, "LDG.E.64.CONSTANT": 64, "LDG.E": 32, "LDG.E.U16": 16, "LDS.128": 0, "STG.E.128": 0}
    bits |= {"global_load_dwordx4": 128, "global_load_dword": 32, "buffer_load_ushort": 16, "ds_read_b32": 0}
    for name, want in bits.items():
        assert static_gpu.load_bits(name) == want, name


def test_occupancy(static_gpu):
    """By hand: 65536 registers, given out by 256 a warp, and 64 warps; 228 KiB of memory, of which 1 KiB a block."""
    assert static_gpu.occupancy(registers=63, shared=0, threads=256, arch="90") == 0.5
    assert static_gpu.occupancy(registers=65, shared=0, threads=256, arch="90") == 0.375
    assert static_gpu.occupancy(registers=32, shared=0, threads=256, arch="90") == 1
    assert static_gpu.occupancy(registers=32, shared=100 * 1024, threads=256, arch="90") == 0.25
    assert static_gpu.occupancy(registers=16, shared=0, threads=32, arch="90") == 0.5


def test_prediction(static_gpu):
    """One multiprocessor of 1 GHz: 128 instructions, 16 exponentials a nanosecond and 100 bytes of memory."""
    device = static_gpu.Device("small", "90", multiprocessors=1, gigahertz=1.0, terabytes=0.1)
    empty = {"kernel": "k", "arch": "90", "dtype": "bfloat16", "vocab": 1, "threads": 32, "registers": 1, "shared": 0}
    report = static_gpu.Report(**empty, local=0, occupancy=1.0, instructions=1, loop=True)
    report.bytes_a_column, report.instructions_a_column, report.exponentials_a_column = 4, 16.0, 2.0
    limits = static_gpu.predict(report, device)
    assert limits == {"memory": 0.025, "issue": 0.008, "exponentials": 0.008, "bound": "issue"}
    report.instructions_a_column = 4.0
    assert static_gpu.predict(report, device)["bound"] == "exponentials"

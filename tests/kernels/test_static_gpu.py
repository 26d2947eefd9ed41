"""The machine code of the kernels for a GPU that need not be there: benchmarks/static_gpu.py must find the bars met."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "static_gpu.py"
sys.path.append(str(SCRIPT.parent))
FOLD, BACKWARD = "token_stats.fold_kernel", "token_stats_backward.backward_kernel"
MIXTURE = "mixture.mixture_kernel"

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
    return importlib.import_module("static_gpu")


@pytest.fixture(scope="module")
def machine_code():
    return importlib.import_module("machine_code")


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """The script's figures of bfloat16 logits on sm_90: in a process of its own, because the tests may run with the
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


def test_statistics_kernel_reaches_its_bars(machine_code, reports):
    report = machine_code.Report(**reports[FOLD])
    report.loads = {int(bits): times for bits, times in report.loads.items()}
    assert machine_code.missed_bars(report) == []
    assert report.columns == 16 and report.bytes_a_column == 4


def test_bars_can_be_missed(machine_code, reports):
    report = machine_code.Report(**reports[FOLD])
    report.loads, report.barriers, report.local, report.registers = {128: 3, 16: 2}, 1, 8, 255
    report.exponentials_a_column, report.instructions_a_column, report.occupancy = 2.6, 23.1, 0.4
    report.shuffles, report.loop = 5, False
    assert len(machine_code.missed_bars(report)) == 8


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


@pytest.mark.parametrize("arch, speaks", [("cuda 75", False), ("cuda 80", True), ("hip gfx942", False)])
def test_assembly_is_written_only_for_gpus_that_take_it(arch, speaks, static_gpu, monkeypatch):
    from cmdp_fast.kernels import launch

    backend, name = arch.split()
    target = static_gpu.GPUTarget(backend, int(name) if name.isdigit() else name, 32)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=static_gpu.NamedGPU(target)))
    monkeypatch.setattr(launch, "knobs", SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    assert launch.speaks_ptx() == speaks


CUDA = ("cuda.token_stats_kernel", "cuda.constrained_kernel", "cuda.backward_kernel")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")


@needs_nvcc
def test_cuda_kernels_reach_the_bars(machine_code, reports):
    assert set(CUDA) <= reports.keys()
    for name in CUDA:
        report = machine_code.Report(**reports[name])
        report.loads = {int(bits): times for bits, times in report.loads.items()}
        assert machine_code.missed_bars(report) == [], name
        assert report.columns == 16 and report.loads == {128: 4} and report.shared <= 12 * 1024, name
    statistics, _, backward = (reports[name] for name in CUDA)
    assert statistics["instructions_a_column"] - statistics["branched_a_column"] <= 15.5
    assert statistics["exponentials_a_column"] <= 2.125 and backward["exponentials_a_column"] == 2
    assert statistics["bytes_a_column"] == 4 and backward["bytes_a_column"] == 6
    assert backward["instructions_a_column"] <= 16.5


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "100"])
def test_cuda_kernels_reach_the_bars_on_other_gpus(arch, machine_code):
    reports = importlib.import_module("static_cuda").survey([arch], ["bfloat16"], 151936)
    assert len(reports) == len(CUDA)
    for report in reports:
        assert machine_code.missed_bars(report) == [], report.kernel


def test_instructions_that_a_branch_skips(machine_code):
    code = [
        machine_code.Instruction(name, to)
        for name, to in [("A", None), ("BRA", 4), ("B", None), ("C", None), ("BRA", 1)]
    ]
    assert machine_code.count_branched(code[1:], 1) == 2


def test_bounds_are_labelled(survey):
    _, printed = survey
    bounds = printed[printed.index("PREDICTED, NOT MEASURED") :]
    assert "H100" in bounds and "H200" in bounds
    assert all("predicted" in line for line in bounds.splitlines()[1:])


def test_the_innermost_loop_that_loads_most(machine_code):
    code = machine_code.parse_sass(SASS)
    assert len(code) == 12
    names = [i.name for i in machine_code.main_loop(code)]
    assert names == ["LDG.E.128", "LDG.E.64.CONSTANT", "MUFU.EX2", "BRA"]
    assert machine_code.main_loop(code[-2:]) is None


def test_widths_of_loads(machine_code):
    bits = {"LDG.E.128": 128, "LDG.E.64.CONSTANT": 64, "LDG.E": 32, "LDG.E.U16": 16, "LDS.128": 0, "STG.E.128": 0}
    bits |= {"global_load_dwordx4": 128, "global_load_dword": 32, "buffer_load_ushort": 16, "ds_read_b32": 0}
    for name, want in bits.items():
        assert machine_code.load_bits(name) == want, name


def test_occupancy(machine_code):
    """By hand: 65536 registers, given out by 256 a warp, and 64 warps; 228 KiB of memory, of which 1 KiB a block."""
    assert machine_code.occupancy(registers=63, shared=0, threads=256, arch="90") == 0.5
    assert machine_code.occupancy(registers=65, shared=0, threads=256, arch="90") == 0.375
    assert machine_code.occupancy(registers=32, shared=0, threads=256, arch="90") == 1
    assert machine_code.occupancy(registers=32, shared=100 * 1024, threads=256, arch="90") == 0.25
    assert machine_code.occupancy(registers=16, shared=0, threads=32, arch="90") == 0.5


def test_prediction(machine_code):
    """One multiprocessor of 1 GHz: 128 instructions, 16 exponentials a nanosecond and 100 bytes of memory."""
    device = machine_code.Device("small", "90", multiprocessors=1, gigahertz=1.0, terabytes=0.1)
    empty = {"kernel": "k", "arch": "90", "dtype": "bfloat16", "vocab": 1, "threads": 32, "registers": 1, "shared": 0}
    report = machine_code.Report(**empty, local=0, occupancy=1.0, instructions=1, loop=True)
    report.bytes_a_column, report.instructions_a_column, report.exponentials_a_column = 4, 16.0, 2.0
    limits = machine_code.predict(report, device)
    assert limits == {"memory": 0.025, "issue": 0.008, "exponentials": 0.008, "bound": "issue"}
    report.instructions_a_column = 4.0
    assert machine_code.predict(report, device)["bound"] == "exponentials"

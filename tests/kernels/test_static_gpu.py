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
TAIL, TAIL_BACKWARD = "tail.fold_kernel", "tail_backward.backward_kernel"
# What a kernel may spill, once before its loop and once after it, where that costs a per cent or less. The mixture's:
# Triton 3.6 and 3.7 hold its registers down to 64, with which more programs run at a time than with the 72 and 73 of
# 3.5 and 3.4. The tile's: its end merges in double; Triton 3.5 spills a register (teacher kept) and 3.8 eight, beside
# the thousand instructions of a thread's loop. 3.4, 3.6, 3.7 and 3.9 spill none.
SPILLS_OUTSIDE_THE_LOOP = {MIXTURE: 2, "token_state.tile_kernel": 16}
# With 24 warps, 4 loads of 128 bits per thread are 48 KB under way in a multiprocessor of an H100, whose share of the
# bandwidth is 25 bytes per nanosecond: 20 KB hide a latency of 0.8 microseconds. Triton 3.4 to 3.7 reach 32 warps.
TILE_OCCUPANCY = 0.375

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
    return {report["kernel"]: report for report in survey[0]["reports"] if report["vocab"] == 151936}


@pytest.fixture(scope="module")
def tiles(survey, static_gpu):
    """By dtypes of student, teacher and gradient, the kernel that reads a tile of `linear_token_stats`."""
    found = {case.dtypes: [r for r in survey[0]["reports"] if r["dtype"] == case.dtypes] for case in static_gpu.TILES}
    return {dtypes: next(r for r in reports if r["columns"]) for dtypes, reports in found.items()}


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
    report.local, report.spills = 0, 1
    assert len(machine_code.missed_bars(report)) == 8
    report.spills = 0
    assert len(machine_code.missed_bars(report)) == 7


def test_no_kernel_spills_where_it_costs(survey):
    """On any supported version of Triton: nothing within a loop, and nothing at all but for what is named above."""
    reports = survey[0]["reports"]
    assert len(reports) >= 8
    for report in reports:
        assert report["spills_in_loop"] == 0, report
        assert report["spills"] <= SPILLS_OUTSIDE_THE_LOOP.get(report["kernel"], 0), report
        assert report["local"] <= 8 * report["spills"], report  # an instruction moves up to two registers


def test_spills_are_counted(machine_code):
    code = machine_code.parse_sass(SASS.replace("MUFU.EX2 R8, R8", "STL [R1], R8").replace("LDC R1, c", "LDL R2, c"))
    empty = {"kernel": "k", "arch": "90", "dtype": "bfloat16", "vocab": 1, "threads": 32, "registers": 1, "shared": 0}
    report = machine_code.Report(**empty, local=0, spills=0, occupancy=1.0, instructions=len(code), loop=False)
    machine_code.look_at_loop(report, code, None)
    assert machine_code.count(code, *machine_code.SPILLS) == 2 and report.spills_in_loop == 1


def test_a_tile_is_read_once_by_wide_loads(tiles, machine_code):
    """Float32 logits as the products leave them, or a teacher's that were kept in half precision; the gradient leaves
    in half precision, so that no pass casts it."""
    moved = {
        "float32": 8,
        "float32, bfloat16": 6,
        "float32 > bfloat16": 8 + 2,
        "float32, bfloat16 > bfloat16": 6 + 2,
    }
    assert {dtypes: report["bytes_a_column"] for dtypes, report in tiles.items()} == moved
    for dtypes, report in tiles.items():
        assert set(report["loads"]) <= {"64", "128"}, dtypes  # 4 columns of a half are 64 bits
        assert set(report["loads"]) == {"128"} or "float32, bfloat16" in dtypes, dtypes
        assert report["barriers"] == 0 and report["shuffles"] == 0 and report["loop"], dtypes
        assert report["instructions_a_column"] <= machine_code.BAR_INSTRUCTIONS, dtypes
        assert report["occupancy"] >= TILE_OCCUPANCY, dtypes


def test_the_plan_has_the_launches_of_a_tile(survey):
    """The kernels that the launchers start stand in the JSON, and the plan counts as many per tile."""
    found = survey[0]
    launches = found["launches_of_a_tile"]
    assert len(launches["float32"]) == len(launches["float32, bfloat16"]) in (1, 2)
    assert launches["float32 > bfloat16"] == [BACKWARD]
    line = next(p for p in found["launch_plan"]["linear_token_stats"] if "saved=recompute" in p["plan"])
    assert line["direction"] == "forward" and line["launches"] % (2 + len(launches["float32"])) == 0
    assert found["triton"].count(".") == 2


def test_backward_moves_three_matrices_by_wide_loads(reports):
    report = reports[BACKWARD]
    assert report["bytes_a_column"] == 6
    assert report["loads"] == {"128": 4} and report["columns"] == 16
    assert report["barriers"] == 0 and report["shuffles"] == 0
    assert report["instructions_a_column"] <= 18 and report["occupancy"] >= 0.5


def test_a_tail_moves_the_student_alone_by_wide_loads(reports):
    """A tile without listed columns, which the main loop is made for."""
    forward, backward = reports[TAIL], reports[TAIL_BACKWARD]
    assert forward["bytes_a_column"] == 2 and backward["bytes_a_column"] == 4
    for report in (forward, backward):
        assert report["loads"] == {"128": 2} and report["columns"] == 16
        assert report["barriers"] == 0 and report["shuffles"] == 0 and report["loop"]
        assert report["instructions_a_column"] <= 11 and report["occupancy"] >= 0.5


def test_sums_are_added_in_the_same_order_wherever_a_row_lies(survey, reports):
    """Rows that do not begin at multiples of 16 bytes are loaded otherwise, but reduced over the same lanes."""
    odd = {report["kernel"]: report for report in survey[0]["reports"] if report["vocab"] == 50257}
    assert {FOLD, MIXTURE, BACKWARD, TAIL} <= odd.keys()
    for kernel, layouts in ((FOLD, 1), (MIXTURE, 1), (TAIL, 2)):  # a tail's program also reduces its list
        assert set(odd[kernel]["loads"]) == {"16"} and set(reports[kernel]["loads"]) == {"128"}
        assert odd[kernel]["lanes"] == reports[kernel]["lanes"] and len(odd[kernel]["lanes"]) == layouts, kernel
    assert odd[BACKWARD]["lanes"] == []


def test_a_scan_adds_in_the_same_order_padded_and_packed():
    """Whether the compiler knows where sequences begin, and of which numbers their costs are made: the same layouts of
    what is added, hence the same bits."""
    code = """
import static_cases, static_gpu, torch
for launch in (static_cases._budget, static_cases._constrained):
    case = static_cases.Case(launch)
    kernels = dict(static_gpu.compiled(case, 50257, torch.bfloat16, static_gpu.TARGETS["90"]))
    print(static_gpu.reduced_layouts(kernels["scan.scan_kernel"].asm["ttgir"]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packed, padded = done.stdout.splitlines()
    assert packed == padded and packed != "[]"


@pytest.mark.parametrize("arch, speaks", [("cuda 75", False), ("cuda 80", True), ("hip gfx942", False)])
def test_assembly_is_written_only_for_gpus_that_take_it(arch, speaks, static_gpu, monkeypatch):
    from cmdp_fast.kernels import launch

    backend, name = arch.split()
    target = static_gpu.GPUTarget(backend, int(name) if name.isdigit() else name, 32)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=static_gpu.NamedGPU(target)))
    monkeypatch.setattr(launch, "knobs", SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    assert launch.speaks_ptx() == speaks


CUDA = ("cuda.token_stats_kernel", "cuda.constrained_kernel", "cuda.backward_kernel")
CUDA_TAIL = ("cuda.tail_kernel", "cuda.tail_backward_kernel")
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
def test_cuda_kernels_of_a_tail_read_the_student_alone_by_wide_loads(reports):
    """The forward loop has two ways of adding columns, with listed ones among them and without, of which a step takes
    one: its instructions per column are those of both."""
    for name in CUDA_TAIL:
        report = reports[name]
        assert report["loads"] == {"128": 2} and report["columns"] == 16, name
        assert report["barriers"] == report["shuffles"] == report["spills"] == report["local"] == 0, name
        assert report["occupancy"] >= 0.5 and report["shared"] <= 12 * 1024, name
    assert reports[CUDA_TAIL[1]]["instructions_a_column"] <= 10


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "100"])
def test_cuda_kernels_reach_the_bars_on_other_gpus(arch, machine_code):
    reports = importlib.import_module("static_cuda").survey([arch], ["bfloat16"], 151936)
    assert {report.kernel for report in reports} == {*CUDA, *CUDA_TAIL}
    for report in reports:
        if report.kernel in CUDA:
            assert machine_code.missed_bars(report) == [], report.kernel
        assert report.local + report.spills == 0 and report.occupancy >= 0.5, report.kernel


def test_instructions_that_a_branch_skips(machine_code):
    code = [
        machine_code.Instruction(name, to)
        for name, to in [("A", None), ("BRA", 4), ("B", None), ("C", None), ("BRA", 1)]
    ]
    assert machine_code.count_branched(code[1:], 1) == 2


def test_bounds_are_labelled(survey):
    _, printed = survey
    bounds, plan, logits = printed.split("PREDICTED, NOT MEASURED")[1:]
    assert "H100" in bounds and "H200" in bounds
    assert all("predicted" in line for line in bounds.splitlines()[1:] if line)
    assert "linear_token_stats" in plan and "operations on logits" in logits


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
    report = machine_code.Report(**empty, local=0, spills=0, occupancy=1.0, instructions=1, loop=True)
    report.bytes_a_column, report.instructions_a_column, report.exponentials_a_column = 4, 16.0, 2.0
    limits = machine_code.predict(report, device)
    assert limits == {"memory": 0.025, "issue": 0.008, "exponentials": 0.008, "bound": "issue"}
    report.instructions_a_column = 4.0
    assert machine_code.predict(report, device)["bound"] == "exponentials"

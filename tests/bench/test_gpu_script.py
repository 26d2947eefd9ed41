"""`benchmarks/gpu.py`: every phase at toy sizes on a CPU, and what becomes of parts that fail, hang or crash."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import hosted
import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
STATUSES = {"done", "failed", "absent", "left out"}


def run(phase: str, out: Path, *paths: Path, only: str = "", **environment: str):
    """(the finished process, the record) of a small phase or its parts; ``paths`` stand before all others."""
    given = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), str(ROOT)]), **environment}
    given.pop("TRITON_INTERPRET", None)
    if "CMDP_FAST_CUDA_HOST" not in environment:
        given.pop("CMDP_FAST_CUDA_HOST", None)
    command = [sys.executable, str(SCRIPT), phase, "--small", "--seconds", "300", "--out", str(out)]
    command += ["--only", only] if only else []
    done = subprocess.run(command, capture_output=True, text=True, env=given)
    record = json.loads((out / f"{phase}.json").read_text(encoding="utf-8"))
    assert record["phase"] == phase and record["small"] and record["ended"] and record["machine"]["python"]
    assert {part["status"] for part in record["parts"]} <= STATUSES
    names = [part["name"] for part in record["parts"]]
    assert len(names) == len(set(names))
    assert done.stdout.rstrip().splitlines()[-1].startswith(f"{phase}: ")  # the table is last
    return done, record


def statuses(record) -> dict[str, str]:
    return {part["name"]: part["status"] for part in record["parts"]}


def sound(done, record) -> None:
    failed = [part for part in record["parts"] if part["status"] == "failed"]
    assert not failed and done.returncode == 0, (failed, done.stderr[-2000:])


def test_prove(tmp_path):
    done, record = run("prove", tmp_path)
    sound(done, record)
    parts = {part["name"]: part for part in record["parts"]}
    assert parts["versions"]["packages"]["torch"]
    assert parts["check triton: odd logits"]["errors"]["float32"]["gradient"] < 1e-5
    assert parts["check triton: packed completions"]["status"] == "done"
    tests = parts["tests: a few, interpreted"]
    assert tests["counts"]["passed"] > 0 and tests["failures"] == [] and (tmp_path / "tests-0.xml").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not hosted.HOSTED, reason="the CUDA kernels are not compiled for the host")
def test_prove_with_the_cuda_kernels_on_the_host(tmp_path):
    done, record = run("prove", tmp_path, CMDP_FAST_CUDA_HOST="1")
    sound(done, record)
    checks = {name: status for name, status in statuses(record).items() if name.startswith("check cuda")}
    assert len(checks) >= 5 and set(checks.values()) == {"done"}


def test_logits(tmp_path):
    done, record = run("logits", tmp_path)
    sound(done, record)
    parts = {part["name"]: part for part in record["parts"]}
    case = parts["token_stats both 2 rows bfloat16"]["result"]
    assert [v["name"] for v in case["variants"]][:2] == ["token_stats, triton", "eager"]
    assert case["absent"]["token_stats, cuda"] and case["absent"]["trl_logprob"]
    assert case["graph_floors"] == {} and case["variants"][0]["graph_note"] == "no GPU"
    for name in (
        "constrained_reward forward 1 x 2 bfloat16",
        "modified_reward forward 8 sequences float32",
        "autotune table",
    ):
        assert parts[name]["status"] == "done"
    assert parts["sanitizer triton: memcheck"]["status"] == "absent"


def test_linear_without_other_libraries(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for package in ("trl", "liger_kernel", "cut_cross_entropy"):
        (blocked / f"{package}.py").write_text("raise ImportError('blocked')")
    done, record = run("linear", tmp_path / "out", blocked)
    sound(done, record)
    others = next(part for part in record["parts"] if part["name"] == "both, toy, others")["result"]
    assert others["absent"]["trl_divergence"] == "cannot be imported: blocked"
    assert [v["peer"] for v in others["variants"]] == ["", "eager"]
    tiles = next(part for part in record["parts"] if part["name"] == "both, toy, tiles")["result"]
    assert len(tiles["variants"]) == 2


def test_train(tmp_path):
    for package in ("transformers", "accelerate", "tyro", "datasets", "tensorboard", "trl"):
        pytest.importorskip(package)
    done, record = run("train", tmp_path)
    sound(done, record)
    assert set(statuses(record).values()) == {"done"}
    steps = record["parts"][0]["steps"]
    assert len(steps) == 3 and set(steps[0]["seconds"]) >= {"rollout", "scoring", "update"}
    killed = next(part for part in record["parts"] if part["name"] == "kill and resume")
    assert killed["bitwise"] and len(killed["resumed"]) == 3


def test_a_part_that_fails_is_recorded_and_the_phase_goes_on(tmp_path):
    for package in ("transformers", "datasets", "trl"):
        pytest.importorskip(package)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tyro.py").write_text("raise RuntimeError('broken on purpose\\nand more')")
    done, record = run("train", tmp_path / "out", broken, only="three steps, tiled")
    first, second = record["parts"]
    assert first["status"] == "failed" and first["error"] == "RuntimeError: broken on purpose"
    assert any("tyro.py" in line for line in first["trace"])
    assert done.returncode == 1 and "broken on purpose" in done.stdout
    assert second["name"] == "three steps, tiled, gradient checkpointing" and second["status"] == "failed"


# What a worker may do, without a package: the parts are named after it.
WORKER = """
import os, sys, time
from pathlib import Path
from phases.record import Missing, Part, Record, run_parts

def absent(): raise Missing("there is no such thing")
def fails(): raise ValueError("first line\\nsecond line")
def checks(): return {"problems": ["3 is not 4"], "figure": float("nan")}
def hangs():
    if os.fork() == 0: time.sleep(600)
    time.sleep(600)
record = Record.read(Path(sys.argv[1]))
parts = [Part("fails", 1, fails), Part("absent", 1, absent), Part("crashes", 1, os.abort), Part("checks", 1, checks),
         Part("lost", 1, fails), Part("hangs", -9.5, hangs), Part("long", 1e6, fails),
         Part("well", 1, lambda: {"summary": "good"})]
alive = lambda: record.running is None and record.parts[-1]["name"] != "lost"
sys.exit(0 if run_parts(record, parts, alive) else 75)
"""


@pytest.fixture
def phases(monkeypatch):
    """The package of the phases, as the script sees it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from phases import record, supervise

    return record, supervise


def test_no_part_takes_another_with_it(tmp_path, phases, capsys):
    record, supervise = phases
    path, worker = tmp_path / "fake.json", tmp_path / "worker.py"
    worker.write_text(WORKER)
    record.Record.new(path, "fake", "a command", True, 60.0)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    ended = supervise.supervise([sys.executable, str(worker), str(path)], environment, path)
    parts = {part["name"]: part for part in ended.parts}
    assert list(parts) == ["fails", "absent", "crashes", "checks", "lost", "hangs", "long", "well"]
    assert parts["fails"]["error"] == "ValueError: first line" and "fails()" not in parts["fails"]["error"]
    assert parts["absent"] | {"seconds": 0} == {
        "name": "absent", "status": "absent", "seconds": 0, "reason": "there is no such thing"
    }  # fmt: skip
    assert parts["crashes"]["error"] == "the process was ended by SIGABRT"
    assert parts["checks"]["status"] == "failed" and parts["checks"]["error"] == "3 is not 4"
    assert parts["checks"]["figure"] is None  # JSON has no NaN
    assert parts["hangs"]["error"].startswith("it hung: killed")
    assert parts["long"]["status"] == "left out" and parts["well"]["status"] == "done"
    assert len(ended.failures) == 5 and ended.content["ended"]
    table = ended.table().splitlines()
    assert table[-1].startswith("fake: 1 done, 5 failed, 1 absent, 1 left out") and "good" in table[-2]


def test_time_that_is_up_ends_the_phase_and_its_children(tmp_path, phases):
    record, supervise = phases
    path, worker = tmp_path / "fake.json", tmp_path / "worker.py"
    worker.write_text(WORKER.replace("parts = [", "parts = [Part('sleeps', 1, hangs), "))
    record.Record.new(path, "fake", "a command", True, 2.5)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    ended = supervise.supervise([sys.executable, str(worker), str(path)], environment, path)
    assert ended.parts[0]["error"] in ("the phase's time was up", "it hung: killed after 2 s")
    assert ended.content["ended"] and ended.parts[0]["status"] == "failed"
    left = subprocess.run(["ps", "-ef"], capture_output=True, text=True).stdout
    assert str(worker) not in left


def test_a_worker_that_cannot_begin_is_told(tmp_path, phases):
    record, supervise = phases
    path = tmp_path / "fake.json"
    record.Record.new(path, "fake", "a command", True, 60.0)
    ended = supervise.supervise([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), path)
    assert ended.parts[-1]["error"] == "the process ended with exit code 3" and len(ended.parts) == 2


def test_arguments_that_cannot_be_used():
    for arguments in (["play"], ["prove", "--seconds", "0"], ["prove", "--tiny"]):
        done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and "error" in done.stderr


NCU = """\
==PROF== Connected to process 7
==PROF== Profiling "fold_kernel" - 0: 0%....50%....100% - 1 pass
every kernel ran
==PROF== Disconnected from process 7
"ID","Kernel Name","Grid Size","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"launch__registers_per_thread","sm__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__warps_active.avg.pct_of_peak_sustained_active"
"","","","%","ns","register/thread","%","%"
"0","fold_kernel","(5120, 1, 1)","88.5","216,512","40","51.25","70.1"
"1","backward_kernel(float*)","(9, 1, 1)","n/a","1","40","1","1"
"""


def test_the_tables_of_profilers_are_read(tmp_path, monkeypatch, phases):
    """Programs of these names that print what the real ones do, over a program that prints what ours does."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "support"))
    from phases import setting, tools

    def program(name: str, text: str, code: int = 0) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {code}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tools, "need_backend", lambda name: None)
    here = setting.Setting(True, "cpu", tmp_path / "a.log", lambda: 60.0)
    program("ncu", NCU)
    figures = tools.profile_part(here, "a", 2, 100, "logits").run()
    kernel = {"kernel": "fold_kernel", "grid": "(5120, 1, 1)", "dram %": 88.5, "sm %": 51.25, "registers": 40.0}
    assert figures["kernels"] == [kernel | {"occupancy %": 70.1, "us": 216.51}]
    program("ncu", "==ERROR== ERR_NVGPUCTRPERM\n", 1)
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        tools.profile_part(here, "a", 2, 100, "logits").run()

    part = tools.sanitizer_parts(here)[0]
    program("compute-sanitizer", "every kernel ran\n========= ERROR SUMMARY: 0 errors\n")
    assert part.run()["problems"] == []
    program("compute-sanitizer", "Invalid __global__ write\nevery kernel ran\n========= ERROR SUMMARY: 10 errors\n", 9)
    assert part.run()["problems"] == ["ERROR SUMMARY: 10 errors", "Invalid __global__ write"]
    program("compute-sanitizer", "========= Error: Device not supported\n", 1)
    assert part.run()["problems"] == ["========= Error: Device not supported"]


def test_a_replayed_graph_goes_through_every_set(monkeypatch, phases):
    """With a stand-in for CUDA's graphs: the calls of a capture are made, those of a replay are not."""
    import contextlib

    import torch
    from phases import timing

    from cmdp_fast.bench.variant import Variant

    seen, clock = [], iter(range(1000))
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})()
    fakes = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "set_sync_debug_mode": lambda _: None,
        "CUDAGraph": lambda: type("Graph", (), {"replay": lambda self: seen.append("replay")})(),
        "graph": lambda _: contextlib.nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "elapsed", lambda function, device: (function(), next(clock) * 0 + 0.5e-3)[1])
    sets = [{"student": torch.full((3,), float(i))} for i in range(3)]

    def run(inputs):
        seen.append(float(inputs["student"][0]))
        return inputs["student"].mul_(-1) if inputs["student"].data_ptr() not in originals else None

    originals = {s["student"].data_ptr() for s in sets}
    times = timing.replay(Variant("a", run), sets)
    calls = seen[2 : seen.index("replay")]
    assert calls[:4] == [0.0, 1.0, 2.0, 0.0] and len(calls) == 10 * 4 and times == [0.5 / 40] * timing.REPEAT
    seen.clear()
    inplace = Variant("b", run, prepare=lambda s: {"student": s["student"].clone()})
    timing.replay(inplace, sets)
    assert seen[2 : seen.index("replay")] == [0.0, 1.0, 2.0]  # each once, and as it was given


def test_a_value_that_is_off_or_was_not_written_is_a_problem(tmp_path, monkeypatch, phases):
    """On plain PyTorch in the place of a GPU backend."""
    from phases import checks, setting
    from phases.operations import Batch

    here = setting.Setting(True, "cpu", tmp_path / "a.log", lambda: 60.0)
    inputs, right = checks.Inputs("odd", 3, 101, masked=True), Batch.statistics
    assert checks.against_float64(here, "torch", inputs)["problems"] == []

    def off(self, *arguments):
        found = right(self, *arguments)
        return found | {"entropy": found["entropy"] + 1e-4}

    def unwritten(self, *arguments):
        found = right(self, *arguments)
        found["gradient"][0, 0] = float("nan")
        return found

    monkeypatch.setattr(Batch, "statistics", off)
    problems = checks.against_float64(here, "torch", inputs)["problems"]
    assert len(problems) == 2 and all("entropy: error 0.0001" in problem for problem in problems)
    monkeypatch.setattr(Batch, "statistics", unwritten)
    assert "float32 gradient is not finite" in checks.against_float64(here, "torch", inputs)["problems"]


def test_a_record_names_no_place_of_one_machine(tmp_path, phases):
    record, _ = phases
    root, out = record.ROOT, tmp_path / "out"
    out.mkdir()
    made = record.Record.new(out / "prove.json", "prove", "prove", True, 60)
    made.content["parts"] = [
        {
            "command": [f"{root}/tests/ops", f"--rootdir={root}", f"--junit-xml={out}/tests-0.xml"],
            "error": f"no {tempfile.gettempdir()}/tmpab_12/runs",
            "seconds": 1.5,
        }
    ]
    made.write()
    assert record.Record.read(out / "prove.json").parts == [
        {
            "command": ["tests/ops", "--rootdir=.", "--junit-xml=tests-0.xml"],
            "error": "no TMP/runs",
            "seconds": 1.5,
        }
    ]

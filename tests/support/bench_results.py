"""A run as it may come out, made up."""

from dataclasses import asdict, replace

from cmdp_fast.bench.case import SHAPES, Work
from cmdp_fast.bench.results import BenchmarkRun, CaseResult, Measured, PeakGrowth


def result(**changes) -> CaseResult:
    ours = Measured("ours", "", "", [1.0, 2.0, 4.0], {"logprob": 1e-7}, PeakGrowth(2**20, 0, 64 * 2**20))
    peer = Measured("peer", "eager", "entropy", [3.0, 4.0, 40.0], {"reverse_kl": 2e-6}, None, "no such file")
    base = CaseResult(
        op="token_stats",
        mode="both",
        shape=SHAPES["tiny"],
        dtype="float32",
        device="cpu",
        work=Work(read=2_000_000, written=1_000_000),
        bounds={"both floors": ["read", "copy"]},
        floors={"read": [0.25, 0.25, 0.5], "copy": [0.25, 0.5, 0.5]},
        variants=[ours, peer],
        absent={"compile": "no compiler"},
    )
    return replace(base, **changes)


def run_of(*found: CaseResult, **settings) -> BenchmarkRun:
    machine = {"cpu": "a", "cores": 2, "caches": {"L1": 2**15}, "system": "s", "cmdp_fast": "0", "kernels": "k"}
    machine |= {"threads": 1, "python": "3", "versions": {"torch": "2"}}
    return BenchmarkRun("cmdp-fast bench", machine, {"repeat": 3, "threads": 1}, cases=list(found), **settings)


def phase_record(phase: str = "logits", *, card: str | None = "NVIDIA H100 80GB HBM3", **changes) -> dict:
    """The JSON of a phase of benchmarks/gpu.py as it may come out, made up."""
    timed = result(dtype="bfloat16", device="cuda", graph_floors={"read": [0.25] * 3, "copy": [0.25] * 3})
    timed.ours.graph_ms = [1.0, 1.0, 1.0]
    timed.variants[1].graph_ms = [5.0, 5.0, 5.0]
    machine = run_of().machine | {"driver": "driver 580", "backends": {"triton": None}}
    if card:
        machine["gpu"] = {"name": card, "memory": 80 * 10**9, "multiprocessors": 132, "l2_cache": 50 * 2**20}
    parts = [
        {"name": "token_stats both", "status": "done", "seconds": 3.0, "summary": "1 ms", "result": asdict(timed)},
        {"name": "sanitizer", "status": "absent", "seconds": 0.0, "reason": "there is no compute-sanitizer here"},
        {"name": "worse", "status": "failed", "seconds": 1.0, "error": "ValueError: no", "trace": ["a", "b"]},
    ]
    record = {"format": 1, "phase": phase, "command": f"python benchmarks/gpu.py {phase}", "small": False}
    record |= {"began": "2026-01-01T00:00:00Z", "limit": 480, "ended": "2026-01-01T00:05:00Z", "seconds": 300.0}
    return record | {"machine": machine, "parts": parts} | changes

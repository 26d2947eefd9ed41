"""A run as it may come out, made up."""

from dataclasses import replace

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

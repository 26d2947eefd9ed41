"""The machine code that the compiler writes for real GPUs, read without one, and the bound that it predicts.

    python benchmarks/static_gpu.py [--arch 90 gfx942 --dtype bfloat16 --vocab 151936 --json FILE]

The launchers of `cmdp_fast.kernels` are called on tensors of the real widths, with a driver that names a GPU and
launches nothing. So Triton's own JIT compiles the same kernels as it would there, with the specialisations that it
infers from these very arguments. Where there is an nvcc, the CUDA kernels of csrc/cuda stand beside them
(`static_cuda.py`, for NVIDIA's GPUs). The code is disassembled, and the main loop looked at: of the loops that contain
no other, the one with most exponentials, and most loads. A column is one logit of the student and one of the teacher; a
kernel without a loop over columns is counted as a whole. Instructions that a branch within the loop may skip count, and
are also named apart ("branched"): in the CUDA kernels they raise the references, which few steps have to.

The bound is the slowest of memory (bytes over bandwidth), issue (instructions over issue rate, one per cycle and
scheduler) and exponentials (16 per cycle and multiprocessor). It leaves out the work outside of the loop, latency and
everything else that only a run shows: it is a prediction, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import static_cuda
import torch
from machine_code import (
    Instruction,
    Report,
    local_memory,
    look_at_loop,
    occupancy,
    parse_amdgcn,
    print_bounds,
    print_table,
    read_cubin,
)
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cmdp_fast import kernels
from cmdp_fast.layout import (
    SAVED,
    Account,
    BudgetRule,
    Mixture,
    Pair,
    Rewarding,
    RewardRule,
    Settlement,
    Upstream,
)
from cmdp_fast.reference import BudgetTrace

TARGETS = {name: GPUTarget("cuda", int(name), 32) for name in ("80", "90", "100")} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VOCABULARIES = {151936: "Qwen2.5", 128256: "Llama-3", 50257: "GPT-2, odd"}


# --------------------------------------------------------------------------------------------------------------
# The cases: every launcher, called as the operations call it


def _pair(vocab: int, dtype: torch.dtype, *rows: int) -> Pair:
    student, teacher = (torch.empty(*rows, vocab, dtype=dtype) for _ in range(2))
    tokens, mask = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    return Pair(student, teacher, tokens, mask, 1.0, vocab)


def _statistics(vocab: int, dtype: torch.dtype) -> None:
    kernels.token_stats(_pair(vocab, dtype, 2))


def _backward(vocab: int, dtype: torch.dtype) -> None:
    pair, upstream = _pair(vocab, dtype, 2), Upstream(*[torch.empty(2)] * 4)
    kernels.token_stats_backward(pair, torch.empty(2, SAVED, dtype=torch.float64), upstream, pair.student)


def _mixture(vocab: int, dtype: torch.dtype) -> None:
    pair, weights = _pair(vocab, dtype, 2), Mixture(0.5, 0.5, 0.5)
    _, saved, mean = kernels.mixture(pair, weights)
    kernels.mixture_backward(pair, saved, mean, torch.empty(2), weights, torch.empty_like(pair.student))


def _rewarding(*shape: int) -> Rewarding:
    rule = RewardRule("cmdp", True, penalty=1.0, discrepancy_weight=1.0, coefficient=0.0, barrier_slope=0.0)
    return Rewarding(rule, torch.empty(shape), torch.empty(shape))


def _trace(sequences: int, tokens: int) -> BudgetTrace:
    cumulative, remaining, excess = (torch.empty(sequences, tokens) for _ in range(3))
    violated, first = torch.empty(sequences, tokens, dtype=torch.bool), torch.empty(sequences, dtype=torch.int64)
    return BudgetTrace(cumulative, remaining, violated, first, excess)


def _budget(vocab: int, dtype: torch.dtype) -> None:
    mask, offsets = torch.ones(2, 512, dtype=torch.bool), torch.tensor([0, 512, 1024])
    account, trace = Account(torch.empty(2, 512), mask, offsets), _trace(2, 512)
    kernels.trace_budgets(account, torch.empty(2, dtype=torch.float64), BudgetRule(1.0, False, False), trace)
    kernels.modify_rewards(account, trace, _rewarding(2, 512))


def _constrained(vocab: int, dtype: torch.dtype) -> None:
    length = 16  # a multiple of 16, like most padded batches: the compiler may know where sequences begin
    rule, trace, rewarding = BudgetRule(1.0, False, False), _trace(1, length), _rewarding(1, length)
    settlement = Settlement("reverse_kl", None, 2.0, False, rule, trace, rewarding)
    kernels.constrained_pass(_pair(vocab, dtype, 1, length), settlement)


def _tile(vocab: int, dtype: torch.dtype) -> None:
    kernels.update_states(_pair(vocab, dtype, 2), 0, torch.empty(2, 13, dtype=torch.float64))


@dataclass(frozen=True)
class Case:
    launch: Callable[[int, torch.dtype], None]
    # Matrices that a kernel of this name reads and writes; kernels not named here hold no logits.
    traffic: dict[str, int]


CASES = (
    Case(_statistics, {"token_stats.fold_kernel": 2}),
    Case(_backward, {"token_stats_backward.backward_kernel": 3}),
    Case(_mixture, {"mixture.mixture_kernel": 2, "mixture.backward_kernel": 3}),
    Case(_tile, {}),
    Case(_budget, {}),
    Case(_constrained, {}),
)


class NamedGPU:
    """A driver that says which GPU it is, and drives none."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(case: Case, vocab: int, dtype: torch.dtype, target: GPUTarget) -> Iterator[tuple[str, object]]:
    """(name, compiled kernel) of everything that the case launches."""
    launched = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = f"{self.__module__.rpartition('.')[2]}.{self.__name__}"
        launched.append((name, kernel))
        return kernel

    run, JITFunction.run = JITFunction.run, compile_only
    driver.set_active(NamedGPU(target))
    try:
        case.launch(vocab, dtype)
    finally:
        JITFunction.run = run
    yield from launched


# --------------------------------------------------------------------------------------------------------------
# The figures of the machine code


def reduced_layouts(ir: str) -> list[str]:
    """Shape and layout of every tensor that Triton reduces: sums come out bitwise the same if these are."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", ir, re.MULTILINE))
    shapes = re.findall(r"^ +\}\) : \(tensor<([\dx]+)x\w+, (#\w+)>\) ->", ir, re.MULTILINE)
    return sorted({f"{size} {layouts[name]}" for size, name in shapes})


def read_nvidia(kernel) -> tuple[list[Instruction], int, int]:
    """Instructions, registers and local memory of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code, usage = read_cubin(file.name)
    return code, usage["REG"], local_memory(code, usage)


def read_amd(kernel) -> tuple[list[Instruction], int, int]:
    text = kernel.asm["amdgcn"]
    number = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    return parse_amdgcn(text), number["vgpr_count"], number["private_segment_fixed_size"]


def examine(name: str, kernel, traffic: int, vocab: int, dtype: str, arch: str) -> Report:
    """All figures of one compiled kernel. ``traffic``: how many matrices of logits it moves."""
    target = TARGETS[arch]
    code, registers, local = (read_nvidia if target.backend == "cuda" else read_amd)(kernel)
    threads = kernel.metadata.num_warps * target.warp_size
    shared = kernel.metadata.shared
    busy = occupancy(registers, shared, threads, arch) if target.backend == "cuda" else 0.0
    report = Report(name, arch, dtype, vocab, threads, registers, shared, local, busy, len(code), False)
    report.lanes = reduced_layouts(kernel.asm["ttgir"])
    look_at_loop(report, code, DTYPES[dtype].itemsize, traffic)
    return report


def survey(archs: list[str], dtypes: list[str], vocabularies: list[int]) -> list[Report]:
    """A report of every kernel in every combination. A kernel that holds no logits is reported once per arch."""
    reports: dict[tuple, Report] = {}
    for arch in archs:
        for dtype in dtypes:
            for vocab in vocabularies:
                for case in CASES:
                    for name, kernel in compiled(case, vocab, DTYPES[dtype], TARGETS[arch]):
                        traffic = next((c.traffic[name] for c in CASES if name in c.traffic), 0)
                        key = (name, arch, dtype, vocab) if traffic else (name, arch)
                        if key not in reports:
                            reports[key] = examine(name, kernel, traffic, vocab, dtype, arch)
    return list(reports.values())


# --------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Machine code of the GPU kernels, and a predicted bound.")
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--vocab", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--json", type=Path, help="write the reports here")
    options = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("nothing is compiled under TRITON_INTERPRET=1; unset it")
    reports = survey(options.arch, options.dtype, options.vocab)
    if problem := static_cuda.problem():
        print(f"the CUDA kernels are left out: {problem}")
    else:
        nvidia = [a for a in options.arch if TARGETS[a].backend == "cuda"]
        vocab = next((v for v in options.vocab if v % 8 == 0), options.vocab[0])
        reports += static_cuda.survey(nvidia, options.dtype, vocab)
    print_table(reports)
    print_bounds(reports)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")


if __name__ == "__main__":
    main()

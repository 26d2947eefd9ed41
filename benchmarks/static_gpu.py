"""The machine code that the compiler writes for real GPUs, read without one, and the bound that it predicts.

    python benchmarks/static_gpu.py [--arch 90 gfx942 --dtype bfloat16 --vocab 151936 --json FILE]

The launchers of `cmdp_fast.kernels` are called on tensors of the real widths, with a driver that names a GPU and
launches nothing. So Triton's own JIT compiles the same kernels as it would there, with the specialisations that it
infers from these very arguments. Where there is an nvcc, the CUDA kernels of csrc/cuda stand beside them
(`static_cuda.py`, for NVIDIA's GPUs). The code is disassembled, and the main loop looked at: of the loops that contain
no other, the one with most exponentials, and most loads. A column is one logit of the student and one of the teacher,
in a tail's kernels one of the student; a kernel without a loop over columns is counted as a whole. Instructions that a
branch within the loop may skip count, and are also named apart ("branched"): in the CUDA kernels they raise the
references, which few steps have to, and add columns among which some are listed.

What a whole `linear_token_stats` launches, and how long that would take, follows from numbers alone (`launch_plan.py`).

The bound is the slowest of memory (bytes over bandwidth), issue (instructions over issue rate, one per cycle and
scheduler) and exponentials (16 per cycle and multiprocessor, logarithms and reciprocals included). It leaves out the
work outside of the loop, latency and everything else that only a run shows: it is a prediction, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import launch_plan
import static_cuda
import torch
import triton
from machine_code import (
    SPILLS,
    Instruction,
    Report,
    Traffic,
    count,
    look_at_loop,
    occupancy,
    parse_amdgcn,
    print_bounds,
    print_table,
    read_cubin,
)
from static_cases import CASES, TILE, TILES, Case
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {name: GPUTarget("cuda", int(name), 32) for name in ("80", "90", "100")} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VOCABULARIES = {151936: "Qwen2.5", 128256: "Llama-3", 50257: "GPT-2, odd"}


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


class Read(NamedTuple):
    """What is found in a compiled kernel: `Report` says what the numbers are."""

    code: list[Instruction]
    registers: int
    local: int


def read_nvidia(kernel) -> Read:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code, usage = read_cubin(file.name)
    return Read(code, usage["REG"], usage["STACK"] + usage["LOCAL"])


def read_amd(kernel) -> Read:
    text = kernel.asm["amdgcn"]
    number = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    return Read(parse_amdgcn(text), number["vgpr_count"], number["private_segment_fixed_size"])


def examine(name: str, kernel, traffic: Traffic | None, vocab: int, dtype: str, arch: str) -> Report:
    """All figures of one compiled kernel. ``traffic``: what it moves of matrices of logits."""
    target = TARGETS[arch]
    code, registers, local = (read_nvidia if target.backend == "cuda" else read_amd)(kernel)
    threads = kernel.metadata.num_warps * target.warp_size
    shared = kernel.metadata.shared
    busy = occupancy(registers, shared, threads, arch) if target.backend == "cuda" else 0.0
    size = (registers, shared, local, count(code, *SPILLS), busy, len(code), False)
    report = Report(name, arch, dtype, vocab, threads, *size)
    report.lanes = reduced_layouts(kernel.asm["ttgir"])
    look_at_loop(report, code, traffic)
    return report


def survey(archs: list[str], dtypes: list[str], vocabularies: list[int]) -> list[Report]:
    """A report of every kernel in every combination, and of the tiles of `linear_token_stats` once per arch, where a
    tile's width stands for the vocabulary's. A kernel that holds no logits is reported once per arch."""
    wholes = [(case, dtype, vocab) for dtype in dtypes for vocab in vocabularies for case in CASES]
    tiles = [(case, case.dtypes, TILE[1]) for case in TILES]
    reports: dict[tuple, Report] = {}
    for arch in archs:
        for case, dtype, vocab in [*wholes, *tiles]:
            logits = DTYPES.get(dtype, torch.float32)
            for place, (name, kernel) in enumerate(compiled(case, vocab, logits, TARGETS[arch])):
                traffic = case.traffic(name, place, logits.itemsize)
                key = (name, arch, dtype, vocab) if traffic else (name, arch)
                if key not in reports:
                    reports[key] = examine(name, kernel, traffic, vocab, dtype, arch)
    return list(reports.values())


def launches(arch: str) -> dict[str, list[str]]:
    """The kernels that a tile's statistics and gradient launch, by its dtypes."""
    first = DTYPES["float32"]
    return {case.dtypes: [name for name, _ in compiled(case, TILE[1], first, TARGETS[arch])] for case in TILES}


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
    print(f"compiled by Triton {triton.__version__}")
    reports = survey(options.arch, options.dtype, options.vocab)
    if problem := static_cuda.problem():
        print(f"the CUDA kernels are left out: {problem}")
    else:
        nvidia = [a for a in options.arch if TARGETS[a].backend == "cuda"]
        vocab = next((v for v in options.vocab if v % 8 == 0), options.vocab[0])
        reports += static_cuda.survey(nvidia, options.dtype, vocab)
    print_table(reports)
    print_bounds(reports)
    tiles = launches(next(a for a in TARGETS if a in options.arch))
    plan = launch_plan.record(update_launches=len(tiles["float32"]))
    launch_plan.show(plan)
    if options.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}
        found = versions | {"reports": [asdict(r) for r in reports], "launch_plan": plan, "launches_of_a_tile": tiles}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

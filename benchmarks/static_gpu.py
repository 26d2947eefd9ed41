"""What the compiler writes for real GPUs, read without one: machine code of every Triton kernel, and a predicted bound.

    python benchmarks/static_gpu.py [--arch 90 gfx942 --dtype bfloat16 --vocab 151936 --json FILE]

The launchers of `cmdp_fast.kernels` are called on tensors of the real widths, with a driver that names a GPU and
launches nothing. So Triton's own JIT compiles what it would compile there, with the specialisations that it infers from
these very arguments. The code is disassembled, and the main loop looked at: of the loops that contain no other, the one
with most exponentials, and most loads. A column is one logit of the student and one of the teacher; a kernel without a
loop over columns is counted as a whole.

The bound is the slowest of memory (bytes over bandwidth), issue (instructions over issue rate, one a cycle and
scheduler) and exponentials (16 a cycle and multiprocessor). It leaves out what happens outside the loop, latency and
everything else that only a run shows: it is a prediction, not a measurement.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {name: GPUTarget("cuda", int(name), 32) for name in ("80", "90", "100")} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VOCABULARIES = {151936: "Qwen2.5", 128256: "Llama-3", 50257: "GPT-2, odd"}
# Of the statistics' main loop for bfloat16 logits of 151936 columns on sm_90.
BAR_EXPONENTIALS, BAR_INSTRUCTIONS, BAR_OCCUPANCY = 2.5, 23.0, 0.5


@dataclass(frozen=True)
class Device:
    """Data sheet figures; the clock is the usual one under load."""

    name: str
    arch: str
    multiprocessors: int
    gigahertz: float
    terabytes: float  # a second


DEVICES = (
    Device("A100", "80", 108, 1.41, 2.04),
    Device("H100", "90", 132, 1.75, 3.35),
    Device("H200", "90", 132, 1.75, 4.8),
    Device("B200", "100", 148, 1.85, 8.0),
)


@dataclass
class Report:
    """One kernel, compiled for one architecture. Numbers in the loop are a thread's, ``*_a_column`` a column's."""

    kernel: str
    arch: str
    dtype: str
    vocab: int
    threads: int
    registers: int
    shared: int
    local: int  # bytes of stack and local memory, and instructions that move spilled registers
    occupancy: float
    instructions: int
    loop: bool  # whether the figures below are of a loop, else of the whole kernel
    loads: dict[int, int] = field(default_factory=dict)  # of the loop, by width in bits
    barriers: int = 0
    shuffles: int = 0
    columns: float = 0.0  # in one turn of the loop; 0 of a kernel that holds no logits
    exponentials_a_column: float = 0.0
    instructions_a_column: float = 0.0
    bytes_a_column: int = 0
    predicted: dict[str, dict[str, float | str]] = field(default_factory=dict)
    lanes: list[str] = field(default_factory=list)  # how vectors that are reduced lie over threads


# --------------------------------------------------------------------------------------------------------------
# What is compiled: every launcher, called as the operations call it


def _inputs(vocab: int, dtype: torch.dtype):
    rows = 2
    x, y = torch.empty(rows, vocab, dtype=dtype), torch.empty(rows, vocab, dtype=dtype)
    tokens, mask = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    return x, y, tokens, mask


def _statistics(vocab: int, dtype: torch.dtype) -> None:
    from cmdp_fast import kernels

    x, y, tokens, mask = _inputs(vocab, dtype)
    kernels.token_stats(x, y, tokens, mask, 1.0, vocab)


def _backward(vocab: int, dtype: torch.dtype) -> None:
    from cmdp_fast import kernels

    x, y, tokens, mask = _inputs(vocab, dtype)
    saved, upstream = torch.empty(2, 7, dtype=torch.float64), torch.empty(2)
    kernels.token_stats_backward(x, y, tokens, mask, saved, (upstream,) * 4, 1.0, vocab, x)


def _mixture(vocab: int, dtype: torch.dtype) -> None:
    from cmdp_fast import kernels

    x, y, _, mask = _inputs(vocab, dtype)
    weights = (0.5, 0.5, 0.5)
    _, saved, mean = kernels.mixture(x, y, mask, 1.0, vocab, weights)
    kernels.mixture_backward(x, y, mask, saved, mean, torch.empty(2), 1.0, vocab, weights, torch.empty_like(x))


RULE = ("cmdp", True, 1.0, 1.0, 0.0, 0.0)  # kind, penalty at the crossing, penalty, discrepancy weight, 0, 0


def _trace(sequences: int, tokens: int):
    trace = [torch.empty(sequences, tokens) for _ in range(2)]
    return (
        *trace,
        torch.empty(sequences, tokens, dtype=torch.bool),
        torch.empty(sequences, dtype=torch.int64),
        torch.empty(sequences, tokens),
    )


def _budget(vocab: int, dtype: torch.dtype) -> None:
    from cmdp_fast import kernels

    cost, mask = torch.empty(2, 512), torch.ones(2, 512, dtype=torch.bool)
    offsets, limits = torch.tensor([0, 512, 1024]), torch.empty(2, dtype=torch.float64)
    trace = _trace(2, 512)
    kernels.trace_budgets(cost, mask, offsets, limits, (1.0, False, False), trace)
    seen = (trace[0], trace[1], trace[2], trace[4])
    kernels.modify_rewards(torch.empty(2, 512), cost, seen, mask, offsets, RULE, torch.empty(2, 512))


def _constrained(vocab: int, dtype: torch.dtype) -> None:
    from cmdp_fast import kernels

    x, y, tokens, mask = (t[None] for t in _inputs(vocab, dtype))
    reward = torch.empty(1, 2)
    kernels.constrained_pass(
        x, y, tokens, mask, reward, None, 2.0, 1.0, vocab, "reverse_kl", False, (1.0, False, False), RULE, _trace(1, 2),
        reward,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    launch: Callable[[int, torch.dtype], None]
    # Matrices that a kernel of this name reads and writes; kernels not named here hold no logits.
    traffic: dict[str, int]


CASES = (
    Case(_statistics, {"token_stats.fold_kernel": 2}),
    Case(_backward, {"token_stats_backward.backward_kernel": 3}),
    Case(_mixture, {"mixture.mixture_kernel": 2, "mixture.backward_kernel": 3}),
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
# What the machine code says


@dataclass(frozen=True)
class Instruction:
    name: str  # with its suffixes: LDG.E.128
    target: int | None = None  # of a branch: the index of the instruction it goes to


def parse(text: str, line: str, label: str, branch: str) -> list[Instruction]:
    """Instructions of a disassembly. The expressions match an instruction (named groups ``name`` and ``rest``), a label
    and, in ``rest`` of a branch, the label it goes to."""
    found, labels = [], {}
    for row in text.splitlines():
        if match := re.match(label, row):
            labels[match.group(1)] = len(found)
        elif match := re.match(line, row):
            target = re.search(branch, match["rest"]) if "bra" in match["name"].lower() else None
            found.append((match["name"], target.group(1) if target else None))
    return [Instruction(name, labels.get(to)) for name, to in found]


def parse_sass(text: str) -> list[Instruction]:
    """The output of ``nvdisasm -c``."""
    line = r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*)"
    return parse(text, line, r"(\.L_\w+):", r"`\((\.L_\w+)\)")


def parse_amdgcn(text: str) -> list[Instruction]:
    line = r"\t(?P<name>[a-z]\w+)(?P<rest>[^;]*)"
    return parse(text, line, r"(\.LBB\w+):", r"(\.LBB\w+)")


def load_bits(name: str) -> int:
    """Width of a load from global memory; 0 for anything else."""
    if name.startswith("LDG"):
        wide = re.search(r"\.(256|128|64)\b", name)
        narrow = re.search(r"\.[US](8|16)\b", name)
        return int(wide[1]) if wide else int(narrow[1]) if narrow else 32
    if re.match(r"(global|buffer|flat)_load_", name):
        words = re.search(r"dwordx(\d)", name)
        return 32 * int(words[1]) if words else 32 if "dword" in name else 16 if "short" in name else 8
    return 0


EXPONENTIALS = ("MUFU.EX2", "v_exp_f32")


def main_loop(code: list[Instruction]) -> list[Instruction] | None:
    """Of the loops that contain no other, the one with most exponentials, and most loads; None if no loop loads."""
    loops = [(i.target, at + 1) for at, i in enumerate(code) if i.target is not None and i.target <= at]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    bodies = [code[a:b] for a, b in inner]

    def work(body: list[Instruction]) -> tuple[int, int]:
        return count(body, *EXPONENTIALS), sum(load_bits(i.name) for i in body)

    best = max(bodies, key=work, default=None)
    return best if best and any(load_bits(i.name) for i in best) else None


def count(code: list[Instruction], *prefixes: str) -> int:
    return sum(i.name.startswith(prefixes) for i in code)


def occupancy(registers: int, shared: int, threads: int, arch: str) -> float:
    """Share of the 64 warps of a multiprocessor that registers and shared memory leave room for."""
    memory = {"80": 164, "90": 228, "100": 228}[arch] * 1024
    warps = -(-threads // 32)
    per_warp = -(-registers // 8) * 8 * 32
    blocks = min(65536 // per_warp // warps, memory // (shared + 1024), 64 // warps, 32)
    return blocks * warps / 64


def reduced_layouts(ir: str) -> list[str]:
    """Shape and layout of every tensor that Triton reduces: sums come out bitwise the same if these are."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", ir, re.MULTILINE))
    shapes = re.findall(r"^ +\}\) : \(tensor<([\dx]+)x\w+, (#\w+)>\) ->", ir, re.MULTILINE)
    return sorted({f"{size} {layouts[name]}" for size, name in shapes})


def tool(name: str, *arguments: str) -> str:
    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def read_nvidia(kernel) -> tuple[list[Instruction], int, int]:
    """Instructions, registers and local memory of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = parse_sass(tool("nvdisasm", "-c", file.name))
        usage = tool("cuobjdump", "-res-usage", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return code, numbers["REG"], numbers["STACK"] + numbers["LOCAL"] + count(code, "LDL", "STL")


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
    loop = main_loop(code)
    report = Report(name, arch, dtype, vocab, threads, registers, shared, local, busy, len(code), loop is not None)
    body = loop or code
    report.loads = dict(sorted(collections.Counter(b for i in body if (b := load_bits(i.name))).items()))
    report.lanes = reduced_layouts(kernel.asm["ttgir"])
    report.barriers = count(body, "BAR", "s_barrier")
    report.shuffles = count(body, "SHFL", "ds_bpermute", "ds_swizzle")
    if traffic:
        size = DTYPES[dtype].itemsize
        loaded = sum(bits // 8 * times for bits, times in report.loads.items())
        report.columns = loaded / (2 * size)
        report.bytes_a_column = traffic * size
        report.exponentials_a_column = count(body, *EXPONENTIALS) / report.columns
        report.instructions_a_column = len(body) / report.columns
        report.predicted = {d.name: predict(report, d) for d in DEVICES if d.arch == arch}
    return report


def predict(report: Report, device: Device) -> dict[str, float | str]:
    """Columns a second (in 10^12) that memory, instruction issue and exponentials allow, and which is the least."""
    cycles = device.multiprocessors * device.gigahertz / 1000
    limits = {
        "memory": device.terabytes / report.bytes_a_column,
        "issue": cycles * 128 / report.instructions_a_column,
        "exponentials": cycles * 16 / max(report.exponentials_a_column, 1e-9),
    }
    bound = min(limits, key=limits.__getitem__)
    return {key: round(value, 3) for key, value in limits.items()} | {"bound": bound}


def survey(archs: list[str], dtypes: list[str], vocabularies: list[int]) -> list[Report]:
    """A report of every kernel in every combination. What does not depend on the logits is reported once an arch."""
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


def missed_bars(report: Report) -> list[str]:
    """What the statistics' kernel must reach, and this one does not."""
    bars = {
        "logits are loaded by other than 128 bits": set(report.loads) != {128},
        "local memory is used": report.local > 0,
        "a barrier in the loop": report.barriers > 0,
        "a shuffle in the loop": report.shuffles > 0,
        f"more than {BAR_EXPONENTIALS} exponentials a column": report.exponentials_a_column > BAR_EXPONENTIALS,
        f"more than {BAR_INSTRUCTIONS} instructions a column": report.instructions_a_column > BAR_INSTRUCTIONS,
        f"an occupancy under {BAR_OCCUPANCY}": report.occupancy < BAR_OCCUPANCY,
        "no loop": not report.loop,
    }
    return [text for text, missed in bars.items() if missed]


# --------------------------------------------------------------------------------------------------------------


def print_table(reports: list[Report]) -> None:
    """Loads as number x bits. Loads, barriers and shuffles are those of the main loop, or of a kernel without one."""
    row = "{:46} {:6} {:8} {:>6} {:>4} {:>6} {:>5} {:>5}  {:18} {:>4} {:>4} {:>7} {:>9} {:>9}"
    a_kernel = ("kernel", "arch", "dtype", "vocab", "regs", "shared", "local", "occ.")
    print(row.format(*a_kernel, "loads", "bar.", "shfl", "ex2/col", "instr/col", "bytes/col"))
    for r in reports:
        loads = " ".join(f"{times}x{bits}" for bits, times in r.loads.items())
        a_column = (f"{r.exponentials_a_column:.2f}", f"{r.instructions_a_column:.2f}", r.bytes_a_column)
        name, busy = r.kernel + ("" if r.loop else ", no loop"), f"{r.occupancy:.0%}" if r.occupancy else "-"
        a_kernel = (name, r.arch, r.dtype, r.vocab, r.registers, r.shared, r.local, busy)
        print(row.format(*a_kernel, loads, r.barriers, r.shuffles, *(a_column if r.columns else "---")))


def print_bounds(reports: list[Report]) -> None:
    print("\nPREDICTED, NOT MEASURED: 10^12 columns a second that each resource allows, and the time of 1024 rows")
    for r in reports:
        for device, limits in r.predicted.items():
            rates = "  ".join(f"{key} {limits[key]:6.2f}" for key in ("memory", "issue", "exponentials"))
            time = 1024 * r.vocab / float(limits[str(limits["bound"])]) / 1e9
            what = f"{r.kernel:36}  {r.dtype:8}  {r.vocab:6}  {device:4}"
            print(f"{what}  {rates}  bound by {limits['bound']!s:12}  predicted {time:.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description="Machine code of the Triton kernels, and a predicted bound.")
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--vocab", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--json", type=Path, help="write the reports here")
    options = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("nothing is compiled under TRITON_INTERPRET=1; unset it")
    reports = survey(options.arch, options.dtype, options.vocab)
    print_table(reports)
    print_bounds(reports)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")


if __name__ == "__main__":
    main()

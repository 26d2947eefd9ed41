"""The figures of a disassembled kernel, and the bound that follows from them: shared by `static_gpu.py` (Triton) and
`static_cuda.py` (nvcc)."""

from __future__ import annotations

import collections
import re
import subprocess
from dataclasses import dataclass, field

from devices import DEVICES, Device
from triton import knobs

# Of the statistics' main loop for bfloat16 logits of 151936 columns on sm_90.
BAR_EXPONENTIALS, BAR_INSTRUCTIONS, BAR_OCCUPANCY = 2.5, 23.0, 0.5


@dataclass
class Report:
    """One kernel, compiled for one architecture. Numbers in the loop are per thread, ``*_a_column`` per column."""

    kernel: str
    arch: str
    dtype: str
    vocab: int
    threads: int
    registers: int
    shared: int
    local: int  # bytes of stack and local memory
    spills: int  # instructions that move spilled registers
    occupancy: float
    instructions: int
    loop: bool  # whether the figures below are of a loop, else of the whole kernel
    spills_in_loop: int = 0
    loads: dict[int, int] = field(default_factory=dict)  # of the loop, by width in bits
    barriers: int = 0
    shuffles: int = 0
    columns: float = 0.0  # in one turn of the loop; 0 of a kernel that holds no logits
    exponentials_a_column: float = 0.0  # and logarithms and reciprocals, of the same units
    instructions_a_column: float = 0.0
    branched_a_column: float = 0.0  # of these, those that a branch within the loop may skip
    bytes_a_column: int = 0
    predicted: dict[str, dict[str, float | str]] = field(default_factory=dict)
    lanes: list[str] = field(default_factory=list)  # how vectors that are reduced lie over threads


@dataclass(frozen=True)
class Instruction:
    name: str  # with its suffixes: LDG.E.128
    target: int | None = None  # of a branch: the index of the instruction it goes to


def parse(text: str, line: str, label: str, branch: str) -> list[Instruction]:
    """Instructions of a disassembly. The expressions match an instruction (named groups ``name`` and ``rest``), a label
    and, in ``rest`` of a branch, the label it goes to."""
    code, labels = [], {}
    for row in text.splitlines():
        if match := re.match(label, row):
            labels[match.group(1)] = len(code)
        elif match := re.match(line, row):
            target = re.search(branch, match["rest"]) if "bra" in match["name"].lower() else None
            code.append((match["name"], target.group(1) if target else None))
    return [Instruction(name, labels.get(to)) for name, to in code]


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
# All that the units of the exponentials do, logarithms and reciprocals too.
SPECIAL = ("MUFU", "v_exp_f32", "v_log_f32", "v_rcp_f32")


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


def count_branched(body: list[Instruction], start: int) -> int:
    """Instructions of a loop, which begins at ``start`` of the code, that a forward branch within it may jump over."""
    inside: set[int] = set()
    for at, i in enumerate(body):
        if i.target is not None and at < i.target - start <= len(body):
            inside.update(range(at + 1, i.target - start))
    return len(inside)


def tool(name: str, *arguments: str) -> str:
    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def read_cubin(path: str, kernel: str | None = None) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of a kernel (of the only one, if no name is given) and its resources, after
    `cuobjdump -res-usage`."""
    sections = re.split(r"^\.text\.", tool("nvdisasm", "-c", path), flags=re.MULTILINE)[1:]
    code = next(s for s in sections if kernel is None or s.startswith(kernel + ":"))
    usage = tool("cuobjdump", "-res-usage", path)
    line = next(s for s in usage.split("Function ")[1:] if kernel is None or s.startswith(kernel + ":"))
    return parse_sass(code), {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}


SPILLS = ("LDL", "STL", "scratch_")  # instructions that move a spilled register to memory and back


@dataclass(frozen=True)
class Traffic:
    """Bytes per column that a kernel reads and writes of matrices of logits."""

    read: int
    written: int = 0


def look_at_loop(report: Report, code: list[Instruction], traffic: Traffic | None) -> None:
    """Fills in the figures of the main loop; those per column where there is ``traffic``."""
    loop = main_loop(code)
    body = loop or code
    report.loop = loop is not None
    report.loads = dict(sorted(collections.Counter(b for i in body if (b := load_bits(i.name))).items()))
    report.barriers = count(body, "BAR", "s_barrier")
    report.shuffles = count(body, "SHFL", "ds_bpermute", "ds_swizzle")
    report.spills_in_loop = count(loop or [], *SPILLS)
    if traffic:
        loaded = sum(bits // 8 * times for bits, times in report.loads.items())
        report.columns = loaded / traffic.read
        report.bytes_a_column = traffic.read + traffic.written
        report.exponentials_a_column = count(body, *SPECIAL) / report.columns
        report.instructions_a_column = len(body) / report.columns
        start = next((at for at in range(len(code)) if loop and code[at] is loop[0]), 0)
        report.branched_a_column = count_branched(body, start) / report.columns
        report.predicted = {d.name: predict(report, d) for d in DEVICES if d.arch == report.arch}


def predict(report: Report, device: Device) -> dict[str, float | str]:
    """Columns per second (in 10^12) that memory, instruction issue and exponentials allow, and which is the least."""
    limits = {
        "memory": device.terabytes / report.bytes_a_column,
        "issue": device.instructions / 1e12 / report.instructions_a_column,
        "exponentials": device.instructions / 8e12 / max(report.exponentials_a_column, 1e-9),
    }
    bound = min(limits, key=limits.__getitem__)
    return {key: round(value, 3) for key, value in limits.items()} | {"bound": bound}


def missed_bars(report: Report) -> list[str]:
    """The bars of the statistics' kernel that this one does not reach."""
    bars = {
        "logits are loaded by other than 128 bits": set(report.loads) != {128},
        "registers are spilled": report.local + report.spills > 0,
        "a barrier in the loop": report.barriers > 0,
        "a shuffle in the loop": report.shuffles > 0,
        f"more than {BAR_EXPONENTIALS} exponentials per column": report.exponentials_a_column > BAR_EXPONENTIALS,
        f"more than {BAR_INSTRUCTIONS} instructions per column": report.instructions_a_column > BAR_INSTRUCTIONS,
        f"an occupancy under {BAR_OCCUPANCY}": report.occupancy < BAR_OCCUPANCY,
        "no loop": not report.loop,
    }
    return [text for text, missed in bars.items() if missed]


def print_table(reports: list[Report]) -> None:
    """Loads as number x bits. Loads, barriers and shuffles are those of the main loop, or of a kernel without one."""
    row = "{:46} {:6} {:17} {:>6} {:>4} {:>6} {:>5} {:>6} {:>5}  {:18} {:>4} {:>4} {:>7} {:>9} {:>8} {:>9}"
    a_kernel = ("kernel", "arch", "dtype", "vocab", "regs", "shared", "local", "spills", "occ.")
    print(row.format(*a_kernel, "loads", "bar.", "shfl", "mufu/col", "instr/col", "branched", "bytes/col"))
    for r in reports:
        loads = " ".join(f"{times}x{bits}" for bits, times in r.loads.items())
        a_column = (
            f"{r.exponentials_a_column:.2f}",
            f"{r.instructions_a_column:.2f}",
            f"{r.branched_a_column:.2f}",
            r.bytes_a_column,
        )
        name, busy = r.kernel + ("" if r.loop else ", no loop"), f"{r.occupancy:.0%}" if r.occupancy else "-"
        a_kernel = (name, r.arch, r.dtype, r.vocab, r.registers, r.shared, r.local, spilled(r), busy)
        print(row.format(*a_kernel, loads, r.barriers, r.shuffles, *(a_column if r.columns else "----")))


def spilled(report: Report) -> str:
    """Instructions that move spilled registers, and how many of them stand in the loop."""
    return f"{report.spills} ({report.spills_in_loop})" if report.spills else "0"


def print_bounds(reports: list[Report]) -> None:
    print("\nPREDICTED, NOT MEASURED: 10^12 columns per second that each resource allows, and the time of 1024 rows")
    for r in reports:
        for device, limits in r.predicted.items():
            rates = "  ".join(f"{key} {limits[key]:6.2f}" for key in ("memory", "issue", "exponentials"))
            time = 1024 * r.vocab / float(limits[str(limits["bound"])]) / 1e9
            kernel = f"{r.kernel:36}  {r.dtype:17}  {r.vocab:6}  {device:4}"
            print(f"{kernel}  {rates}  bound by {limits['bound']!s:12}  predicted {time:.3f} ms")

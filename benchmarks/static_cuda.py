"""What nvcc makes of the CUDA kernels, read without a GPU: the part of `static_gpu.py` that looks at csrc/cuda.

The kernels for rows that begin at multiples of 16 bytes, student and teacher of one dtype; their code does not depend
on the width of the vocabulary.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from machine_code import SPILLS, Report, Traffic, count, look_at_loop, occupancy, read_cubin, tool

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ELEMENTS = {"bfloat16": ("BFloat16", 2), "float16": ("Float16", 2), "float32": ("Float32", 4)}
THREADS = 256  # of a block, for the vocabulary of a language model: kThreads in device.cuh
# Matrices that a kernel reads and writes, and how it is instantiated. No name is a part of one that follows it.
KERNELS = {
    "token_stats_kernel": (Traffic(2), "<{0}, {0}, true>(const __grid_constant__ FoldArguments)"),
    "constrained_kernel": (Traffic(2), "<{0}, {0}, true>(const __grid_constant__ ConstrainedArguments)"),
    "tail_backward_kernel": (Traffic(1, 1), "<{0}, true>(const __grid_constant__ TailBackwardArguments)"),
    "tail_kernel": (Traffic(1), "<{0}, true>(const __grid_constant__ TailArguments)"),
    "backward_kernel": (Traffic(2, 1), "<{0}, {0}, true, true>(const __grid_constant__ BackwardArguments)"),
}
FLAGS = ("-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-cubin")  # as in csrc/cuda/build.cmake


def problem() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if shutil.which("nvcc") else "there is no nvcc"


def compiled(dtype: str, arch: str, folder: Path) -> Path:
    """A cubin of the kernels for one dtype."""
    source, cubin = folder / "kernels.cu", folder / f"{dtype}_{arch}.cubin"
    instances = "".join(
        f"template __global__ void {name}{how.format(ELEMENTS[dtype][0])};\n" for name, (_, how) in KERNELS.items()
    )
    includes = "".join(f'#include "{SOURCES / name}"\n' for name in ("token_stats.cuh", "tail.cuh"))
    source.write_text(f"{includes}namespace cmdp::cuda {{\n{instances}}}\n")
    subprocess.run(["nvcc", *FLAGS, f"-arch=sm_{arch}", "-o", str(cubin), str(source)], check=True)
    return cubin


def survey(archs: list[str], dtypes: list[str], vocab: int) -> list[Report]:
    """A report of every kernel for every architecture and dtype. ``vocab``: the width that predictions are of."""
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            for dtype in dtypes:
                cubin = str(compiled(dtype, arch, Path(folder)))
                for symbol in re.findall(r"Function (\w+):", tool("cuobjdump", "-res-usage", cubin)):
                    name = next((name for name in KERNELS if name in symbol), None)
                    if name is None:
                        continue  # the scans hold no logits
                    code, usage = read_cubin(cubin, symbol)
                    busy = occupancy(usage["REG"], usage["SHARED"], THREADS, arch)
                    local, spills = usage["STACK"] + usage["LOCAL"], count(code, *SPILLS)
                    size = (usage["REG"], usage["SHARED"], local, spills, busy, len(code), False)
                    report = Report(f"cuda.{name}", arch, dtype, vocab, THREADS, *size)
                    logit, moved = ELEMENTS[dtype][1], KERNELS[name][0]
                    look_at_loop(report, code, Traffic(moved.read * logit, moved.written * logit))
                    reports.append(report)
    return reports

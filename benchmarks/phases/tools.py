"""compute-sanitizer and ncu over `once.py`, where they are."""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from phases import processes
from phases.record import Part
from phases.setting import GPU_BACKENDS, Setting, need_backend, need_program

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
ROWS, VOCAB = 5, 40000  # of several segments
KERNELS = "regex:^(fold|tile|backward|mixture|update)"  # tile: fold and update of a tile of one segment
METRICS = {
    "dram %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm %": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "us": "gpu__time_duration.sum",
}
PER_RUN = 60.0  # seconds


def _once(backend: str, rows: int, vocab: int, dtype: str, part: str = "all") -> list[str]:
    return [sys.executable, "-m", "phases.once", backend, str(rows), str(vocab), dtype, part]


def sanitizer_parts(setting: Setting) -> list[Part]:
    """A part per backend and tool."""
    found = []
    for backend in GPU_BACKENDS:
        for tool in SANITIZERS:
            found.append(
                Part(f"sanitizer {backend}: {tool}", PER_RUN / 2, lambda b=backend, t=tool: _sanitized(setting, b, t))
            )
    return found


def _sanitized(setting: Setting, backend: str, tool: str) -> dict[str, Any]:
    """The errors that a tool finds in every kernel of a backend, bfloat16 and small."""
    need_backend(backend)
    sanitizer = need_program("compute-sanitizer")
    setting.free()
    environment = dict(os.environ)
    if tool in ("memcheck", "initcheck"):  # else a kernel may read and write all of PyTorch's pool
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--launch-timeout", "60"]
    limit = min(1.5 * PER_RUN, setting.left() - 20)  # before the part is taken to hang
    # On an H200 initcheck called uninitialised what cuBLAS had written, perhaps by the bulk copy engine.
    part = "logits" if tool == "initcheck" else "all"
    ended = processes.run(
        [sanitizer, *options, *_once(backend, ROWS, VOCAB, "bfloat16", part)], limit, setting.log, environment
    )
    lines = ended.output.splitlines()
    summary = next((line.strip("= ") for line in lines if "SUMMARY" in line), "")
    found = sorted({m.group(0).strip() for m in re.finditer(r"\b(Error|Warning|Invalid|Barrier)\b.*", ended.output)})
    figures = {"tool_said": summary, "errors": found[:20], "summary": summary or "no summary"}
    if ended.code is None:
        return {**figures, "problems": [f"it had not ended after {limit:.0f} s"]}
    if "Device not supported" in ended.output or "every kernel ran" not in ended.output:
        return {**figures, "problems": [processes.first(lines, "Error", "error", "not supported")]}
    clean = (ended.code == 0 and re.search(r"\b0 (errors|hazards)", summary)) or _others_alone(found, summary)
    return {**figures, "problems": [] if clean else [summary or f"exit code {ended.code}", *found[:3]]}


def _others_alone(found: Sequence[str], summary: str) -> bool:
    """Whether every hazard is one of cuBLAS's kernels (nvjet…, on an H200), which are not ours to cure."""
    races = [line for line in found if "Race reported" in line]
    return "hazards" in summary and bool(races) and all(" at nvjet_" in line for line in races)


def profile_part(setting: Setting, name: str, rows: int, vocab: int, part: str) -> Part:
    """ncu over the kernels of the Triton backend."""
    return Part(f"ncu: {name}", PER_RUN, lambda: _profiled(setting, rows, vocab, part))


def _profiled(setting: Setting, rows: int, vocab: int, part: str) -> dict[str, Any]:
    """The metrics of every kernel that is named in `KERNELS`, one launch after another. Clocks are left alone."""
    need_backend("triton")
    ncu = need_program("ncu")
    setting.free()
    options = ["--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base", "-k", KERNELS]
    options += ["--metrics", ",".join(METRICS.values()), "--launch-count", "12"]
    command = [ncu, *options, *_once("triton", rows, vocab, "bfloat16", part)]
    ended = processes.run(command, min(2 * PER_RUN, setting.left() - 10), setting.log, os.environ)
    kernels = list(_kernels(ended.output.splitlines()))
    if not kernels:
        lines = ended.output.splitlines()
        raise RuntimeError(processes.first(lines, "==ERROR==", "Error", "error"))
    said = "; ".join(f"{k['kernel']} dram {k['dram %']:.0f} sm {k['sm %']:.0f} %" for k in kernels[:4])
    return {"kernels": kernels, "summary": said}


def _kernels(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of ncu's table, which stands among other lines: a head with the metrics' names, a line of units."""
    start = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), None)
    if start is None:
        return
    rows = list(csv.reader(line for line in lines[start:] if line.startswith('"')))
    head = rows[0]
    for row in rows[1:]:
        cells = dict(zip(head, row, strict=False))
        figures = {}
        for name, metric in METRICS.items():
            try:
                figures[name] = float(cells.get(metric, "").replace(",", ""))
            except ValueError:  # the line of units, or a metric that is not available
                continue
        if "dram %" not in figures or "sm %" not in figures:
            continue
        if "us" in figures:
            figures["us"] = round(figures["us"] / 1e3, 2)  # of nanoseconds, the base unit
        yield {"kernel": cells["Kernel Name"].split("(")[0], "grid": cells.get("Grid Size", ""), **figures}

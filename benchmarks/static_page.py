"""The page on the machine code of the GPU kernels, made from the JSON that `static_gpu.py` writes.

    folder=benchmarks/results/gpu-static
    python benchmarks/static_gpu.py --arch 80 90 100 --dtype bfloat16 --vocab 151936 --json $folder/static_gpu.json
    python benchmarks/static_page.py

The first command needs Triton and nvcc, but no GPU. The second needs neither: it writes README.md beside the JSON, and
draws plots/bounds.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cmdp_fast.bench.show import markdown

FOLDER = Path(__file__).parent / "results" / "gpu-static"
PLOT = "plots/bounds.png"
ROWS = 1024  # of which a time is predicted
LIMITS = ("memory", "issue", "exponentials")
Report = dict[str, Any]  # a `machine_code.Report` as JSON

TEXT = """\
# Machine code of the GPU kernels

**Everything on this page is read from compiled code or predicted from it. Nothing is measured: no GPU was at hand.**

    python benchmarks/static_gpu.py --arch {archs} --dtype {dtypes} --vocab {vocabularies}

That command compiles every GPU kernel, disassembles it and counts. Its docstring says how the main loop is found. The
Triton kernels come first. The kernels named `cuda.` are those of csrc/cuda, compiled by nvcc. A column is one logit of
the student and one of the teacher. `python benchmarks/static_page.py` makes this page from the command's JSON.

## Figures of the code

Loads are counts of bits per load. Loads, barriers, shuffles and the figures per column are those of the main loop. A
kernel without a loop over columns is counted as a whole. *Branched* are the instructions that a branch within the loop
may skip. *Local* is stack and spilled registers.

{table}

## Predicted bounds

Each resource allows so many columns per second (in 10^12). The slowest one is the bound, and gives the time of {rows}
rows. The figures leave out latency, and the work outside the loop.

{bounds}

![Columns per second that each resource allows]({plot})
"""


def table(reports: list[Report]) -> list[list[str]]:
    """A row per compiled kernel."""
    of_a_kernel = ["arch", "dtype", "vocab", "registers", "shared", "local"]
    of_a_loop = ["loads", "barriers", "shuffles", "ex2 per column", "instructions per column", "branched"]
    rows = [["kernel", *of_a_kernel, "occupancy", *of_a_loop, "bytes per column"]]
    for r in reports:
        loads = " ".join(f"{times}x{bits}" for bits, times in r["loads"].items())
        of_a_column = [f"{r[name]:.2f}" for name in ("exponentials_a_column", "instructions_a_column")]
        of_a_column += [f"{r['branched_a_column']:.2f}", str(r["bytes_a_column"])]
        rows.append(
            [r["kernel"] + ("" if r["loop"] else ", no loop")]
            + [str(r[name]) for name in of_a_kernel]
            + [f"{r['occupancy']:.0%}" if r["occupancy"] else "", loads, str(r["barriers"]), str(r["shuffles"])]
            + (of_a_column if r["columns"] else [""] * 4)
        )
    return rows


def predictions(reports: list[Report]) -> list[tuple[Report, str, dict[str, Any]]]:
    """(kernel, GPU, its limits) of every prediction."""
    return [(r, device, limits) for r in reports for device, limits in r["predicted"].items()]


def bounds(reports: list[Report]) -> list[list[str]]:
    """A row per prediction."""
    rows = [["kernel", "dtype", "vocab", "GPU", *LIMITS, "bound by", f"ms of {ROWS} rows, predicted"]]
    for r, device, limits in predictions(reports):
        ms = ROWS * r["vocab"] / limits[limits["bound"]] / 1e9
        columns = [f"{limits[name]:.2f}" for name in LIMITS]
        rows.append([r["kernel"], r["dtype"], str(r["vocab"]), device, *columns, limits["bound"], f"{ms:.3f}"])
    return rows


def page(reports: list[Report]) -> str:
    """The page in Markdown."""

    def values(name: str) -> str:
        return " ".join(map(str, dict.fromkeys(r[name] for r in reports)))

    return TEXT.format(
        archs=values("arch"),
        dtypes=values("dtype"),
        vocabularies=values("vocab"),
        table=markdown(table(reports)),
        rows=ROWS,
        bounds=markdown(bounds(reports)),
        plot=PLOT,
    )


def draw(path: Path, reports: list[Report]) -> None:
    """Bars of the limits, a group per kernel and GPU. The shortest bar of a group is the bound."""
    found = sorted(predictions(reports), key=lambda p: p[0]["kernel"])
    figure = Figure(figsize=(9, 1.5 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(LIMITS):
        heights = [i + (place - 1) * 0.27 for i in range(len(found))]
        axes.barh(heights, [limits[name] for _, _, limits in found], height=0.25, label=name)
    labels = [f"{r['kernel']}\n{r['dtype']}, {device}" for r, device, _ in found]
    axes.set_yticks(range(len(found)), labels, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set(xlabel="10^12 columns per second", title="predicted, not measured: the shortest of three is the bound")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    found = json.loads((FOLDER / "static_gpu.json").read_text(encoding="utf-8"))
    draw(FOLDER / PLOT, found)
    (FOLDER / "README.md").write_text(page(found), encoding="utf-8")

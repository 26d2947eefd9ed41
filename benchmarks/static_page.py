"""The page on the GPU kernels' machine code and on the launch plan, made from what `static_gpu.py` finds.

    pip install --no-deps --target build/triton-3.6.0 triton==3.6.0            (likewise every other version)
    python benchmarks/static_page.py --survey build/triton-3.4.0 build/triton-3.6.0 ...     compiles all, and the page
    python benchmarks/static_page.py                                                        the page alone

The survey needs Triton and nvcc, but no GPU. It compiles with the Triton that is installed, and the main kernels with
each of those in the folders, and writes static_gpu.json and triton_versions.json. The page needs neither: it writes
README.md beside the JSON files, and draws plots/bounds.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cmdp_fast.bench.show import markdown

SCRIPT = Path(__file__).with_name("static_gpu.py")
FOLDER = Path(__file__).parent / "results" / "gpu-static"
FOUND, VERSIONS, PLOT = "static_gpu.json", "triton_versions.json", "plots/bounds.png"
COMPARED = "90"  # the architecture that Triton's versions are compared on
DRAWN = "H100"
ROWS = 1024  # of which a time is predicted
LIMITS = ("memory", "issue", "exponentials")
Report = dict[str, Any]  # a `machine_code.Report` as JSON
Line = dict[str, Any]

TEXT = """\
# Machine code of the GPU kernels, and the launch plan

**Everything on this page is read from compiled code, or predicted from it and from a few rates of the hardware. Nothing
on it is measured.** Measurements, where there are any, are in the folders `gpu-<card>` beside this one.

    python benchmarks/static_gpu.py --arch {archs} --dtype bfloat16 --vocab 151936

That command compiles every GPU kernel, disassembles it and counts. Its docstring says how the main loop is found. The
Triton kernels come first, compiled by Triton {triton}. The kernels named `cuda.` are those of csrc/cuda, compiled by
nvcc. A column is one logit of the student and one of the teacher; in the kernels of a tail, those of `topk_stats`, it
is one of the student alone. `cuda.tail_kernel` has two ways to add the columns of a step, of which a step takes one;
its figures per column, and the bounds that follow from them, count both. Kernels of {tile_columns} columns are those of
a tile of `linear_token_stats`; its dtypes are those of student, teacher > gradient. `python benchmarks/static_page.py`
makes this page from the command's JSON.

## Launch plan of `linear_token_stats`, predicted

{shape}, bfloat16.
Launches, bytes that have to move, operations, and the milliseconds that `benchmarks/launch_model.py` gives them. A plan
takes the longer of its times on host and device. A product takes whole waves of output tiles, another kernel its bytes
at the bandwidth of a copy. Two rates are behind it, which were seen on a card of each kind: that of a copy and that of
a product of 8192³. Plans of others are best cases for them.

{plan}

## Operations on logits, predicted

Microseconds on the device, without Python's part of a call. In brackets the share of the data sheet's bandwidth.

{logits}

## Figures of the code

Loads are counts of bits per load. Loads, barriers, shuffles and the figures per column are those of the main loop. A
kernel without a loop over columns is counted as a whole. *Branched* are the instructions that a branch within the loop
may skip. *Exponentials* are all that their units do, logarithms and reciprocals included. *Local* are bytes of stack,
*spills* the instructions that move spilled registers, with those in the loop in brackets.

{table}

## By version of Triton

sm_{compared}: instructions per column of the main loop, registers, occupancy, and spills if there are any.

{versions}

## Predicted bounds

Each resource allows so many columns per second (in 10^12). The slowest one is the bound, and gives the time of {rows}
rows. The figures leave out latency, and the work outside the loop.

{bounds}

![Columns per second that each resource allows on an {drawn}]({plot})
"""


# --------------------------------------------------------------------------------------------------------------
# Tables


def table(reports: list[Report]) -> list[list[str]]:
    """A row per compiled kernel."""
    of_a_kernel = ["arch", "dtype", "vocab", "registers", "shared", "local"]
    of_a_loop = ["loads", "barriers", "shuffles", "exponentials per column", "instructions per column", "branched"]
    rows = [["kernel", *of_a_kernel, "spills", "occupancy", *of_a_loop, "bytes per column"]]
    for r in reports:
        loads = " ".join(f"{times}x{bits}" for bits, times in r["loads"].items())
        of_a_column = [f"{r[name]:.2f}" for name in ("exponentials_a_column", "instructions_a_column")]
        of_a_column += [f"{r['branched_a_column']:.2f}", str(r["bytes_a_column"])]
        spills = f"{r['spills']} ({r['spills_in_loop']})" if r["spills"] else "0"
        rows.append(
            [r["kernel"] + ("" if r["loop"] else ", no loop")]
            + [str(r[name]) for name in of_a_kernel]
            + [spills, f"{r['occupancy']:.0%}" if r["occupancy"] else ""]
            + [loads, str(r["barriers"]), str(r["shuffles"])]
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


def plan_table(lines: list[Line]) -> list[list[str]]:
    """A row per plan and direction."""
    gpus = list(lines[0]["ms"])
    rows = [["plan", "", "launches", "GB", "TFLOP", "host, ms", *(f"{gpu}, ms" for gpu in gpus), "beside ours"]]
    for line in lines:
        size = [str(line["launches"]), f"{line['bytes'] / 1e9:.1f}", f"{line['flops'] / 1e12:.2f}"]
        times = [f"{line['host_ms']:.1f}", *(f"{ms:.1f}" for ms in line["ms"].values())]
        rows.append([line["plan"], line["direction"], *size, *times, line["beside"]])
    return rows


def logits_table(lines: list[Line]) -> list[list[str]]:
    """A row per operation and number of rows."""
    gpus = list(lines[0]["us"])
    rows = [["operation", "rows", "launches", "MB", *(f"{gpu}, µs" for gpu in gpus)]]
    for line in lines:
        times = [f"{line['us'][gpu]:.1f} ({line['share_of_bandwidth'][gpu]:.0%})" for gpu in gpus]
        cells = [str(line["rows"]), str(line["launches"]), f"{line['bytes'] / 1e6:.1f}"]
        rows.append([line["operation"], *cells, *times])
    return rows


def versions_table(found: dict[str, list[Report]]) -> list[list[str]]:
    """A row per kernel and dtype, a column per version of Triton."""
    kernels = dict.fromkeys((r["kernel"], r["dtype"]) for reports in found.values() for r in reports)
    rows = [["kernel", "dtype", *found]]
    for kernel in kernels:
        cells = []
        for reports in found.values():
            here = [r for r in reports if (r["kernel"], r["dtype"]) == kernel]
            cells.append(_of_a_version(here[0]) if here else "")
        rows.append([*kernel, *cells])
    return rows


def _of_a_version(r: Report) -> str:
    per_column = [f"{r['instructions_a_column']:.1f}"] if r["instructions_a_column"] else []
    spills = [f"{r['spills']} spills, {r['spills_in_loop']} in the loop"] if r["spills"] else []
    return ", ".join([*per_column, f"{r['registers']} registers", f"{r['occupancy']:.0%}", *spills])


def page(found: dict[str, Any], versions: dict[str, list[Report]]) -> str:
    """The page in Markdown. ``found``: static_gpu.json; ``versions``: the reports by version of Triton."""
    reports, plan = found["reports"], found["launch_plan"]
    shape = plan["shape"]
    tile = next(r["vocab"] for r in reports if r["vocab"] != shape["vocab"])
    return TEXT.format(
        archs=" ".join(dict.fromkeys(r["arch"] for r in reports)),
        triton=found["triton"],
        tile_columns=tile,
        shape=f"{shape['rows']} rows, hidden sizes {shape['student_hidden']} and {shape['teacher_hidden']}, "
        f"{shape['vocab']} columns",
        plan=markdown(plan_table(plan["linear_token_stats"])),
        logits=markdown(logits_table(plan["logits"])),
        table=markdown(table(reports)),
        compared=COMPARED,
        versions=markdown(versions_table(versions)),
        rows=ROWS,
        bounds=markdown(bounds(reports)),
        plot=PLOT,
        drawn=DRAWN,
    )


def draw(path: Path, reports: list[Report]) -> None:
    """Bars of the limits on one GPU, a group per kernel. The shortest bar of a group is the bound."""
    found = sorted((p for p in predictions(reports) if p[1] == DRAWN), key=lambda p: p[0]["kernel"])
    figure = Figure(figsize=(9, 1.5 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(LIMITS):
        heights = [i + (place - 1) * 0.27 for i in range(len(found))]
        axes.barh(heights, [limits[name] for _, _, limits in found], height=0.25, label=name)
    labels = [f"{r['kernel']}\n{r['dtype']}" for r, _, _ in found]
    axes.set_yticks(range(len(found)), labels, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set(
        xlabel="10^12 columns per second", title=f"{DRAWN}, predicted, not measured: the shortest of three is the bound"
    )
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


# --------------------------------------------------------------------------------------------------------------
# The survey

KEPT = ("kernel", "dtype", "vocab", "registers", "local", "spills", "spills_in_loop", "occupancy")
KEPT += ("exponentials_a_column", "instructions_a_column")


def surveyed(archs: list[str], triton: Path | None = None) -> dict[str, Any]:
    """What `static_gpu.py` finds in a process of its own, with the Triton in a folder or the one that is installed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = ([str(triton)] if triton else []) + [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / FOUND
        command = [sys.executable, str(SCRIPT), "--arch", *archs, "--dtype", "bfloat16", "--vocab", "151936"]
        subprocess.run([*command, "--json", str(out)], env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text(encoding="utf-8"))


def of_triton(found: dict[str, Any]) -> list[Report]:
    """What is kept of a version: of Triton's kernels on one architecture."""
    reports = [r for r in found["reports"] if r["arch"] == COMPARED and not r["kernel"].startswith("cuda.")]
    return [{name: r[name] for name in KEPT} for r in reports]


def survey(tritons: list[Path]) -> None:
    """Writes both JSON files."""
    found = surveyed(["80", "90", "100"])
    versions = {found["triton"]: of_triton(found)}
    for folder in tritons:
        other = surveyed([COMPARED], folder)
        versions[other["triton"]] = of_triton(other)
    in_order = dict(sorted(versions.items(), key=lambda item: [int(n) for n in item[0].split(".")]))
    (FOLDER / FOUND).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (FOLDER / VERSIONS).write_text(json.dumps(in_order, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="The page on the GPU kernels' machine code.")
    text = "compile the kernels anew; also with the versions of Triton in these folders"
    parser.add_argument("--survey", nargs="*", type=Path, metavar="FOLDER", help=text)
    options = parser.parse_args()
    if options.survey is not None:
        survey(options.survey)
    found, versions = (json.loads((FOLDER / name).read_text(encoding="utf-8")) for name in (FOUND, VERSIONS))
    draw(FOLDER / PLOT, found["reports"])
    (FOLDER / "README.md").write_text(page(found, versions), encoding="utf-8")


if __name__ == "__main__":
    main()

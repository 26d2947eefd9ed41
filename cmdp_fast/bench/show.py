"""Results as tables: rich ones in a terminal, plain text in a pipe or where CI is set, Markdown in a page."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

from cmdp_fast.bench import machine
from cmdp_fast.bench.results import BenchmarkRun, CaseResult, Measured, Sweep
from cmdp_fast.terminal import Output, drawn, is_terminal, message

TableCells = list[list[str]]  # rows of a table, the header first
MIB = 2**20


def milliseconds(ms: float) -> str:
    """Milliseconds in three digits."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def mebibytes(size: int) -> str:
    """Bytes in MiB with one digit after the point, and no minus before 0.0."""
    return f"{round(size / MIB, 1) + 0.0:.1f}"


def case_table(case: CaseResult) -> TableCells:
    """A table with a header: the floors, then our variants, then the peers."""
    bound = next(iter(case.bounds), None)
    header = ["implementation", "ms", "spread", "ms of the device", "rate", f"% of {bound}" if bound else "", "ratio"]
    header.append("extra MiB")
    rows = [[*header, "error", "does not compute"]]
    for name in case.bounds:
        rounds = case.bound(name)
        floor = Measured(name, "", "", rounds)
        if all(part in case.graph_floors for part in case.bounds[name]):
            floor.graph_ms = case.bound(name, graph=True)
        rows.append([name, *_times(case, floor), "", "", "", "", ""])
    for v in case.variants:
        share = case.share(v)
        error = v.largest_error
        cells = [v.name, *_times(case, v), "" if share is None else f"{share:.0%}"]
        cells += [f"{case.ratio(v):.2f} x", _extra(v), "" if error is None else f"{error:.1e}", v.lacks]
        rows.append(cells)
    return rows


def case_notes(case: CaseResult) -> list[str]:
    """The notes below a case's table: absent peers, phases, and the reason where memory is missing."""
    lines = [f"absent: {peer} ({reason})" for peer, reason in case.absent.items()]
    for v in case.variants:
        if v.phases:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in v.phases.items())
            lines.append(f"{v.name}: {shares} of the step (kernels are within scoring and update)")
        if v.memory is not None and not v.memory.trusted:
            lines.append(f"memory of {v.name}: 64 MiB came to {v.memory.known / MIB:.1f} MiB: do not trust it")
    notes = {v.memory_note for v in case.variants if v.memory_note}
    captured = {v.graph_note: v.name for v in case.variants if v.graph_note}
    lines += [f"no time of the device for {name}: {note}" for note, name in captured.items()]
    return lines + [f"no memory: {note}" for note in sorted(notes)]


def sweep_table(sweep: Sweep) -> TableCells:
    """Milliseconds at every point, the slope of time in logarithms, and the growth from the first point to the last."""
    last = "last / first" if sweep.axis == "threads" else "last / first, a unit"
    rows = [["implementation", *(f"{point}" for point in sweep.points), "slope", last]]
    for name in sweep.ms:
        times = [milliseconds(ms) for ms in sweep.medians(name)]
        several = len(sweep.points) > 1
        rows.append([name, *times, *([f"{sweep.slope(name):.2f}", f"{sweep.growth(name):.2f}"] if several else "--")])
    return rows


def sweep_memory_table(sweep: Sweep) -> TableCells:
    """Extra MiB at every point."""
    rows = [["implementation", *(f"{point}" for point in sweep.points)]]
    return rows + [[name, *(mebibytes(m.extra) for m in memory)] for name, memory in sweep.memory.items()]


def header(run: BenchmarkRun) -> list[str]:
    """The machine of a run, and how it measured."""
    lines = machine.text(run.machine)
    if run.limits:
        copy, product = (run.limits[name] for name in ("copy_bytes_per_second", "bfloat16_flops_per_second"))
        lines.append(f"device copy {copy / 1e9:.0f} GB/s, bfloat16 product {product / 1e12:.0f} TFLOP/s, measured")
    lines.append(f"medians of {run.settings['repeat']} rounds, all in turn; ratio: time over that of the first of ours")
    return lines


def _times(case: CaseResult, v: Measured) -> list[str]:
    """The time of the whole call and its spread, the device's part of it where that was measured, and the rate."""
    device = milliseconds(case.time(v)) if v.graph_ms else ""
    return [milliseconds(v.median), _spread(v), device, _rate(case, v)]


def _spread(v: Measured) -> str:
    low, high = v.spread
    return f"{milliseconds(low)} - {milliseconds(high)}"


def _rate(case: CaseResult, v: Measured) -> str:
    rate = case.rate(case.time(v))
    return "" if rate is None else f"{rate[0]:.3g} {rate[1]}"


def _extra(v: Measured) -> str:
    return "" if v.memory is None else mebibytes(v.memory.extra)


# --------------------------------------------------------------------------------------------------------------
# How tables become text


def plain(rows: TableCells) -> str:
    """A table in aligned columns. Empty columns are left out."""
    rows = _used(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i in (0, len(row) - 1) else cell.rjust(w) for i, (cell, w) in _with(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows: TableCells) -> str:
    """The same table in Markdown."""
    head, *body = _used(rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _used(rows: TableCells) -> TableCells:
    keep = [any(row[i] for row in rows[1:]) for i in range(len(rows[0]))]
    return [[cell for cell, kept in zip(row, keep, strict=True) if kept] for row in rows]


def _with(row: list[str], widths: Sequence[int]) -> Iterator[tuple[int, tuple[str, int]]]:
    return enumerate(zip(row, widths, strict=True))


class Screen:
    """The terminal or pipe that tables go to. Progress is shown only in a terminal, and not if CI is set.

    Where nothing can be written any more, all that comes is dropped if ``instead`` says where there is all of it: a
    `check` at the end tells of that. Else ConsoleLost is raised: to measure on would be for nothing.
    """

    def __init__(self, instead: str = "") -> None:
        from rich.console import Console

        in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        self.console = None if in_ci or not is_terminal(sys.stdout) else Console()
        self._output, self._instead = Output(), instead

    def say(self, text: str) -> None:
        """Shows progress in a terminal, on a line that the next text overwrites. Nothing moves while the clock runs."""
        if self.console is not None:
            width = self.console.width - 1
            with self.console.capture() as line:
                self.console.print(text[:width].ljust(width), end="\r", style="dim", markup=False, highlight=False)
            self._show(line.get(), end="")

    def lines(self, lines: Sequence[str]) -> None:
        """Prints lines as they are."""
        for line in lines:
            self._show(line if self.console is None else message(line, sys.stdout))

    def table(self, title: str, rows: TableCells) -> None:
        """Prints a table with a title."""
        self.say("")
        if self.console is None:
            self._show(f"\n{title}\n{plain(rows)}")
            return
        from rich.table import Table
        from rich.text import Text

        head, *body = _used(rows)
        table = Table(title=Text(title), title_justify="left")
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i in (0, len(head) - 1) else "right")
        for row in body:
            table.add_row(*(Text(cell) for cell in row))
        self._show(drawn(table))

    def check(self) -> None:
        """Raises ConsoleLost if something was not shown."""
        self._output.check(self._instead)

    def _show(self, text: str, end: str = "\n") -> None:
        self._output.show(text, end)
        if not self._instead and self._output.lost is not None:
            raise self._output.lost

    def case(self, case: CaseResult) -> None:
        """Prints a case: its table and its notes."""
        self.table(case.label, case_table(case))
        self.lines([f"  {line}" for line in case_notes(case)])

    def sweep(self, sweep: Sweep) -> None:
        """Prints a sweep: its times and, where there are any, its memory."""
        self.table(f"{sweep.label}, ms", sweep_table(sweep))
        if sweep.memory:
            self.table(f"{sweep.label}, extra MiB", sweep_memory_table(sweep))

"""The changes between two runs, case by case.

Times of two runs also differ because the machine did other work. The share of the floors is the figure to trust: each
run measured its floors beside its variants.
"""

from __future__ import annotations

from cmdp_fast.bench.results import BenchmarkRun, CaseResult, Measured
from cmdp_fast.bench.show import MIB, TableCells, milliseconds


def changes(old: BenchmarkRun, new: BenchmarkRun) -> TableCells:
    """A table with a header: every variant of every case of either run."""
    rows = [["case", "implementation", "ms before", "ms now", "change", "% of floor", "ratio", "extra MiB"]]
    before = {case.key: case for case in old.cases}
    for case in new.cases:
        rows += _case(before.pop(case.key, None), case)
    for case in before.values():
        rows += [
            [_name(case), v.name, milliseconds(v.median), "not in this run", "", "", "", ""] for v in case.variants
        ]
    return rows


def _case(old: CaseResult | None, new: CaseResult) -> TableCells:
    rows = []
    before = {v.name: v for v in old.variants} if old is not None else {}
    for now in new.variants:
        was = before.pop(now.name, None)
        if old is None or was is None:
            rows.append([_name(new), now.name, "not before", milliseconds(now.median), "", "", "", ""])
            continue
        rows.append(
            [
                _name(new),
                now.name,
                milliseconds(was.median),
                milliseconds(now.median),
                f"{now.median / was.median - 1:+.0%}",
                _arrow(old.share(was), new.share(now), ".0%"),
                _arrow(old.ratio(was), new.ratio(now), ".2f"),
                _arrow(_extra(was), _extra(now), ".1f"),
            ]
        )
    rows += [[_name(new), v.name, milliseconds(v.median), "gone", "", "", "", ""] for v in before.values()]
    return rows


def _name(case: CaseResult) -> str:
    return " ".join(case.key[:4])


def _extra(v: Measured) -> float | None:
    return None if v.memory is None else v.memory.extra / MIB


def _arrow(old: float | None, new: float | None, form: str) -> str:
    return "" if old is None or new is None else f"{old:{form}} -> {new:{form}}"

"""Scaling: our variant and its peers at several sizes along one axis, all in turn, so that the growth is paired too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch

from cmdp_fast.bench.case import SHAPES, Case
from cmdp_fast.bench.implementations import variants_of
from cmdp_fast.bench.measure import measure
from cmdp_fast.bench.memory import measure_memory, unavailable
from cmdp_fast.bench.ops import OPS
from cmdp_fast.bench.results import Sweep
from cmdp_fast.bench.suite import Plan, Say, checked_variants
from cmdp_fast.bench.variant import Absent, Inputs, Variant

AXES = ("rows", "vocab", "hidden", "threads")
# A sweep covers a factor of 16: rows from a quarter of a shape to four times the shape, other sizes up to the shape.
SIXTEENTHS = {"rows": (4, 8, 16, 32, 64), "vocab": (1, 2, 4, 8, 16), "hidden": (1, 2, 4, 8, 16)}


def points_of(case: Case, axis: str) -> list[int]:
    """The sizes along an axis. Threads double from 1 up to the number that PyTorch has been given."""
    if axis == "threads":
        most = torch.get_num_threads()
        return sorted({*(2**i for i in range(most.bit_length())), most})
    size = getattr(case.shape, axis)
    return sorted({max(1, size * n // 16) for n in SIXTEENTHS[axis]})


def sweeps(plan: Plan, axis: str, say: Say) -> Iterator[Sweep]:
    """One sweep per operation, mode and dtype that has this axis, at the first shape of the plan."""
    for name in plan.ops:
        op = OPS[name]
        if axis not in op.axes:
            continue
        shape = SHAPES[(plan.shapes or op.shapes)[0]]
        for dtype in plan.dtypes:
            for mode in op.modes:
                case = Case(name, mode, shape, dtype, plan.device)
                if op.why_not(case) is None:
                    yield run_sweep(case, axis, plan, say)


def run_sweep(case: Case, axis: str, plan: Plan, say: Say) -> Sweep:
    """Times every variant that passes its check, at every point, all in turn."""
    op, points, threads = OPS[case.op], points_of(case, axis), torch.get_num_threads()
    names = [variant.name for variant in checked_variants(case, plan.peers, say)[0]]
    entries: dict[tuple[str, int], Variant] = {}
    for point in points:
        at = _at(case, axis, point)
        inputs = op.make(at, 0)
        for variant in variants_of(at, plan.peers)[1]:
            if variant.name in names:
                used = point if axis == "threads" else threads
                entries[variant.name, point] = _placed(variant, inputs, f"{variant.name} at {point}", used)
    say(f"{case.label} over {axis}: timing {len(entries)} variants, {plan.repeat} rounds")
    try:
        times = measure(list(entries.values()), [{}], plan.repeat, case.device, plan.stopped)
    finally:
        torch.set_num_threads(threads)
    ms = {name: [times[entries[name, point].name] for point in points] for name in names}
    sweep = Sweep(case.op, case.mode, axis, case.shape, case.dtype, case.device, points, ms)
    entries.clear()
    if axis == "rows" and plan.memory and unavailable(case.device) is None:
        for variant in variants_of(case, plan.peers)[1]:
            if variant.name in names and not plan.stopped():
                say(f"{case.label} over {axis}: memory of {variant.name}")
                with suppress(Absent):  # it then has no line among the others
                    sweep.memory[variant.name] = [measure_memory(_at(case, axis, n), variant) for n in points]
    return sweep


def _at(case: Case, axis: str, point: int) -> Case:
    if axis == "threads":
        return case
    if axis == "hidden":  # the teacher's grows with the student's
        return case.resized(hidden=point, teacher_hidden=case.shape.teacher_hidden * point // case.shape.hidden)
    return case.resized(**{axis: point})


def _placed(variant: Variant, inputs: Inputs, name: str, threads: int) -> Variant:
    """The variant with inputs of its own, on so many threads. It prepares, so the cache is swept before each run."""

    def prepare(_: Inputs) -> object:
        torch.set_num_threads(threads)
        return variant.state(inputs)

    return replace(variant, name=name, prepare=prepare)

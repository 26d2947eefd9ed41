"""Runs cases: variants are checked, then timed in turn beside the floors, then their memory is measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.bench import memory
from cmdp_fast.bench.case import SHAPES, Case, Op
from cmdp_fast.bench.implementations import variants_of
from cmdp_fast.bench.measure import elapsed, make_sets, measure
from cmdp_fast.bench.ops import OPS
from cmdp_fast.bench.results import CaseResult, Measured
from cmdp_fast.bench.variant import Absent, Inputs, Variant
from cmdp_fast.errors import first_line

ALLOWED = 2.0  # times plain PyTorch's error in the same dtype
# plus so many units of the value's dtype, for values that plain PyTorch happens to get exact
ROUNDING = {"float32": 16, "half": 2}

Say = Callable[[str], Any]


@dataclass(frozen=True)
class Plan:
    """The operations, shapes, dtypes and peers that a run measures."""

    ops: tuple[str, ...]
    shapes: tuple[str, ...]  # empty: each operation's own
    dtypes: tuple[str, ...]
    peers: tuple[str, ...]
    device: str
    repeat: int
    memory: bool = True
    stopped: Callable[[], object] = lambda: False  # whether the rounds so far are all that is wanted

    def cases(self) -> Iterator[Case]:
        """Every case of the plan, operation by operation."""
        for name in self.ops:
            op = OPS[name]
            for shape in self.shapes or op.shapes:
                for dtype in self.dtypes:
                    for mode in op.modes:
                        yield Case(name, mode, SHAPES[shape], dtype, self.device)


def check(op: Op, case: Case, variant: Variant, inputs: Inputs) -> dict[str, float]:
    """The error of each value against float64, relative to the largest value.

    Raises Absent if an error is more than twice that of plain PyTorch in the same dtype, rounding aside. A peer may add
    up a row in sequence, as `torch.log_softmax` does on a CPU: its rounding adds up like a random walk.
    """
    found = variant.values(variant.run(variant.state(inputs)))
    exact = op.expected(case, inputs, list(found), torch.float64)
    plain = op.expected(case, inputs, list(found), case.torch_dtype)
    errors = {name: _error(value, exact[name]) for name, value in found.items()}
    for name, error in errors.items():
        allowed = ALLOWED * _error(plain[name], exact[name]) + _rounding(found[name].dtype)
        if variant.peer:
            allowed += case.shape.vocab**0.5 * torch.finfo(torch.float32).eps
        if not error <= allowed:  # NaN is not
            raise Absent(f"its {name} is off by {error:.1e} of the largest value, allowed are {allowed:.1e}")
    return errors


def _rounding(dtype: torch.dtype) -> float:
    """The allowance for rounding: a peer that returns half precision is not blamed for the digits it cannot hold."""
    half = dtype in (torch.bfloat16, torch.float16)
    return ROUNDING["half"] * torch.finfo(dtype).eps if half else ROUNDING["float32"] * torch.finfo(torch.float32).eps


def _error(value: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    largest = float(exact.abs().max())
    return float((value.double().reshape(exact.shape) - exact).abs().max()) / (largest or 1.0)


def checked_variants(
    case: Case, peers: Sequence[str], say: Say
) -> tuple[list[Variant], dict[str, dict[str, float]], dict[str, str]]:
    """(the variants that passed, their errors by name, the absent peers and why). A failure of our own is raised."""
    small = case.reduced()
    op, variants, absent = variants_of(small, peers)
    inputs = op.make(small, 0)
    errors: dict[str, dict[str, float]] = {}
    for variant in variants:
        say(f"{case.label}: checking {variant.name}")
        try:
            errors[variant.name] = check(op, small, variant, inputs)
        except Exception as error:  # a peer is foreign code: it is listed as absent with any error that it raises
            if not variant.peer:
                raise
            absent[variant.peer] = first_line(error) if isinstance(error, Absent) else f"fails: {first_line(error)}"
    _, variants, _ = variants_of(case, peers)
    return [variant for variant in variants if variant.name in errors], errors, absent


def run_case(case: Case, plan: Plan, say: Say) -> CaseResult:
    """Checks and times the variants of one case, and measures their memory."""
    op = OPS[case.op]
    variants, errors, absent = checked_variants(case, plan.peers, say)
    if plan.stopped():
        raise KeyboardInterrupt  # nothing is measured yet
    sets = make_sets(lambda seed: op.make(case, seed), case.device)
    floors = op.floors(case, sets[0])
    say(f"{case.label}: timing {len(variants)} variants, {plan.repeat} rounds")
    times = measure([*floors, *variants], sets, plan.repeat, case.device, plan.stopped)
    phases = {} if plan.stopped() else {v.name: _phases(v, sets[0], case.device) for v in variants}
    floor_times = {floor.name: times[floor.name] for floor in floors}
    del sets, floors  # before memory is measured in processes beside this one
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
    measured = []
    for variant in variants:
        result = Measured(variant.name, variant.peer, variant.lacks, times[variant.name], errors[variant.name])
        result.phases = phases.get(variant.name, {})
        if plan.memory and not plan.stopped():
            say(f"{case.label}: memory of {variant.name}")
            _add_memory(case, variant, result)
        if plan.memory and plan.stopped() and result.memory is None:
            result.memory_note = "interrupted"  # Ctrl-C comes to the process that measures it, too
        measured.append(result)
    bounds = {name: list(parts) for name, parts in op.bounds(case).items()}
    return CaseResult(
        op=case.op,
        mode=case.mode,
        shape=case.shape,
        dtype=case.dtype,
        device=case.device,
        work=op.work(case),
        bounds=bounds,
        floors=floor_times,
        variants=measured,
        absent=absent,
    )


def _phases(variant: Variant, inputs: Inputs, device: str) -> dict[str, float]:
    """The share of each phase in one more run, of a variant that has phases."""
    if variant.phases is None:
        return {}
    state = variant.state(inputs)
    whole = elapsed(lambda: variant.run(state), device)
    return {name: seconds / whole for name, seconds in variant.phases(state).items()}


def _add_memory(case: Case, variant: Variant, result: Measured) -> None:
    if reason := memory.unavailable(case.device):
        result.memory_note = reason
        return
    try:
        result.memory = memory.measure_memory(case, variant)
    except Absent as reason:
        result.memory_note = str(reason)

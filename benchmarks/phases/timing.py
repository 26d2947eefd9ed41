"""One case of the benchmark on a GPU: variants checked, timed in turn, replayed as graphs, and their memory.

What `cmdp_fast.bench.suite` does for the command line, with three differences. The backends are variants beside one
another. One that fails, runs out of memory or is off is listed with the reason, and the others are still measured.
And two times are taken: `ms`, the call as a program makes it (events around it, so that Python's part of a short call
is in it), and `graph_ms`, the device's part, from the replay of a captured graph of calls.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from cmdp_fast.bench import memory
from cmdp_fast.bench import peers as peer_modules
from cmdp_fast.bench.case import Case, Op
from cmdp_fast.bench.measure import elapsed, make_sets, measure
from cmdp_fast.bench.results import CaseResult, Measured
from cmdp_fast.bench.suite import check
from cmdp_fast.bench.variant import Absent, Inputs, Variant
from cmdp_fast.errors import first_line
from phases.setting import Setting

REPEAT = 9
REPLAYED = 2e-3  # seconds that a replayed graph lasts at least,
HIDDEN = 10  # times as many calls as the whole of a call would have it: most of a short one is Python's part
MOST_CALLS = 500


class Measurement(NamedTuple):
    """What is measured: ours, which may raise Absent, beside peers by name."""

    op: Op
    case: Case
    ours: Callable[[Case], list[Callable[[], Variant]]]
    peers: Sequence[str]

    def take_in(self, setting: Setting) -> Callable[[], dict[str, Any]]:
        return lambda: self.take(setting)

    def take(self, setting: Setting) -> dict[str, Any]:
        """The figures of the part: `result`, a `CaseResult`, `problems` of ours, and the line of the table."""
        setting.free()
        absent: dict[str, str] = {}
        errors: dict[str, dict[str, float]] = {}
        problems, off = self._check(errors, absent)
        setting.free()
        sets = make_sets(lambda seed: _without_wide(self.op.make(self.case, seed)), setting.device)
        floors = self.op.floors(self.case, sets[0])  # before the trials: their memory is there when others are timed
        variants = []
        for variant in self._variants(self.case, absent):
            if variant.name in absent or variant.peer in absent:
                continue
            if problem := _trial(variant, sets[0]):
                _note(variant, problem, absent, problems)
                setting.free()
                continue
            more = "; ".join(filter(None, (variant.lacks, off.get(variant.name, ""))))
            variants.append(replace(variant, lacks=more))
        if not any(not variant.peer for variant in variants):
            raise RuntimeError("; ".join(problems) or "none of ours works here")
        times = measure([*floors, *variants], sets, 1 if setting.small else REPEAT, setting.device)
        measured = []
        for variant in variants:
            found = Measured(variant.name, variant.peer, variant.lacks, times[variant.name], errors[variant.name])
            _add_replays(found, variant, sets, setting)
            measured.append(found)
        replays = {floor.name: _replays(floor, sets, setting)[0] for floor in floors}
        del floors
        for variant, found in zip(variants, measured, strict=True):
            _add_memory(found, variant, sets[0], setting)
        bounds = {name: list(parts) for name, parts in self.op.bounds(self.case).items()}
        result = CaseResult(
            op=self.case.op,
            mode=self.case.mode,
            shape=self.case.shape,
            dtype=self.case.dtype,
            device=self.case.device,
            work=self.op.work(self.case),
            bounds=bounds,
            floors={name: times[name] for name in replays},
            graph_floors={name: rounds for name, rounds in replays.items() if rounds},
            variants=measured,
            absent=absent,
        )
        copied = copy_rate(setting.device, 2**20 if setting.small else 2**31)
        rates = {v.name: moved / result.time(v) * 1e3 for v in result.variants} if (moved := result.work.bytes) else {}
        return {
            "result": asdict(result),
            "copy_bytes_per_second": copied,
            "bytes_per_second": rates,
            "problems": problems,
            "summary": line(result, copied),
        }

    def _variants(self, case: Case, absent: dict[str, str]) -> list[Variant]:
        """Ours and the peers', with the reasons of those that are absent."""
        found = []
        for make in self.ours(case):
            try:
                found.append(make())
            except Absent as reason:
                name, _, why = str(reason).partition(": ")
                absent[name] = why
        for peer in self.peers:
            if not peer_modules.serves(peer, case.op):
                continue
            try:
                found += peer_modules.variants_of(peer, case)
            except Absent as reason:
                absent[peer] = str(reason)
            except Exception as error:  # another library's code may raise anything, of a version nobody has tried
                absent[peer] = f"fails: {first_line(error)}"
        return found

    def _check(self, errors: dict[str, dict[str, float]], absent: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """(what is wrong with ours, how far others are off by name), on few rows, against float64."""
        problems: list[str] = []
        off: dict[str, str] = {}
        small = self.case.reduced()
        inputs = _without_wide(self.op.make(small, 0))
        for variant in self._variants(small, absent):
            errors[variant.name] = {}
            try:
                errors[variant.name] = check(self.op, small, variant, inputs)
            except Absent as reason:  # the figure is worth having, with what is wrong about it
                off[variant.name] = str(reason)
                if not variant.peer:
                    problems.append(f"{variant.name}: {reason}")
            except Exception as error:  # of a peer it is noted; ours shows the case as failed
                _note(variant, first_line(error), absent, problems)
        return problems, off


def _note(variant: Variant, problem: str, absent: dict[str, str], problems: list[str]) -> None:
    if variant.peer:
        absent[variant.peer] = f"fails: {problem}"
    else:
        absent[variant.name] = problem
        problems.append(f"{variant.name}: {problem}")


def _without_wide(inputs: Inputs) -> Inputs:
    """The inputs without the same logits in float32: they would be counted as data that is read."""
    return {name: t for name, t in inputs.items() if not name.startswith("wide ")}


def _trial(variant: Variant, inputs: Inputs) -> str:
    """Why a variant does not run at the size of the case; empty if it does."""
    try:
        variant.run(variant.state(inputs))
        if inputs[next(iter(inputs))].is_cuda:
            torch.cuda.synchronize()
    except Exception as error:  # of any library, or of memory; the caller notes it
        return first_line(error)
    return ""


def _add_replays(found: Measured, variant: Variant, sets: Sequence[Inputs], setting: Setting) -> None:
    found.graph_ms, found.graph_note = _replays(variant, sets, setting)


def _replays(variant: Variant, sets: Sequence[Inputs], setting: Setting) -> tuple[list[float], str]:
    """(milliseconds of a call in each replay of a graph of calls, why there are none)."""
    if setting.device != "cuda":
        return [], "no GPU"
    try:
        return replay(variant, sets), ""
    except Exception as error:  # what waits for the host cannot be captured; calls are timed already
        with suppress(RuntimeError):
            torch.cuda.synchronize()
        return [], f"cannot be captured: {first_line(error)}"


def replay(variant: Variant, sets: Sequence[Inputs]) -> list[float]:
    """Milliseconds of a call in each replay. The graph goes through the sets of inputs, as often as makes it long
    enough for its launch not to count. A call that overwrites its inputs gets them anew before each replay."""
    states = [variant.state(inputs) for inputs in sets]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _waits_for_nothing(lambda: variant.run(states[0]))
        _renew(states, sets)
        took = elapsed(lambda: variant.run(states[0]), "cuda")
    torch.cuda.current_stream().wait_stream(side)
    calls = len(states)
    if took < REPLAYED and not variant.prepare:  # one that overwrites its inputs finds its own results in them
        calls = max(calls, min(MOST_CALLS, HIDDEN * math.ceil(REPLAYED / max(took, 1e-6))))
    torch.cuda.synchronize()
    _renew(states, sets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for state in itertools.islice(itertools.cycle(states), calls):
            variant.run(state)
    graph.replay()
    times = []
    for _ in range(REPEAT):
        _renew(states, sets)
        times.append(1e3 * elapsed(graph.replay, "cuda") / calls)
    return times


def _waits_for_nothing(function: Callable[[], object]) -> None:
    """Calls a function. Raises RuntimeError where it waits for the device: a capture that it broke would leave the
    allocator of this process in a state in which no memory is given back and no other graph is captured."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _renew(states: Sequence[Any], sets: Sequence[Inputs]) -> None:
    """Copies the inputs into those states that are copies of them."""
    for state, inputs in zip(states, sets, strict=True):
        if isinstance(state, dict):
            for name, tensor in state.items():
                if name in inputs and tensor is not inputs[name]:
                    tensor.detach().copy_(inputs[name])


def _add_memory(found: Measured, variant: Variant, inputs: Inputs, setting: Setting) -> None:
    if setting.device != "cuda":
        found.memory_note = "measured on a GPU only"
        return
    try:
        setting.free()
        found.memory = memory.peak_growth(variant, inputs, setting.device)
    except Exception as error:  # of any library; the times stand, and this is said beside them
        found.memory_note = first_line(error)


@functools.cache
def copy_rate(device: str, size: int) -> float:
    """Bytes per second, read and written, of the device's copy, measured in this run: what shares are shares of."""
    generator = torch.Generator(device=device).manual_seed(0)  # the default one may be in a capture that has failed
    source = torch.randn(size // 4, generator=generator, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(elapsed(lambda: target.copy_(source), device) for _ in range(REPEAT))


def line(result: CaseResult, copied: float) -> str:
    """A case in few words: ours in ms and in percent of the copy or of the floor, then the others, times as long."""
    ours, share, moved = result.ours, result.share(result.ours), result.work.bytes
    said = [f"{_short(ours.name, result.op)} {result.time(ours):.3g} ms"]
    if share is not None:
        said[0] += f", {share:.0%} of {next(iter(result.bounds))}"
    if moved:
        said[0] += f", {moved / result.time(ours) * 1e3 / copied:.0%} of the copy's rate"
    return "; ".join([*said, *(f"{_short(v.name, result.op)} {result.ratio(v):.3g}x" for v in result.variants[1:])])


def _short(name: str, op: str) -> str:
    return name.removeprefix(f"{op}, ")

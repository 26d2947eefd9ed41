"""Time: every variant runs once per round, all in turn, so that a ratio compares neighbours within one round.

Machines drift: clocks change, neighbours come and go. That drift is part of a ratio of two medians. It is no part of
the median of the ratios within a round. Inputs are random. Where one set of inputs would fit in the last-level cache,
there are as many sets as do not fit, and every call takes the next. A variant that prepares something leaves its inputs
in the cache, so the cache is swept before the clock starts. A call shorter than `SHORTEST` is repeated, and the mean is
taken.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.bench.machine import last_level_cache
from cmdp_fast.bench.variant import Inputs, Variant

SHORTEST = 2e-3  # seconds
MOST_SETS = 256


def nbytes(inputs: Inputs) -> int:
    """The size of a set of inputs in bytes."""
    return sum(t.nbytes for t in inputs.values())


def make_sets(make: Callable[[int], Inputs], device: str) -> list[Inputs]:
    """As many sets of inputs as fill the last-level cache twice, or one set if it alone is larger."""
    first = make(0)
    wanted = math.ceil(2 * last_level_cache(device) / max(1, nbytes(first)))
    return [first, *(make(seed) for seed in range(1, min(wanted, MOST_SETS)))]


def measure(
    variants: Sequence[Variant],
    sets: Sequence[Inputs],
    repeat: int,
    device: str,
    stopped: Callable[[], object] = lambda: False,
) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round; of fewer rounds, but one, where they are ``stopped``."""
    sweep = _CacheSweep(device) if any(variant.prepare is not None for variant in variants) else None
    turns = {variant.name: _Turn(variant, sets, device, sweep) for variant in variants}
    for turn in turns.values():
        turn.warm_up()
    times: dict[str, list[float]] = {name: [] for name in turns}
    for done in range(repeat):
        if done and stopped():
            break
        for name, turn in turns.items():
            times[name].append(1e3 * turn.seconds())
    return times


class _Turn:
    """The turns of one variant."""

    def __init__(self, variant: Variant, sets: Sequence[Inputs], device: str, sweep: _CacheSweep | None) -> None:
        self.variant = variant
        self.sets = itertools.cycle(sets)
        self.device = device
        self.calls = 1
        self.sweep = None if variant.prepare is None else sweep

    def warm_up(self) -> None:
        """Compiles, touches memory, and finds how many calls make a measurement."""
        self._once()
        took = self._once()
        if self.variant.prepare is None:
            self.calls = max(1, math.ceil(SHORTEST / max(took, 1e-7)))

    def seconds(self) -> float:
        """The time of one call."""
        if self.calls == 1:
            return self._once()
        states = [next(self.sets) for _ in range(self.calls)]
        return elapsed(lambda: [self.variant.run(state) for state in states][-1], self.device) / self.calls

    def _once(self) -> float:
        state: Any = self.variant.state(next(self.sets))
        if self.sweep is not None:
            self.sweep()
        return elapsed(lambda: self.variant.run(state), self.device)


class _CacheSweep:
    """Reads and writes twice the size of the cache."""

    def __init__(self, device: str) -> None:
        self.memory: Tensor = torch.zeros(2 * last_level_cache(device) // 4, device=device)

    def __call__(self) -> None:
        self.memory.add_(1.0)


def elapsed(function: Callable[[], object], device: str) -> float:
    """Seconds of a call. On a GPU: between two events of its stream, with no earlier work under way."""
    if device != "cuda":
        start = time.perf_counter()
        result = function()
        took = time.perf_counter() - start
        del result  # memory is given back after the clock has stopped, for all variants alike
        return took
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    result = function()
    end.record()
    end.synchronize()
    del result
    return begin.elapsed_time(end) / 1e3

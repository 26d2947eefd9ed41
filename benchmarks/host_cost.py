"""What the host does for a call of the Triton backend, measured without a GPU.

    python benchmarks/host_cost.py [--arch 90] [--rounds 15] [--calls 200] [--json FILE]

The launchers of `cmdp_fast.kernels` are called on tensors of the CPU with a driver that names a GPU and whose launcher
does nothing: all is done in Python as it would be there, up to that launcher. What is missing is the launcher, in C,
which looks at every pointer, and the driver's own part of a launch.

A time alone says as much about the machine as about the code, so it is also given in units of `torch.add(out=)` of one
number on the CPU, measured in turn with it: the least that any call of PyTorch costs. The figures are medians of the
thread's own time, so that others on the machine count for less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import static_cases
import torch
from static_gpu import TARGETS, NamedGPU
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cmdp_fast import kernels, tails
from cmdp_fast.layout import SAVED, Account, BudgetRule, ListedRows, Mixture, Settlement, TailGradient, Upstream

ROWS, VOCAB, DTYPE = 64, 151936, torch.bfloat16


class IdleGPU(NamedGPU):
    """A driver that names a GPU, loads nothing onto it and launches nothing."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.utils = SimpleNamespace(
            load_binary=self.load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 1 << 18},
        )
        self.loaded = itertools.count(1)

    def load(self, name: str, code: bytes, shared: int, device: object) -> tuple[str, int, int, int, int]:
        """Module, function, registers, spills and threads of a kernel."""
        return name, next(self.loaded), 32, 0, 1024

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *given: None


def calls() -> dict[str, Callable[[], Any]]:
    """The functions of a backend, and a tiny operation of PyTorch as the unit."""
    one = torch.ones(1)
    pair = static_cases.make_pair(VOCAB, DTYPE, 4, ROWS // 4)
    saved, gradients = torch.empty(4, ROWS // 4, SAVED, dtype=torch.float64), torch.empty(4, ROWS // 4)
    tile = static_cases.make_pair(16384, DTYPE, ROWS)
    fields = torch.zeros(ROWS, 13, dtype=torch.float64)
    rule, trace, rewarding = (
        BudgetRule(1.0, False, False),
        static_cases.make_trace(4, ROWS // 4),
        static_cases.make_rewarding(4, ROWS // 4),
    )
    settlement = Settlement("reverse_kl", None, 2.0, False, rule, trace, rewarding)
    account = Account(torch.empty(4, ROWS // 4), pair.mask, torch.arange(5) * (ROWS // 4))
    limits, weights = torch.empty(4, dtype=torch.float64), Mixture(0.5, 0.5, 0.5)
    mean = torch.empty(4, ROWS // 4, dtype=torch.float64)
    upstream = Upstream(gradients, None, gradients, None)
    ids = torch.arange(0, 20 * 4096, 4096).expand(4, ROWS // 4, 20).contiguous()
    listed = ListedRows(pair.student, ids, pair.tokens, pair.mask, 1.0, VOCAB)
    state = tails.empty(ROWS, 20, pair.student.device)
    coefficients = TailGradient(*torch.zeros(5, ROWS, dtype=torch.float64), state.listed)
    return {
        "torch.add(out=)": lambda: torch.add(one, one, out=one),
        "token_stats": lambda: kernels.token_stats(pair),
        "token_stats_backward": lambda: kernels.token_stats_backward(pair, saved, upstream, pair.student),
        "constrained_pass": lambda: kernels.constrained_pass(pair, settlement),
        "update_states": lambda: kernels.update_states(tile, 0, fields),
        "trace_budgets": lambda: kernels.trace_budgets(account, limits, rule, trace, rewarding),
        "modify_rewards": lambda: kernels.modify_rewards(account, trace, rewarding),
        "update_tails": lambda: kernels.update_tails(listed, 0, state),
        "tail_backward": lambda: kernels.tail_backward(listed, coefficients, pair.student),
        "mixture": lambda: kernels.mixture(pair, weights),
        "mixture_backward": lambda: kernels.mixture_backward(pair, saved, mean, gradients, weights, pair.student),
    }


def microseconds(call: Callable[[], Any], times: int) -> float:
    start = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - start) / times * 1e6


def measure(rounds: int, times_a_round: int) -> dict[str, dict[str, float]]:
    """Median microseconds of each call, and how many of the unit they are. All are timed in each round."""
    timed = calls()
    for call in timed.values():
        call()
    times = [{name: microseconds(call, times_a_round) for name, call in timed.items()} for _ in range(rounds)]
    unit = next(iter(timed))
    return {
        name: {
            "microseconds": statistics.median(t[name] for t in times),
            "units": statistics.median(t[name] / t[unit] for t in times),
        }
        for name in timed
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of the Triton backend's calls.")
    parser.add_argument("--arch", default="90", choices=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=200, help="of each function, in each round")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("nothing is launched under TRITON_INTERPRET=1; unset it")
    driver.set_active(IdleGPU(TARGETS[options.arch]))
    torch.set_num_threads(1)
    figures = measure(options.rounds, options.calls)
    print(f"{'call':<22}{'us':>8}{'units':>8}")
    for name, figure in figures.items():
        print(f"{name:<22}{figure['microseconds']:>8.2f}{figure['units']:>8.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

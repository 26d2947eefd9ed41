"""What a call costs before its kernel: the time of every public operation on a handful of tokens.

    python benchmarks/call_cost.py [--device cuda] [--backend NAME] [--rounds N] [--json FILE]

4 completions of 16 tokens and a vocabulary of 64: the work itself is next to nothing, on a CPU 20 us for the
statistics. What is left is Python, checks, allocations and launches. The unit is a ``torch.add`` of two such small
tensors into a third, timed in the same round: microseconds differ from machine to machine and from hour to hour, ratios
hardly. What counts is the CPU time of the process, with one thread of PyTorch's: other processes do not stretch it, nor
does a GPU at work. Calls are timed in batches, all operations in turn, and the median of the rounds is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import cmdp_fast as cf

SEQUENCES, TOKENS, VOCAB, HIDDEN = 4, 16, 64, 16
BATCH = 2e-3  # seconds that a batch of calls takes, about
MOST_CALLS = 100  # in a batch: far fewer launches than a GPU's queue takes, so that none waits
UNIT = "torch.add(out=)"

Call = Callable[[], object]


def calls(device: str, backend: str | None = None) -> dict[str, Call]:
    """Every public operation by name, ready to be called on small tensors of a device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    student, teacher = normal(SEQUENCES, TOKENS, VOCAB), normal(SEQUENCES, TOKENS, VOCAB)
    tokens = torch.randint(0, VOCAB, (SEQUENCES, TOKENS), generator=generator).to(device)
    mask = torch.ones(SEQUENCES, TOKENS, dtype=torch.bool, device=device)
    reward, upstream = normal(SEQUENCES, TOKENS), normal(SEQUENCES, TOKENS)
    cost = normal(SEQUENCES, TOKENS).abs()
    hidden = [normal(SEQUENCES, TOKENS, HIDDEN) for _ in range(2)]
    heads = [normal(VOCAB, HIDDEN) for _ in range(2)]
    leaf = student.clone().requires_grad_()
    leaves = hidden[0].clone().requires_grad_(), heads[0].clone().requires_grad_()
    trace = cf.budget_trace(cost, 5.0, mask=mask, backend=backend)
    constraint = cf.Constraint(budget=5.0)
    state = cf.TokenState.empty(SEQUENCES * TOKENS, device=device)
    likeliest = teacher.log_softmax(-1).topk(8)
    message = likeliest.indices, likeliest.values
    rows, teacher_rows, actions = student.flatten(0, 1), teacher.flatten(0, 1), tokens.flatten()
    on = {"backend": backend}

    def statistics_there_and_back() -> object:
        stats = cf.token_stats(leaf, teacher, tokens, mask=mask, **on)
        return torch.autograd.grad(stats.reverse_kl, leaf, upstream)

    def divergence_there_and_back() -> object:
        return torch.autograd.grad(cf.divergence(leaf, teacher, mask=mask, **on), leaf, upstream)

    def reward_there_and_back() -> object:
        made = cf.constrained_reward(leaf, teacher, tokens, reward, 5.0, mask=mask, **on)
        return torch.autograd.grad(made.stats.reverse_kl, leaf, upstream)

    def linear_there_and_back() -> object:
        stats = cf.linear_token_stats(*leaves, hidden[1], heads[1], tokens, mask=mask, **on)
        return torch.autograd.grad(stats.reverse_kl, leaves, upstream)

    def linear_divergence_there_and_back() -> object:
        value = cf.linear_divergence(*leaves, hidden[1], heads[1], mask=mask, **on)
        return torch.autograd.grad(value, leaves, upstream)

    def bounds_there_and_back() -> object:
        stats = cf.topk_stats(leaf, *message, tokens, mask=mask, **on)
        return torch.autograd.grad(stats.reverse_kl, leaf, upstream)

    def linear_bounds_there_and_back() -> object:
        stats = cf.linear_topk_stats(*leaves, *message, tokens, mask=mask, **on)
        return torch.autograd.grad(stats.reverse_kl, leaves, upstream)

    return {
        "token_stats": lambda: cf.token_stats(student, teacher, tokens, mask=mask, **on),
        "token_stats, forward and backward": statistics_there_and_back,
        "divergence, jsd": lambda: cf.divergence(student, teacher, mask=mask, **on),
        "divergence, jsd, forward and backward": divergence_there_and_back,
        "budget_trace": lambda: cf.budget_trace(cost, 5.0, mask=mask, **on),
        "modified_reward": lambda: cf.modified_reward(reward, cost, trace, mask=mask, **on),
        "constrained_reward": lambda: cf.constrained_reward(student, teacher, tokens, reward, 5.0, mask=mask, **on),
        "constrained_reward, a Constraint": lambda: cf.constrained_reward(
            student, teacher, tokens, reward, constraint=constraint, mask=mask, **on
        ),
        "constrained_reward, forward and backward": reward_there_and_back,
        "linear_token_stats": lambda: cf.linear_token_stats(
            hidden[0], heads[0], hidden[1], heads[1], tokens, mask=mask, **on
        ),
        "linear_token_stats, forward and backward": linear_there_and_back,
        "linear_divergence, jsd": lambda: cf.linear_divergence(
            hidden[0], heads[0], hidden[1], heads[1], mask=mask, **on
        ),
        "linear_divergence, jsd, forward and backward": linear_divergence_there_and_back,
        "topk_stats": lambda: cf.topk_stats(student, *message, tokens, mask=mask, **on),
        "topk_stats, forward and backward": bounds_there_and_back,
        "linear_topk_stats": lambda: cf.linear_topk_stats(hidden[0], heads[0], *message, tokens, mask=mask, **on),
        "linear_topk_stats, forward and backward": linear_bounds_there_and_back,
        "TokenState.update": lambda: state.update(rows, teacher_rows, actions, **on),
        "reference.budget_trace": lambda: cf.reference.budget_trace(cost, 5.0, mask=mask),  # eager, to compare with
    }


def unit(device: str) -> Call:
    """The tiny operation whose time is the unit."""
    a, b = torch.ones(SEQUENCES, TOKENS, device=device), torch.ones(SEQUENCES, TOKENS, device=device)
    out = torch.empty_like(a)
    return lambda: torch.add(a, b, out=out)


def measure(timed: dict[str, Call], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds per call of each function in each round."""
    counts = {name: _calls_of_a_batch(call, device) for name, call in timed.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            seconds[name].append(_batch(call, counts[name], device))
    return seconds


def _calls_of_a_batch(call: Call, device: str) -> int:
    _batch(call, 3, device)  # compiles
    return max(3, min(MOST_CALLS, round(BATCH / max(1e-6, _batch(call, 10, device)))))


def _batch(call: Call, count: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", help="default: the one that a call gets by itself")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write microseconds and units here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = measure(
        {UNIT: unit(options.device), **calls(options.device, options.backend)}, options.rounds, options.device
    )
    table = {
        name: {
            "microseconds": 1e6 * statistics.median(times),
            "units": statistics.median(t / u for t, u in zip(times, seconds[UNIT], strict=True)),
        }
        for name, times in seconds.items()
    }
    for name, cost in table.items():
        print(f"{name:42}{cost['microseconds']:9.1f} us {cost['units']:8.1f} adds")
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "device": options.device, "calls": table}))


if __name__ == "__main__":
    main()

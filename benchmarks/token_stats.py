"""Speed and memory of `token_stats` and `constrained_reward` against PyTorch, as ratios within one run.

    python benchmarks/token_stats.py [--rows 256 --vocab 151936 --repeat 9 --json FILE]

Protocol: threads fixed, random inputs, every variant warmed up, then all variants in turn, `--repeat` rounds; medians.
What a variant does not compute stands beside its name. The floors are measured in the same rounds: `read floor` sums
both inputs, `copy floor` adds them into memory that has been touched. Extra memory is the growth of the peak resident
size in a fresh process, less what the outputs take; the method is checked on an allocation of known size.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import cmdp_fast as cf
from cmdp_fast.ops.backends import native


def eager_reverse_kl(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What one writes in PyTorch: one divergence, no log-probabilities, no entropies."""
    p, q = torch.log_softmax(x.float(), -1), torch.log_softmax(y.float(), -1)
    return (p.exp() * (p - q)).sum(-1)


def inputs(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, vocab, generator=generator) * 2).to(dtype)
    y = (torch.randn(rows, vocab, generator=generator) * 2).to(dtype)
    return x, y, torch.randint(0, vocab, (rows,), generator=generator)


def forward_variants(rows: int, vocab: int) -> dict[str, Callable[[], object]]:
    x, y, tokens = inputs(rows, vocab)
    xb, yb = x.bfloat16(), y.bfloat16()
    compiled = torch.compile(eager_reverse_kl)
    reward, mask = torch.zeros(1, rows), torch.ones(1, rows, dtype=torch.bool)

    def constrained():
        return cf.constrained_reward(x[None], y[None], tokens[None], reward, 2.0, mask=mask)

    return {
        "read floor": lambda: (x.sum(), y.sum()),
        "token_stats, six statistics": lambda: cf.token_stats(x, y, tokens),
        "token_stats, bfloat16": lambda: cf.token_stats(xb, yb, tokens),
        "constrained_reward": constrained,
        "torch.compile, reverse KL alone": lambda: compiled(x, y),
        "eager, reverse KL alone": lambda: eager_reverse_kl(x, y),
    }


def training_variants(rows: int, vocab: int) -> dict[str, Callable[[], object]]:
    x, y, tokens = inputs(rows, vocab, seed=1)
    memory, out = x.clone(), torch.empty_like(x)
    compiled = torch.compile(eager_reverse_kl)

    def ours_in_place():
        # The logits are overwritten by their gradient; the next round measures the same work on those numbers.
        logits = memory.detach().requires_grad_()
        stats = cf.token_stats(logits, y, tokens, inplace_backward=True)
        torch.autograd.grad((stats.logprob + stats.reverse_kl).sum(), logits)

    def ours():
        logits = x.detach().requires_grad_()
        stats = cf.token_stats(logits, y, tokens)
        torch.autograd.grad((stats.logprob + stats.reverse_kl).sum(), logits)

    def peer(function):
        logits = x.detach().requires_grad_()
        torch.autograd.grad(function(logits, y).sum(), logits)

    return {
        "read floor": lambda: (x.sum(), y.sum()),
        "copy floor": lambda: torch.add(x, y, out=out),
        "token_stats, gradient of logprob + reverse KL, in place": ours_in_place,
        "token_stats, gradient in new memory": ours,
        "torch.compile, reverse KL alone": lambda: peer(compiled),
        "eager, reverse KL alone": lambda: peer(eager_reverse_kl),
    }


def measure(variants: dict[str, Callable[[], object]], repeat: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every variant, all of them once a round."""
    for function in variants.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeat):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)} for name, ms in times.items()
    }


def peak_kib() -> int:
    """The process's peak resident size since it was last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib()


def memory_child(rows: int, vocab: int, what: str) -> None:
    """Runs one variant in this fresh process and prints how far the peak resident size rose, in KiB."""
    x, y, tokens = inputs(rows, vocab)
    warm = inputs(4, vocab)  # pays for thread stacks and one-time allocations
    logits = warm[0].requires_grad_()
    stats = cf.token_stats(logits, warm[1], warm[2], inplace_backward=True)
    torch.autograd.grad(stats.reverse_kl.sum(), logits)
    if what == "backward":
        x.requires_grad_()
        stats = cf.token_stats(x, y, tokens, inplace_backward=True)
    before = reset_peak()
    if what == "forward":
        stats = cf.token_stats(x, y, tokens)
    elif what == "backward":
        torch.autograd.grad((stats.reverse_kl + stats.logprob).sum(), x)
    elif what == "eager":
        eager_reverse_kl(x, y)
    else:  # a known allocation: the check of the method
        torch.ones(64 * 2**20 // 4)
    print(peak_kib() - before)


def memory(rows: int, vocab: int) -> dict[str, int]:
    growth = {}
    for what in ("forward", "backward", "eager", "64 MiB"):
        command = [sys.executable, __file__, "--rows", str(rows), "--vocab", str(vocab), "--memory-of", what]
        growth[what] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return growth


def show(title: str, results: dict[str, dict[str, float]], ours: str) -> None:
    print(f"\n{title}")
    baseline, short = results[ours]["median_ms"], ours.split(",")[0]
    for name, r in results.items():
        spread = f"[{r['min_ms']:7.1f}, {r['max_ms']:7.1f}]"
        print(f"  {name:<58} {r['median_ms']:8.1f} ms  {spread}  {r['median_ms'] / baseline:6.2f} x {short}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        memory_child(args.rows, args.vocab, args.memory_of)
        return
    variant = native.variant() if native is not None else "none"
    header = (
        f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, cmdp_fast {cf.__version__} "
        f"({variant} kernels), {args.rows} x {args.vocab} float32"
    )
    print(header)
    forward = measure(forward_variants(args.rows, args.vocab), args.repeat)
    show("forward", forward, "token_stats, six statistics")
    training = measure(training_variants(args.rows, args.vocab), args.repeat)
    show("forward and backward", training, "token_stats, gradient of logprob + reverse KL, in place")
    grown = memory(args.rows, args.vocab)
    print("\nextra memory (growth of the peak resident size, outputs included)")
    for what, kib in grown.items():
        print(f"  {what:<58} {kib / 1024:8.1f} MiB")
    if args.json:
        args.json.write_text(
            json.dumps({"header": header, "forward": forward, "training": training, "memory_kib": grown}, indent=1)
        )


if __name__ == "__main__":
    main()

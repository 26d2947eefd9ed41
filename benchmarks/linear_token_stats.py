"""Speed, memory and error of `linear_token_stats` against TRL and logits made in full, as ratios within one run.

    python benchmarks/linear_token_stats.py [--shape smollm2 | qwen2.5] [--parts time memory error] [--json FILE]

Protocol as in benchmarks/token_stats.py: threads fixed, random inputs, every variant warmed up, then all in turn. The
GEMM floor is the bare products that nobody can avoid, `torch.mm(..., out=)` into memory that has been touched; with
recomputation the two projections come twice, which is the price of not keeping the logits. The gradients of the hidden
states and of the head are computed by every variant. TRL and the eager variant compute one divergence (and TRL an
entropy without a gradient), ours all six statistics. Extra memory is the growth of the peak resident size in a fresh
process less the two gradients.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from token_stats import eager_reverse_kl, measure, peak_kib, reset_peak, show

import cmdp_fast as cf
from cmdp_fast.ops import tile_size
from cmdp_fast.ops.backends import native

# rows, hidden size of the student and of the teacher, vocabulary
SHAPES = {"smollm2": (1024, 576, 576, 49152), "qwen2.5": (256, 1536, 3584, 151936)}
OURS = "linear_token_stats, gradient of logprob + reverse KL"
KEPT = "the same, saved=tiles"
TRL = "TRL ChunkedDivergenceFunction, reverse KL alone"
EAGER = "logits in full, eager, reverse KL alone"
MATERIALISED = "logits in full, token_stats"


def trl_divergence():
    """TRL's function, or None if it cannot be imported."""
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        return None
    return ChunkedDivergenceFunction


def inputs(rows: int, student: int, teacher: int, vocab: int, dtype: torch.dtype = torch.float32):
    """Hidden states, heads and tokens; logits of standard deviation 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    h, g = normal(rows, student), normal(rows, teacher)
    w, u = normal(vocab, student, scale=2 / student**0.5), normal(vocab, teacher, scale=2 / teacher**0.5)
    return h, w, g, u, torch.randint(0, vocab, (rows,), generator=generator)


def losses(g: torch.Tensor, u: torch.Tensor, tokens: torch.Tensor) -> dict[str, Callable]:
    """What each variant makes of hidden states and head: a value whose gradient is taken."""
    trl = trl_divergence()

    def ours(h, w, saved="recompute"):
        stats = cf.linear_token_stats(h, w, g, u, tokens, saved=saved)
        return stats.logprob + stats.reverse_kl

    def materialised(h, w):
        stats = cf.token_stats(h @ w.t(), g @ u.t(), tokens, inplace_backward=True)
        return stats.logprob + stats.reverse_kl

    variants = {OURS: ours, KEPT: lambda h, w: ours(h, w, "tiles")}
    if trl is not None:
        variants[TRL] = lambda h, w: trl.apply(h, w, None, g, u, None, 1.0)[0]
    variants[MATERIALISED] = materialised
    variants[EAGER] = lambda h, w: eager_reverse_kl(h @ w.t(), g @ u.t())
    return variants


def gradients(loss: Callable, h: torch.Tensor, w: torch.Tensor):
    leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
    return torch.autograd.grad(loss(*leaves).sum(), leaves)


def floors(h: torch.Tensor, w: torch.Tensor, g: torch.Tensor, u: torch.Tensor) -> dict[str, Callable]:
    """The products alone, in full and in the tiles that the operation uses."""
    (rows, _), vocab = h.shape, len(w)
    x, y = torch.ones(rows, vocab), torch.ones(rows, vocab)
    grad_h, grad_w = torch.ones_like(h), torch.ones_like(w)
    height, width = tile_size.tile_shape(rows, vocab, 8, h.device)
    tile_x, tile_y = torch.ones(height * width), torch.ones(height * width)

    def projections():
        torch.mm(h, w.t(), out=x)
        torch.mm(g, u.t(), out=y)

    def products():
        torch.mm(x, w, out=grad_h)
        torch.mm(x.t(), h, out=grad_w)

    def tiled():
        for backward in (False, True):
            for start in range(0, vocab, width):
                c = slice(start, min(start + width, vocab))
                for top in range(0, rows, height):
                    r = slice(top, min(top + height, rows))
                    shape = (r.stop - r.start, c.stop - c.start)
                    a, b = (t[: shape[0] * shape[1]].view(shape) for t in (tile_x, tile_y))
                    torch.mm(h[r], w[c].t(), out=a)
                    torch.mm(g[r], u[c].t(), out=b)
                    if backward:
                        grad_h[r].addmm_(a, w[c])
                        grad_w[c].addmm_(a.t(), h[r], beta=1 if top else 0)

    return {
        "GEMM floor": lambda: (projections(), products()),
        "GEMM floor with recomputation": lambda: (projections(), projections(), products()),
        "the same products in our tiles": tiled,
    }


def timing(shape: tuple[int, int, int, int], repeat: int) -> dict[str, dict[str, float]]:
    h, w, g, u, tokens = inputs(*shape)
    variants: dict[str, Callable[[], object]] = floors(h, w, g, u)
    for name, loss in losses(g, u, tokens).items():
        variants[name] = lambda loss=loss: gradients(loss, h, w)  # type: ignore[misc]
    return measure(variants, repeat)


def memory_child(shape: tuple[int, int, int, int], variant: str) -> None:
    """Runs one variant in this fresh process; prints the growth of the peak less the gradients, in KiB."""
    h, w, g, u, tokens = inputs(*shape)
    variants = losses(g, u, tokens)
    few = slice(0, 2)
    gradients(losses(g[few], u[:64], tokens[few] % 64)[variant], h[few], w[:64])  # thread stacks, imports
    before = reset_peak()
    kept = gradients(variants[variant], h, w)
    print(peak_kib() - before - sum(t.nbytes for t in kept) // 1024)


def memory(shape: tuple[int, int, int, int], threads: int) -> dict[str, dict[int, int]]:
    """KiB of every variant for a quarter, once and four times the rows."""
    _, _, g, u, tokens = (t[:1] for t in inputs(1, 1, 1, 1))
    rows, *rest = shape
    growth: dict[str, dict[int, int]] = {}
    for variant in losses(g, u, tokens):
        growth[variant] = {}
        for count in (rows // 4, rows, rows * 4):
            numbers = [str(n) for n in (count, *rest)]
            command = [
                sys.executable,
                __file__,
                "--memory-of",
                variant,
                "--threads",
                str(threads),
                "--numbers",
                *numbers,
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            growth[variant][count] = int(done.stdout)
    return growth


def errors(shape: tuple[int, int, int, int], rows: int = 32) -> dict[str, dict[str, float]]:
    """The largest error against float64 of the reverse KL and its two gradients, relative to the largest value."""
    h, w, g, u, tokens = inputs(rows, *shape[1:])
    exact = eager_exact(h, w, g, u)
    trl = trl_divergence()
    functions = {
        "linear_token_stats": lambda h, w: cf.linear_token_stats(h, w, g, u, tokens).reverse_kl,
        "logits in full, eager": lambda h, w: eager_reverse_kl(h @ w.t(), g @ u.t()),
    }
    if trl is not None:
        functions["TRL ChunkedDivergenceFunction"] = lambda h, w: trl.apply(h, w, None, g, u, None, 1.0)[0]
    found = {}
    for name, function in functions.items():
        got = (function(h, w), *gradients(function, h, w))
        found[name] = {
            what: float((a.double() - b).abs().max() / b.abs().max())
            for what, a, b in zip(("reverse_kl", "hidden gradient", "head gradient"), got, exact, strict=True)
        }
    return found


def eager_exact(h, w, g, u):
    h, w = h.double().requires_grad_(), w.double().requires_grad_()
    p, q = torch.log_softmax(h @ w.t(), -1), torch.log_softmax(g.double() @ u.double().t(), -1)
    value = (p.exp() * (p - q)).sum(-1)
    return value.detach(), *torch.autograd.grad(value.sum(), (h, w))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--parts", nargs="+", choices=("time", "memory", "error"), default=("time", "memory", "error"))
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--numbers", nargs=4, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        memory_child(tuple(args.numbers), args.memory_of)
        return
    shape = SHAPES[args.shape]
    rows, student, teacher, vocab = shape
    tile = tile_size.tile_shape(rows, vocab, 8, torch.device("cpu"))
    header = (
        f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, cmdp_fast {cf.__version__} "
        f"({native.variant() if native is not None else 'no'} kernels), {rows} x {student} / {teacher} -> {vocab} "
        f"float32, tiles of {tile[0]} x {tile[1]}"
    )
    print(header)
    if trl_divergence() is None:
        print("  absent: TRL (pip install trl)")
    results: dict[str, object] = {"header": header}
    if "time" in args.parts:
        times = timing(shape, args.repeat)
        results["time"] = times
        show("forward and backward", times, OURS)
    if "memory" in args.parts:
        grown = memory(shape, args.threads)
        results["memory_kib"] = grown
        print("\nextra memory beyond the gradients, MiB, for rows " + ", ".join(str(n) for n in grown[OURS]))
        for name, kib in grown.items():
            print(f"  {name:<58}" + "".join(f" {n / 1024:9.1f}" for n in kib.values()))
    if "error" in args.parts:
        found = errors(shape)
        results["error"] = found
        print("\nlargest error against float64, relative to the largest value")
        for name, values in found.items():
            print(f"  {name:<58}" + "".join(f"  {what} {value:.1e}" for what, value in values.items()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""Floors: the times that the machine needs for the unavoidable part of a case, measured in the same rounds.

The read floor sums every input. The copy floor adds two inputs into memory that has been touched before. The GEMM floor
is the bare products that an operation cannot avoid: `torch.mm(..., out=)` into memory that has been touched before.
With recomputation the projections come twice, which is the price of not keeping the logits. On a CPU the same products
are measured in our tiles as well, which there are sized for the cache. On a GPU, a copy on the
device and a large product in half precision are measured once per run, for its header.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmdp_fast.bench.measure import elapsed
from cmdp_fast.bench.variant import Inputs, Variant
from cmdp_fast.ops import gemm, tile_size

READ, COPY = "read floor", "copy floor"
GEMM, GEMM_AGAIN = "GEMM floor", "GEMM floor, projections twice"
GEMM_TILED = "the same products in our tiles"


def as_float32(t: Tensor) -> Tensor:
    """The same bytes as float32 numbers, where their count allows, so that no conversion is timed."""
    return t if t.dtype == torch.float32 or t.numel() % 2 else t.view(-1).view(torch.float32)


def read_floor(names: Sequence[str]) -> Variant:
    """A floor that sums the named inputs."""
    return Variant(READ, lambda inputs: {name: as_float32(inputs[name]).sum() for name in names})


def copy_floor(names: tuple[str, str], like: Inputs) -> Variant:
    """A floor that adds two inputs into memory that has been written before."""
    out = torch.ones_like(as_float32(like[names[0]]))
    return Variant(COPY, lambda inputs: {"sum": torch.add(*(as_float32(inputs[name]) for name in names), out=out)})


def gemm_floors(inputs: Inputs, backward: bool) -> list[Variant]:
    """Floors from the products of two projections, and of the student's two gradients if there is a backward pass.

    The factors have the dtype in which the operation multiplies. On a CPU half precision is widened first
    (`ops/gemm.py`); that is not timed here.
    """
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    dtype = gemm.factor_dtypes(inputs["student_hidden"], inputs["student_weight"]).multiplied
    h, w, g, u = (inputs[name].to(dtype) for name in names)
    (rows, _), vocab = h.shape, len(w)
    x, y = (torch.ones(rows, vocab, dtype=dtype, device=h.device) for _ in range(2))
    grad_h, grad_w = torch.ones_like(h), torch.ones_like(w)
    height, width = tile_size.tile_shape(rows, vocab, 2 * x.element_size(), h.device)
    tiles = [torch.ones(height * width, dtype=dtype, device=h.device) for _ in range(2)]

    def projections() -> None:
        torch.mm(h, w.t(), out=x)
        torch.mm(g, u.t(), out=y)

    def gradients() -> None:
        torch.mm(x, w, out=grad_h)
        torch.mm(x.t(), h, out=grad_w)

    def tiled() -> None:
        for gradient in (False, True) if backward else (False,):
            for start in range(0, vocab, width):
                columns = slice(start, min(start + width, vocab))
                for top in range(0, rows, height):
                    r = slice(top, min(top + height, rows))
                    shape = (r.stop - r.start, columns.stop - columns.start)
                    a, b = (t[: shape[0] * shape[1]].view(shape) for t in tiles)
                    torch.mm(h[r], w[columns].t(), out=a)
                    torch.mm(g[r], u[columns].t(), out=b)
                    if gradient:
                        grad_h[r].addmm_(a, w[columns])
                        grad_w[columns].addmm_(a.t(), h[r], beta=1 if top else 0)

    def floor(name: str, *parts: Callable[[], None]) -> Variant:
        def run(_: Inputs) -> dict[str, Tensor]:
            for part in parts:
                part()
            return {}

        return Variant(name, run)

    in_tiles = [floor(GEMM_TILED, tiled)] if h.device.type == "cpu" else []
    if not backward:
        return [floor(GEMM, projections), *in_tiles]
    return [
        floor(GEMM, projections, gradients),
        floor(GEMM_AGAIN, projections, projections, gradients),
        *in_tiles,
    ]


def device_limits(repeat: int) -> dict[str, float]:
    """The GPU's rates: bytes per second of a copy of 1 GiB, operations per second of a bfloat16 product of 8192^3."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    side = 8192
    a, b = (torch.randn(side, side, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)

    def best(function: Callable[[], object]) -> float:
        function()
        return statistics.median(elapsed(function, "cuda") for _ in range(repeat))

    return {
        "copy_bytes_per_second": 2 * source.nbytes / best(lambda: target.copy_(source)),
        "bfloat16_flops_per_second": 2 * side**3 / best(lambda: torch.mm(a, b, out=out)),
    }

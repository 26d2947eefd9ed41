"""How long a launch takes on a GPU, from a few constants: a model, not a measurement.

A product is cut into output tiles of 256 x 128 (or 128 x 128, at less than the full rate), one per multiprocessor at a
time. A wave of them takes its operations over the rate of a multiprocessor, and `WAVE` for its start, its drain and
its epilogue. 144 tiles on 132 multiprocessors are two waves. Where too few tiles come out the inner dimension is split,
and the partial sums are written and read once more. The rate is the one at which 8192^3 comes out as it was seen, so
that the model is right there by construction. A product takes no less time than its bytes.

A pass (any other kernel) takes its bytes over the bandwidth of a copy, but no less than its instructions take, and
`START` for its launch, the ramp at its beginning and the tail at its end.

Left out: what stays in the L2 cache between two kernels, clocks that fall under load, products of odd strides, and that
reads and writes mix badly. Host and device work beside each other: a plan takes the longer of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from devices import DEVICES, Device

WAVE = 2.0e-6  # seconds that a wave of output tiles takes beside its products
# Of a pass that moves memory. Two of them are the 9.3 us that the forward pass over logits takes at 64 to 1024 rows on
# top of its bytes.
START = 4.65e-6
OUTPUT_TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.9}  # and the share of the full rate that each reaches
SPLITS = (1, 2, 4, 8, 16, 32)
SHORTEST = 256  # an inner dimension that a split leaves
ISSUED = 0.6  # of the instructions that schedulers could issue, in a loop with barriers and reductions
DOT_TERAFLOPS = 450.0  # of products in Triton's tl.dot: the upper end of what verl's kernel of this kind reaches

# Seconds that Python and the launch take on the host: a product or another operation of PyTorch's, and one of our
# Triton kernels, with twenty arguments in tuples.
HOST_PYTORCH, HOST_TRITON = 8e-6, 40e-6

FLOAT, HALF = 4, 2  # bytes of a number
SEEN = 8192  # rows, columns and inner dimension of the product whose rate is known


class Product(NamedTuple):
    """out [rows, columns] = a [rows, inner] b [inner, columns], or += if it ``adds``."""

    rows: int
    columns: int
    inner: int
    out_size: int  # bytes of a number of the output
    adds: bool = False
    size: int = 2  # bytes of a number of the factors

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.inner

    @property
    def bytes(self) -> int:
        """Every number once: what a cache of any size has to read and write."""
        factors = (self.rows + self.columns) * self.inner * self.size
        return factors + self.rows * self.columns * self.out_size * (2 if self.adds else 1)

    @property
    def host(self) -> float:
        return HOST_PYTORCH

    def seconds(self, gpu: Device) -> float:
        computed = min(self._seconds(gpu, *tile, split) for tile in OUTPUT_TILES for split in SPLITS)
        return max(computed, self.bytes / copied(gpu))

    def _seconds(self, gpu: Device, height: int, width: int, split: int) -> float:
        """With output tiles of this size, and the inner dimension in so many parts."""
        if split > 1 and self.inner < split * SHORTEST:
            return math.inf
        tiles = -(-self.rows // height) * -(-self.columns // width) * split
        waves = -(-tiles // gpu.multiprocessors)
        operations = 2 * height * width * self.inner / split
        partial_sums = 2 * split * self.rows * self.columns * 4 if split > 1 else 0
        rate = full_rate(gpu) * OUTPUT_TILES[height, width]
        return waves * (operations / rate + WAVE) + partial_sums / copied(gpu)


class Pass(NamedTuple):
    """A kernel that moves memory. ``instructions`` of single threads in all, where they may be what takes longest."""

    read: int  # bytes
    written: int
    instructions: float = 0.0
    host: float = HOST_PYTORCH

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def seconds(self, gpu: Device) -> float:
        return START + max(self.bytes / copied(gpu), self.instructions / (ISSUED * gpu.instructions))


class DotKernel(NamedTuple):
    """A Triton kernel that multiplies with tl.dot, and keeps its products in registers."""

    flops: int
    bytes: int
    host: float = HOST_TRITON

    def seconds(self, gpu: Device) -> float:
        return START + max(self.flops / (DOT_TERAFLOPS * 1e12), self.bytes / copied(gpu))


Step = Product | Pass | DotKernel


def copied(gpu: Device) -> float:
    """Bytes per second of a copy, read plus written."""
    return gpu.copied_terabytes * 1e12


def full_rate(gpu: Device) -> float:
    """Operations per second of one multiprocessor within a wave of 128 x 256 tiles."""
    waves = -(-(SEEN // 128) * (SEEN // 256) // gpu.multiprocessors)
    seconds = 2 * SEEN**3 / (gpu.product_teraflops * 1e12)
    return 2 * 128 * 256 * SEEN / (seconds / waves - WAVE)


class Shape(NamedTuple):
    """Two heads over the same rows, in bfloat16."""

    rows: int
    student_hidden: int
    teacher_hidden: int
    vocab: int


class Plan(NamedTuple):
    """The launches of both directions. ``beside``: what it computes less or more than `linear_token_stats` does."""

    name: str
    forward: list[Step]
    backward: list[Step]
    beside: str = ""


def pieces(size: int, width: int) -> list[slice]:
    return [slice(i, min(i + width, size)) for i in range(0, size, width)]


class Total(NamedTuple):
    """What the steps of one direction come to. Seconds are predicted."""

    launches: int
    bytes: int
    flops: int
    host: float
    device: dict[str, float]  # by GPU

    def seconds(self, gpu: str) -> float:
        return max(self.host, self.device[gpu])


GPUS = tuple(device for device in DEVICES if device.product_teraflops)


def total(steps: Sequence[Step]) -> Total:
    return Total(
        len(steps),
        sum(step.bytes for step in steps),
        sum(step.flops for step in steps),
        sum(step.host for step in steps),
        {gpu.name: sum(step.seconds(gpu) for step in steps) for gpu in GPUS},
    )

"""A case is an operation in one mode, at given sizes and dtype. An `Op` describes the cases of an operation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmdp_fast.bench.variant import Inputs, Values, Variant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKED_ROWS = 32  # rows of the case on which a variant is compared with float64


@dataclass(frozen=True)
class Shape:
    """Rows of logits, the width of the vocabulary, and the hidden sizes of a student and its teacher."""

    name: str
    rows: int
    vocab: int
    hidden: int
    teacher_hidden: int
    completion: int | None = None  # tokens per completion; None: a quarter of the rows, 64 at most

    @property
    def length(self) -> int:
        """Tokens per completion, where the rows are the tokens of several completions."""
        return min(64, max(1, self.rows // 4)) if self.completion is None else min(self.completion, max(1, self.rows))

    @property
    def sequences(self) -> int:
        """Completions, where the rows are their tokens."""
        return self.rows // self.length


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5", 256, 151936, 1536, 3584),  # 1.5B from 7B
        Shape("llama3", 512, 128256, 3072, 4096),  # 3.2-3B from 8B
        Shape("smollm2", 1024, 49152, 576, 576),  # 135M
        Shape("gemma", 64, 262144, 1152, 2560),  # 3-1B from 4B
        Shape("llama2", 4096, 32000, 2048, 4096),  # TinyLlama from 7B
        Shape("tiny", 32, 1536, 16, 24),  # only to try the harness: it says nothing about speed
    )
}
MEASURED = tuple(name for name in SHAPES if name != "tiny")

# 8192 tokens as one, some and many completions. The vocabulary is that with which they weigh as much as `qwen2.5`; a
# GPU can do with a real one: `case.resized(vocab=151936)`.
LAYOUTS = ("1x8192", "8x1024", "64x128")
for _name in LAYOUTS:
    SHAPES[_name] = Shape(_name, 8192, 4748, 64, 64, completion=int(_name.partition("x")[2]))


@dataclass(frozen=True)
class Work:
    """The work that no implementation can avoid: bytes read and written once each, and the floating-point operations of
    matrix products."""

    read: int = 0
    written: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Case:
    """An operation at a shape and dtype. ``mode`` names the part that is timed: `forward`, `backward`, ..."""

    op: str
    mode: str
    shape: Shape
    dtype: str
    device: str

    @property
    def label(self) -> str:
        s = self.shape
        return f"{self.op} {self.mode}, {s.name} ({s.rows} x {s.vocab}) {self.dtype} on {self.device}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def element_size(self) -> int:
        return self.torch_dtype.itemsize

    def resized(self, **sizes: int) -> Case:
        """The same case with other sizes."""
        return replace(self, shape=replace(self.shape, **sizes))  # type: ignore[arg-type]

    def reduced(self) -> Case:
        """The same case on few rows, for which float64 is affordable."""
        return self.resized(rows=min(self.shape.rows, CHECKED_ROWS))


class Op(ABC):
    """An operation: its modes and shapes, its inputs, its value in float64, our variants and its floors."""

    name: str
    modes: tuple[str, ...]
    shapes: tuple[str, ...] = MEASURED  # unless others are asked for
    axes: tuple[str, ...] = ("rows", "vocab", "threads")  # those that are worth a sweep

    def why_not(self, case: Case) -> str | None:
        """Why a case is left out, or None."""
        return None

    @abstractmethod
    def work(self, case: Case) -> Work:
        """The bytes that the case must move and the operations that it must compute."""

    @abstractmethod
    def make(self, case: Case, seed: int) -> Inputs:
        """One set of random inputs on the case's device."""

    @abstractmethod
    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        """The named values by the plain PyTorch reference. In float64 they are the truth.

        With ``dtype`` float32 or a half precision the inputs stay as they are, as in eager code.
        """

    @abstractmethod
    def ours(self, case: Case) -> list[Variant]:
        """Our variants. Ratios are relative to the first of them."""

    def floors(self, case: Case, inputs: Inputs) -> list[Variant]:
        """Floors, measured beside the variants: how fast the machine can move or multiply the same data."""
        return []

    def bounds(self, case: Case) -> dict[str, tuple[str, ...]]:
        """Sums of floors by name. A variant's percentage is relative to the first."""
        return {}


def random(case: Case, seed: int) -> torch.Generator:
    """The generator of the random numbers of one set."""
    return torch.Generator(device=case.device).manual_seed(seed)


def normal(case: Case, generator: torch.Generator, *shape: int, scale: float = 2.0) -> Tensor:
    """Normal numbers with standard deviation ``scale`` in the case's dtype: nothing is timed on zeros."""
    values = torch.randn(*shape, generator=generator, device=case.device)
    return values.mul_(scale).to(case.torch_dtype)


def make_tokens(case: Case, generator: torch.Generator, *shape: int) -> Tensor:
    """Random tokens of the case's vocabulary."""
    return torch.randint(0, case.shape.vocab, shape, generator=generator, device=case.device)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with their floating-point tensors in float64 if ``dtype`` is that, else the inputs themselves."""
    if dtype != torch.float64:
        return inputs
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}

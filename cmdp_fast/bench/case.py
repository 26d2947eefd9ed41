"""A case: an operation, what is asked of it, at which sizes and dtype; and what every operation says of its cases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmdp_fast.bench.variant import Inputs, Values, Variant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKED_ROWS = 32  # rows of the case on which a variant is held against float64


@dataclass(frozen=True)
class Shape:
    """Rows of logits, the width of the vocabulary, and the hidden sizes of a student and its teacher."""

    name: str
    rows: int
    vocab: int
    hidden: int
    teacher_hidden: int

    @property
    def length(self) -> int:
        """Tokens of a completion, where rows are the tokens of some completions."""
        return min(64, max(1, self.rows // 4))

    @property
    def sequences(self) -> int:
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


@dataclass(frozen=True)
class Work:
    """What nobody can avoid: bytes read and written once each, floating-point operations of matrix products."""

    read: int = 0
    written: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Case:
    """``mode`` is what is timed, one of the operation's (`forward`, `backward`, ...)."""

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
        """The same with other sizes."""
        return replace(self, shape=replace(self.shape, **sizes))  # type: ignore[arg-type]

    def reduced(self) -> Case:
        """The same on few rows, of which float64 is affordable."""
        return self.resized(rows=min(self.shape.rows, CHECKED_ROWS))


class Op(ABC):
    """What an operation says of its cases."""

    name: str
    modes: tuple[str, ...]
    shapes: tuple[str, ...] = MEASURED  # where nothing else is asked for
    axes: tuple[str, ...] = ("rows", "vocab", "threads")  # along which it is worth a sweep

    def why_not(self, case: Case) -> str | None:
        """Why a case is left out, or None."""
        return None

    @abstractmethod
    def work(self, case: Case) -> Work:
        """What the case must move and compute."""

    @abstractmethod
    def make(self, case: Case, seed: int) -> Inputs:
        """A set of random inputs on the case's device."""

    @abstractmethod
    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        """The values of these names by the plain PyTorch reference in a dtype: the truth if it is float64.

        float32 and half precision mean the inputs as they are, which is what eager code makes of them.
        """

    @abstractmethod
    def ours(self, case: Case) -> list[Variant]:
        """Our variants; ratios are to the first of them."""

    def floors(self, case: Case, inputs: Inputs) -> list[Variant]:
        """What is measured beside the variants, to say how far they are from what the machine can do."""
        return []

    def bounds(self, case: Case) -> dict[str, tuple[str, ...]]:
        """Sums of floors by name. The first is the one that a variant's time is given in percent of."""
        return {}


def random(case: Case, seed: int) -> torch.Generator:
    """The generator of a set's random numbers."""
    return torch.Generator(device=case.device).manual_seed(seed)


def normal(case: Case, generator: torch.Generator, *shape: int, scale: float = 2.0) -> Tensor:
    """Normal numbers of this deviation in the case's dtype: nothing is timed on zeros."""
    values = torch.randn(*shape, generator=generator, device=case.device)
    return values.mul_(scale).to(case.torch_dtype)


def make_tokens(case: Case, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, case.shape.vocab, shape, generator=generator, device=case.device)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The floating-point tensors in float64 if that is asked for, else as they are."""
    if dtype != torch.float64:
        return inputs
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}

"""What a case decides by chance, all from one seed."""

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Draw:
    """Choices of one case; `made` and `offered` remember which, by the name of what was chosen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.made: set[tuple[str, Any]] = set()
        self.offered: set[tuple[str, Any]] = set()

    def choice(self, what: str, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        chosen = self.random.choices(options, weights)[0]
        self.offered |= {(what, option) for option in options}
        self.made.add((what, chosen))
        return chosen

    def chance(self, what: str, probability: float) -> bool:
        return self.choice(what, (True, False), (probability, 1 - probability))

    def integer(self, low: int, high: int) -> int:
        """In [low, high]."""
        return self.random.randint(low, high)

    def shuffled(self, values: Sequence[T]) -> list[T]:
        return self.random.sample(values, len(values))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.random.getrandbits(63))

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator(), dtype=torch.float64) * scale

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator(), dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """In [0, high)."""
        return torch.randint(0, high, shape, generator=self.generator())

    def mostly(self, probability: float, *shape: int) -> torch.Tensor:
        """bool, True with a probability."""
        return self.uniform(*shape) < probability


def seed_of(number: int) -> int:
    """The seed of case ``number`` of every run: the finaliser of splitmix64, so that neighbours have nothing in
    common."""
    z = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)

"""How many cases a run has, and which of them are one test."""

from typing import NamedTuple

from fuzzing.draws import seed_of

USUAL = {
    "torch": 200,
    "cpu": 400,
    "triton": 100,
    "cuda": 450,
    "objective": 400,
}  # cases of a run that asks for no number
SIZE = 100


class Chunk(NamedTuple):
    """Neighbouring cases by number, or one by its seed."""

    start: int
    stop: int
    seed: int | None = None

    def seeds(self) -> list[int]:
        return [seed_of(number) for number in range(self.start, self.stop)] if self.seed is None else [self.seed]

    def __str__(self) -> str:
        return f"{self.start}-{self.stop - 1}" if self.seed is None else f"seed {self.seed}"


def chunks_of(backend: str, asked: int | None, seed: int | None) -> list[Chunk]:
    if seed is not None:
        return [Chunk(0, 1, seed)]
    count = USUAL[backend] if asked is None else asked
    return [Chunk(start, min(start + SIZE, count)) for start in range(0, count, SIZE)]

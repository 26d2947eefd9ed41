"""A teacher that several processes hold together, in tensor parallelism: the first is asked, and tells the others.

Each process makes the same teacher of its part of the model. Layers exchange what they need by themselves; what is told
here is the question, as tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from cmdp_fast.errors import first_line

from .in_process import TeacherInProcess
from .teacher import Teacher, TeacherOutputs

_END = -1


class ParallelTeacher(Teacher):
    """The first process's teacher, which is asked. ``lost`` is called with a line where a question failed: the others
    may be in the middle of it, and nothing can be agreed on with them any more."""

    CONCURRENT = 1

    def __init__(self, own: TeacherInProcess, lost: Callable[[str], None]) -> None:
        self.about, self.head = own.about, own.head
        self._own, self._lost = own, lost

    def answer(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> TeacherOutputs:
        try:
            tokens = [token for row in rows for token in row]
            _told(torch.tensor([len(rows), len(tokens)]))
            _told(torch.tensor([*map(len, rows), *wanted, *tokens], dtype=torch.int64))
            return self._own.answer(rows, wanted)
        except BaseException as error:  # whatever it is, the others do not know of it
            self._lost(first_line(error))
            raise

    def vocabulary(self) -> dict[str, int]:
        """The numbers of its tokenizer's tokens."""
        return self._own.vocabulary()

    def close(self) -> None:
        """Lets the others end; nothing may be under way."""
        super().close()
        _told(torch.tensor([_END, 0]))


def follow(own: TeacherInProcess) -> None:
    """What every other process does: its part of each answer, until the first one ends."""
    while True:
        count, tokens = _told(torch.zeros(2, dtype=torch.int64)).tolist()
        if count == _END:
            return
        flat = _told(torch.zeros(2 * count + tokens, dtype=torch.int64))
        lengths, wanted, ids = flat.split([count, count, tokens])
        own.answer([row.tolist() for row in ids.split(lengths.tolist())], wanted.tolist())


def _told(numbers: torch.Tensor) -> torch.Tensor:
    """The first process's numbers, in every process."""
    if numbers.numel():
        dist.broadcast(numbers, src=0)
    return numbers

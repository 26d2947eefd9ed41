"""Questions wait in a line for the one thread that runs the model, and are read in batches of bounded size.

A question that fits is one batch, just as it was asked: a batch of other rows, or of another width, adds up in another
order, and its hidden states would differ in the last bits from those of a trainer that holds the model itself.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from ..teacher import Teacher

Rows = Sequence[Sequence[int]]


class Busy(RuntimeError):
    """So many questions wait that no other is taken."""


class _Waiting(NamedTuple):
    rows: Rows
    wanted: Sequence[int]
    answer: Future[Tensor]


class Batching:
    """Asks a teacher in this process, one batch after another, first come, first served.

    ``batch_tokens``: of the rows of a batch, each as long as the longest. A larger question is read in several batches,
    the longest rows first, so that little is padded, and what does not fit the memory shows at once; a row that is
    longer alone is a batch of its own. ``merge``: questions that wait are read together where they fit, for more tokens
    per second and results that depend, in the last bits, on who else asks. ``most``: questions that wait; `Busy` for
    more.
    """

    def __init__(self, teacher: Teacher, batch_tokens: int, merge: bool = False, most: int = 256) -> None:
        self.tokens = 0  # read so far
        self._teacher, self._batch_tokens, self._merge = teacher, batch_tokens, merge
        self._line: queue.Queue[_Waiting | None] = queue.Queue(most)
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="teacher's model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Questions that wait."""
        return self._line.qsize()

    def ask(self, rows: Rows, wanted: Sequence[int]) -> Future[Tensor]:
        """The hidden states [N, H] of the last ``wanted`` tokens of each row, to come. Raises Busy."""
        asked = _Waiting(rows, wanted, Future())
        with self._lock:  # nothing may come behind the end
            if self._closed:
                raise Busy("the teacher ends")
            try:
                self._line.put_nowait(asked)
            except queue.Full:
                raise Busy(f"{self._line.maxsize} questions wait already") from None
        return asked.answer

    def close(self) -> None:
        """Answers what waits, and ends."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._line.put(None)
        self._thread.join()

    def _work(self) -> None:
        first = self._line.get()
        while first is not None:
            together, following = [first], None
            if self._merge:
                together, following = self._with_others(first)
            self._answer(together)
            first = following or self._line.get()

    def _with_others(self, first: _Waiting) -> tuple[list[_Waiting], _Waiting | None]:
        """Those that wait and fit with the first into a batch, and the next, which was taken and does not."""
        together, count, longest = [first], len(first.rows), _longest(first.rows)
        with contextlib.suppress(queue.Empty):
            while (other := self._line.get_nowait()) is not None:
                count, longest = count + len(other.rows), max(longest, _longest(other.rows))
                if count * longest > self._batch_tokens:
                    return together, other
                together.append(other)
            self._line.put(None)  # the end, for later
        return together, None

    def _answer(self, together: Sequence[_Waiting]) -> None:
        rows = [row for one in together for row in one.rows]
        wanted = [count for one in together for count in one.wanted]
        try:
            parts = self._read(rows, wanted).split([sum(one.wanted) for one in together])
        except BaseException as error:  # of a model or a device; whoever asked is told, and the next question is tried
            for one in together:
                one.answer.set_exception(error)
            return
        for one, part in zip(together, parts, strict=True):
            one.answer.set_result(part)
        self.tokens += sum(map(len, rows))

    def _read(self, rows: Rows, wanted: Sequence[int]) -> Tensor:
        parts: dict[int, Tensor] = {}
        groups = list(batches(rows, self._batch_tokens))
        for places in groups:
            counts = [wanted[place] for place in places]
            hidden = self._teacher.answer([rows[place] for place in places], counts).as_hidden()
            if len(groups) == 1:
                return hidden
            parts |= zip(places, hidden.split(counts), strict=True)
        return torch.cat([parts[place] for place in range(len(rows))])


def batches(rows: Rows, most: int) -> Iterator[list[int]]:
    """The places of the rows of each batch: all in their order if they fit ``most`` tokens, each row counted as long as
    the longest; else the longest rows first."""
    if len(rows) * _longest(rows) <= most:
        yield list(range(len(rows)))
        return
    left = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    while left:
        count = max(most // max(len(rows[left[0]]), 1), 1)
        yield left[:count]
        left = left[count:]


def _longest(rows: Rows) -> int:
    return max(map(len, rows), default=0)

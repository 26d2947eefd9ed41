"""Questions asked before their answers are needed, so that a teacher computes while the student reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from cmdp_fast.reading import TokenBatch

from .teacher import Teacher, UnderWay

AHEAD = 4  # questions under way: one is computed, one is on its way there, one on its way back, one has arrived


def asked_ahead(teacher: Teacher, batches: Iterable[TokenBatch]) -> Iterator[UnderWay]:
    """The questions of some batches, one after another; `AHEAD` of them are under way, the one that is given among
    them."""
    coming, under_way = iter(batches), deque[UnderWay]()
    while True:
        under_way.extend(teacher.begin(batch) for batch in islice(coming, AHEAD - len(under_way)))
        if not under_way:
            return
        yield under_way.popleft()

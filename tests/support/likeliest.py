"""A teacher in this process that answers with its most likely tokens, as a server might."""

from __future__ import annotations

from dataclasses import replace

from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.teacher import TopK


class Likeliest(TeacherInProcess):
    """A teacher that says of each token its ``k`` most likely ones, and the least likely one's log-probability."""

    def __init__(self, *given, k: int, floor: bool = True, **named) -> None:
        super().__init__(*given, **named)
        self.k, self.floor = k, floor
        self._head = self.head
        self.about, self.head = replace(self.about, answers="topk", hidden_size=0, head=""), None

    def answer(self, rows, wanted):
        self.head = self._head
        said = super().answer(rows, wanted)
        self.head = None
        logprobs = said.as_logits().double().log_softmax(-1)
        best = logprobs.topk(self.k)
        floor = logprobs.amin(-1).float() if self.floor else None
        return replace(said, hidden=None, head=None, topk=TopK(best.indices, best.values.float(), floor))

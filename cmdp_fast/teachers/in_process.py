"""A teacher in this process: a causal language model whose hidden states are asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from cmdp_fast.heads import Head, head_of
from cmdp_fast.reading import rows_hidden
from cmdp_fast.vocabulary import vocabulary_digest

from .teacher import Teacher, TeacherAbout, TeacherOutputs, head_digest


class TeacherInProcess(Teacher):
    """A model of transformers and its tokenizer. Questions are answered one after another, each as one batch, with the
    numbers that a trainer gets that holds the model itself."""

    CONCURRENT: ClassVar[int] = 1
    moves: bool = False
    """Whether its model goes where its answers are wanted (`to`), or stays where it is."""

    def __init__(
        self, model: Any, tokenizer: Any, name: str = "", revision: str = "", ends: tuple[int, ...] = ()
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.head = self._head_of_model()
        self._alone = threading.Lock()  # its hooks serve one call at a time
        text = model.config.get_text_config()
        self.about = TeacherAbout(
            answers="hidden",
            model=name or str(model.config.name_or_path),
            revision=revision,
            dtype=str(self.head.weight.dtype).removeprefix("torch."),
            vocab_size=self.head.weight.shape[0],
            hidden_size=self.head.weight.shape[1],
            tokenizer=vocabulary_digest(tokenizer),
            head=head_digest(self.head),
            ends=ends,
            positions=int(getattr(text, "max_position_embeddings", None) or 0),
        )

    def to(self, device: torch.device | str) -> Teacher:
        if self.moves:
            self.model.to(device)
            self.head = self._head_of_model()
        return super().to(device)

    def _head_of_model(self) -> Head:
        head = head_of(self.model)
        return head._replace(weight=_all_of(head.weight), bias=None if head.bias is None else _all_of(head.bias))

    def answer(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> TeacherOutputs:
        since = time.perf_counter()
        assert self.head is not None
        if any(wanted):
            with self._alone, torch.no_grad():
                hidden = self._hidden(rows, wanted)
        else:  # nothing to read
            hidden = self.head.weight.new_empty(0, self.about.hidden_size)
        return TeacherOutputs(hidden=hidden, head=self.head, seconds=time.perf_counter() - since)

    def _hidden(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> torch.Tensor:
        """What is answered, [N, H]; something is wanted."""
        return rows_hidden(self.model, rows, wanted)

    def vocabulary(self) -> dict[str, int]:
        """The numbers of its tokenizer's tokens."""
        return dict(self.tokenizer.get_vocab())


def _all_of(parameter: Any) -> torch.Tensor:
    """All of a parameter, which may be spread over the processes of tensor parallelism."""
    whole: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach()

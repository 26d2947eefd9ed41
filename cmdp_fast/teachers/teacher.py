"""What every teacher that is asked has in common: who it is, what it answers, and how it is asked.

A question is some rows of token ids, and of each row of how many of its last tokens the outputs are wanted. Nothing is
padded on the way: a teacher answers with one output per wanted token, row behind row. `Teacher.ask` returns at once, so
that many questions are under way, and are answered in any order; `outputs` and `of_completions` wait, and lay the
answer out for masks.
"""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cmdp_fast.heads import Head
from cmdp_fast.reading import TokenBatch
from cmdp_fast.threads import Threads


class TopK(NamedTuple):
    """The teacher's log-probabilities of some tokens, over its whole vocabulary, at temperature 1."""

    ids: Tensor  # [..., k] int64
    logprobs: Tensor  # [..., k]
    floor: Tensor | None = None  # [...]: the log-probability of its least likely token, where it says so


@dataclass(frozen=True)
class Asking:
    """How a teacher is asked, wherever it is; each kind reads what concerns it."""

    seconds: float = 600.0  # for one answer
    token_file: str = ""  # holds the word that a server wants to hear
    dtype: str = ""  # of hidden states on the wire: "bfloat16", "float32" or "int8"; "": the teacher's own


@dataclass(frozen=True)
class TeacherAbout:
    """Who answers: two that agree in all of this give the same numbers."""

    answers: Literal["hidden", "logits", "topk"]
    model: str  # its name, for messages
    revision: str  # of its weights: a commit, or a digest of its files
    dtype: str  # of what it computes with, such as "bfloat16"
    vocab_size: int  # columns of its logits
    hidden_size: int  # 0 where it answers with none
    tokenizer: str  # `vocabulary_digest` of its tokenizer
    head: str  # `head_digest`, "" where it answers with no hidden states
    positions: int  # tokens of a row at most; 0 where there is no limit
    ends: tuple[int, ...] = ()  # tokens that end its own completions, where it says so


@dataclass(frozen=True)
class TeacherOutputs:
    """What a teacher says of some tokens, [N, ...] packed or [B, T, ...] padded: one of the three, as it `answers`."""

    hidden: Tensor | None = None  # [..., H]: what its head reads, after the final norm
    logits: Tensor | None = None  # [..., V]
    topk: TopK | None = None
    head: Head | None = None  # for the hidden states
    bytes: int = 0  # that came over a wire or from a disk
    seconds: float = 0.0  # from the question to the answer

    def as_hidden(self) -> Tensor:
        """The hidden states. Raises TypeError where it answers with something else."""
        if self.hidden is None:
            raise TypeError("this teacher answers with no hidden states; expected one that does")
        return self.hidden

    def as_logits(self) -> Tensor:
        """The logits, made of the hidden states where they are what came."""
        if self.logits is not None:
            return self.logits
        hidden = self.as_hidden()
        assert self.head is not None
        return self.head._replace(weight=self.head.weight.to(hidden.dtype)).logits(hidden)

    def to(self, device: torch.device) -> TeacherOutputs:
        """The same on a device."""
        moved = (None if t is None else t.to(device) for t in (self.hidden, self.logits))
        hidden, logits = moved
        topk = self.topk and TopK(*(None if t is None else t.to(device) for t in self.topk))  # type: ignore[arg-type]
        return replace(self, hidden=hidden, logits=logits, topk=topk)

    def padded(self, mask: Tensor) -> TeacherOutputs:
        """Packed outputs at the places of a mask [B, T], in its order, zeros elsewhere."""

        def placed(packed: Tensor | None) -> Tensor | None:
            if packed is None:
                return None
            wide = packed.new_zeros(*mask.shape, *packed.shape[1:])
            wide[mask.to(wide.device)] = packed
            return wide

        topk = self.topk and TopK(*map(placed, self.topk))  # type: ignore[arg-type]  # ids and logprobs are there
        return replace(self, hidden=placed(self.hidden), logits=placed(self.logits), topk=topk)


class Taken(NamedTuple):
    """What answers took."""

    tokens: int = 0
    bytes: int = 0  # over a wire or from a disk
    seconds: float = 0.0  # of waiting for them

    def plus(self, tokens: int, size: int, seconds: float) -> Taken:
        return Taken(self.tokens + tokens, self.bytes + size, self.seconds + seconds)


class UnderWay(NamedTuple):
    """A question about the tokens that a mask [B, T] shows, whose answer may not be there yet."""

    teacher: Teacher
    answer: Future[TeacherOutputs]  # packed
    mask: Tensor
    tokens: int  # that it shows

    def result(self) -> TeacherOutputs:
        """The outputs [B, T, ...], on the teacher's device. Waits for them."""
        since = time.perf_counter()
        said = self.answer.result()
        waited = time.perf_counter() - since
        self.teacher.taken = self.teacher.taken.plus(self.tokens, said.bytes, waited)
        return replace(said.to(self.teacher.device).padded(self.mask), head=self.teacher.head)


class StoredCompletions(Protocol):
    """Completions that a teacher holds beside what it says of them."""

    def of(self, prompt: Sequence[int]) -> list[list[int]]:
        """Those of a prompt, as token ids, in the order in which they were stored; of one that it lacks there are
        none."""


class Teacher(ABC):
    """A teacher that is asked. A kind implements `answer` and says who it is in ``about``; ``head`` belongs to hidden
    states, on the device where they arrive.

    Nothing it says has a gradient. Errors are InputErrors that name the teacher, raised where the answer is awaited.
    """

    CONCURRENT: ClassVar[int] = 8  # questions under way at once

    elsewhere: bool = False
    """Whether a server computes the answers: a process that ends does not wait for those that are under way."""
    about: TeacherAbout
    head: Head | None = None
    device: torch.device = torch.device("cpu")
    """Where `outputs` and `of_completions` lay out what was answered, and where the head is; see `to`."""
    taken: Taken = Taken()
    """What was answered so far, and what that took."""
    completions: StoredCompletions | None = None  # of one that answers for these alone

    @classmethod
    def open(cls, place: str, asking: Asking) -> Teacher:
        """The teacher at a place, which is what its name says behind the kind. Raises InputError if there is none."""
        raise NotImplementedError(f"{cls.__name__} has no name")

    @property
    def digest(self) -> str:
        """sha256 of what a run that goes on has to find again."""
        return about_digest(self.about)

    @abstractmethod
    def answer(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> TeacherOutputs:
        """The outputs [N, ...] of the last ``wanted`` tokens of each row, N in all, row behind row. May be called from
        several threads at once. The question was checked."""

    def ask(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> Future[TeacherOutputs]:
        """`answer`, under way. Raises ValueError for a question that cannot be answered, before anything is sent."""
        self._check(rows, wanted)
        return self._threads.begin(partial(self.answer, rows, wanted))

    def to(self, device: torch.device | str) -> Teacher:
        """Itself, with answers laid out on a device and the head there, as a module does it."""
        self.device = torch.device(device)
        if self.head is not None:
            bias = None if self.head.bias is None else self.head.bias.to(self.device)
            self.head = self.head._replace(weight=self.head.weight.to(self.device), bias=bias)
        return self

    def outputs(self, ids: Tensor, mask: Tensor, last: int | None = None) -> TeacherOutputs:
        """The outputs [B, L, ...] at token ids [B, S] that a mask [B, S] shows, or at the last L = ``last`` of the S
        columns; zeros where the mask is 0. A token that is masked is not seen, on whichever side the padding is.

        Waits for the answer. Raises ValueError for shapes or token ids that do not fit.
        """
        if ids.dim() != 2 or mask.shape != ids.shape:
            raise ValueError(f"ids has shape {tuple(ids.shape)} and mask {tuple(mask.shape)}, expected equal [B, S]")
        length = ids.shape[1] if last is None else last
        if not 0 <= length <= ids.shape[1]:
            raise ValueError(f"last must be between 0 and the {ids.shape[1]} columns of ids, got {last}")
        seen = mask.bool()
        kept = seen[:, ids.shape[1] - length :]
        return self._begun(_lists(ids, seen), kept).result()

    def of_completions(self, completions: TokenBatch) -> TeacherOutputs:
        """The outputs [B, T, ...] that predict the tokens of completions; zeros where they are masked."""
        return self.begin(completions).result()

    def begin(self, completions: TokenBatch) -> UnderWay:
        """`of_completions`, under way: what is asked before it is needed is computed meanwhile."""
        prompts = _lists(completions.prompt_ids, completions.prompt_mask)
        tokens = _lists(completions.tokens, completions.mask)
        both = zip(prompts, tokens, strict=True)
        rows = [[*prompt, *completion][: -1 if completion else None] for prompt, completion in both]
        return self._begun(rows, completions.mask.bool())

    def of(self, completions: TokenBatch) -> Teacher:
        """Who answers for some completions: itself, or of several the one whose they are (`routed`)."""
        return self

    def each(self) -> Sequence[Teacher]:
        """Those that answer: itself, or several."""
        return (self,)

    def own_head(self) -> Head:
        """Its head. Raises TypeError where it answers with no hidden states."""
        if self.head is None:
            raise TypeError(f"the teacher {self.about.model} has no head: it answers with {self.about.answers}")
        return self.head

    def vocabulary(self) -> dict[str, int] | None:
        """The numbers of its tokens; None where it knows only their digest."""
        return None

    def close(self) -> None:
        """Ends what it holds open; asked again it may raise."""
        self._threads.cancel()

    @cached_property
    def _threads(self) -> Threads:
        return Threads(self.CONCURRENT, daemon=self.elsewhere)

    def _begun(self, rows: list[list[int]], kept: Tensor) -> UnderWay:
        wanted = kept.sum(1).tolist()
        return UnderWay(self, self.ask(rows, wanted), kept, sum(wanted))

    def _check(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> None:
        if len(rows) != len(wanted):
            raise ValueError(f"{len(rows)} rows and {len(wanted)} numbers of wanted outputs, expected as many")
        most, columns = self.about.positions, self.about.vocab_size
        for row, count in zip(rows, wanted, strict=True):
            if not 0 <= count <= len(row):
                raise ValueError(
                    f"{count} outputs are wanted of a row of {len(row)} tokens; expected no more than it has"
                )
            if most and len(row) > most:
                raise ValueError(f"a row has {len(row)} tokens; {self.about.model} takes {most}")
            if row and not (min(row) >= 0 and max(row) < columns):
                wrong = next(token for token in row if not 0 <= token < columns)
                raise ValueError(f"token {wrong} is none of the {columns} of {self.about.model}")


def about_digest(about: TeacherAbout) -> str:
    """sha256 of all that is said of a teacher."""
    return hashlib.sha256(json.dumps(asdict(about), sort_keys=True).encode()).hexdigest()


def head_digest(head: Head) -> str:
    """sha256 of a head: its weights as they are stored, and what is done with their product."""
    digest = hashlib.sha256(repr((head.softcap, head.scale)).encode())
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _lists(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens [B, S] of each row that a mask shows, brought to the host all at once."""
    return [row[real].tolist() for row, real in zip(tokens.cpu(), mask.bool().cpu(), strict=True)]

"""Several teachers, each of which answers for its own rows: a student of mathematics and of code has one for either.

    teacher = open_teacher("routed:math=served:http://10.0.0.2:8765,code=served:http://10.0.0.3:8765")
    teacher.numbers(["math", "code", "math"])      # 0, 1, 0: the teacher of each row, by what a column says
    teacher.of(completions)                        # the one that answers for completions of one number
    teacher.begin(completions)                     # asks it

Models may differ in width, so a batch is divided by teacher before it is asked (`rows_by_teacher`). The hidden states
of all are as wide as the widest, with zeros behind their own: they lie in one tensor, and `scoring` reads as many as
the teacher's head does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, Protocol

import torch
from torch import Tensor

from cmdp_fast.errors import InputError
from cmdp_fast.heads import Head
from cmdp_fast.reading import TokenBatch

from .open import open_teacher
from .teacher import Asking, Taken, Teacher, TeacherAbout, TeacherOutputs, UnderWay, about_digest

KIND = "routed"


class RoutedBatch(TokenBatch, Protocol):
    """Completions that say whose they are."""

    teacher_index: Tensor | None  # [B] int64: the number of each row's teacher


class RoutedTeacher(Teacher):
    """Teachers by the names under which rows call for them; all answer with hidden states.

    It is no teacher of its own: a question has to be of completions (`RoutedBatch`) of one number. What is said of it
    holds for each of them: the columns that all have, the positions that the shortest has.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        """Raises InputError for fewer than two, and for one without hidden states or that answers for what it has
        stored alone."""
        if len(teachers) < 2:
            raise InputError(f"{KIND}: takes two teachers or more, got {', '.join(teachers) or 'none'}")
        for name, teacher in teachers.items():
            if teacher.about.answers != "hidden":
                raise InputError(
                    f"the teacher {name} answers with {teacher.about.answers}: of several each has to answer with "
                    "hidden states"
                )
            if teacher.completions is not None:
                raise InputError(f"the teacher {name} answers for its stored completions alone: it cannot be routed to")
        self.about = _about({name: teacher.about for name, teacher in teachers.items()})
        self.names = tuple(teachers)
        dtypes = {teacher.about.dtype for teacher in teachers.values()}
        dtype = None if len(dtypes) == 1 else torch.float32
        self.teachers = tuple(_Alike(teacher, self.about.hidden_size, dtype) for teacher in teachers.values())

    @classmethod
    def open(cls, place: str, asking: Asking) -> RoutedTeacher:
        """The teachers of ``NAME=TEACHER,NAME=TEACHER``, each of which is the name of one that is asked."""
        return cls({name: open_teacher(teacher, asking) for name, teacher in places(place).items()})

    def numbers(self, names: Iterable[Any]) -> Tensor:
        """The number [B] of the teacher of each row, by its name. Raises InputError for a name that none has."""
        return torch.tensor([self._number(name) for name in names], dtype=torch.long)

    def _number(self, name: Any) -> int:
        if name not in self.names:
            raise InputError(f"a row calls for the teacher {name!r}; there are {', '.join(self.names)}")
        return self.names.index(name)

    def of(self, completions: Any) -> Teacher:
        index: Tensor | None = getattr(completions, "teacher_index", None)
        if index is None:
            raise ValueError("completions do not say whose they are: expected a teacher_index [B]")
        number = int(index[0])
        if (index != number).any():
            raise ValueError(f"completions of several teachers, {sorted(set(index.tolist()))}: expected those of one")
        return self.teachers[number]

    def begin(self, completions: TokenBatch) -> UnderWay:
        return self.of(completions).begin(completions)

    def answer(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> TeacherOutputs:
        raise TypeError("rows alone do not say whose they are: ask one of the teachers")

    def each(self) -> Sequence[Teacher]:
        return self.teachers

    def own_head(self) -> Head:
        raise TypeError(f"{self.about.model} has no head of its own: each of its teachers has one")

    def to(self, device: torch.device | str) -> RoutedTeacher:
        for each in self.teachers:
            each.to(device)
        return self

    def close(self) -> None:
        for each in self.teachers:
            each.close()

    @property
    def taken(self) -> Taken:  # type: ignore[override]  # which is read alone
        """What all of them have answered."""
        return Taken(*(sum(column) for column in zip(*(each.taken for each in self.teachers), strict=True)))


class _Alike(Teacher):
    """A teacher whose hidden states have zeros behind them, and the dtype of the others'; to float32 they lose
    nothing."""

    def __init__(self, teacher: Teacher, width: int, dtype: torch.dtype | None) -> None:
        self.teacher, self.width, self.dtype = teacher, width, dtype
        self.about, self.head, self.elsewhere = teacher.about, teacher.head, teacher.elsewhere

    def answer(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> TeacherOutputs:
        said = self.teacher.answer(rows, wanted)
        hidden = said.as_hidden().to(self.dtype)
        return replace(said, hidden=torch.nn.functional.pad(hidden, (0, self.width - hidden.shape[-1])))

    def to(self, device: torch.device | str) -> Teacher:
        self.teacher.to(device)
        self.device, self.head = self.teacher.device, self.teacher.head
        return self

    def vocabulary(self) -> dict[str, int] | None:
        return self.teacher.vocabulary()

    def close(self) -> None:
        super().close()
        self.teacher.close()


def places(text: str) -> dict[str, str]:
    """``NAME=TEACHER,NAME=TEACHER`` as a dict. Raises InputError for anything else."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, teacher = part.partition("=")
        if not (name and equals and teacher) or name in found:
            raise InputError(f"{KIND}:{text}: expected NAME=TEACHER,NAME=TEACHER behind {KIND}:, each name once")
        found[name] = teacher
    return found


def rows_by_teacher(rows: Sequence[int], index: Tensor | None) -> list[list[int]]:
    """Some rows of a batch, those of each teacher by themselves; all together where there is one teacher."""
    if index is None:
        return [list(rows)]
    whose = index.tolist()
    return [[row for row in rows if whose[row] == number] for number in sorted({whose[row] for row in rows})]


def _about(each: Mapping[str, TeacherAbout]) -> TeacherAbout:
    """What holds for all of several."""

    def digest(of: Callable[[TeacherAbout], str]) -> str:
        return sha256(repr({name: of(about) for name, about in each.items()}).encode()).hexdigest()

    abouts = list(each.values())
    return TeacherAbout(
        answers="hidden",
        model=f"{KIND}:" + ",".join(f"{name}={about.model}" for name, about in each.items()),
        revision=digest(about_digest),
        dtype=abouts[0].dtype if len({about.dtype for about in abouts}) == 1 else "float32",
        vocab_size=min(about.vocab_size for about in abouts),
        hidden_size=max(about.hidden_size for about in abouts),
        tokenizer=digest(lambda about: about.tokenizer),
        head=digest(lambda about: about.head),
        positions=min((about.positions for about in abouts if about.positions), default=0),
        ends=tuple(sorted({token for about in abouts for token in about.ends})),
    )

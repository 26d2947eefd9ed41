"""The teacher in a folder: a row of tokens is found by its digest, and what was said of it is read from the disk.

The folder is checked once, when it is opened: all of its bytes are read for their sha256. After that a completion's
outputs are read through a map of the file. In memory are 32 bytes per completion, and what the operating system keeps
of the files, which several processes share.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import shlex
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.digest import Damaged
from cmdp_fast.errors import InputError

from ..teacher import Asking, Teacher, TeacherOutputs, TopK
from .format import DTYPES, INDEX, Index, Shard, flaw, read_head, read_index, read_shard, read_vocabulary


class CachedTeacher(Teacher):
    """What a teacher said of stored completions. It answers for their rows alone, and ``completions`` holds them.

    Outputs come in the dtype in which the teacher computed, whatever they were stored in; a row's are the same for
    any question that it is a part of.
    """

    def __init__(self, folder: Path, index: Index, shards: Sequence[Shard]) -> None:
        self.folder, self.about, self.head = folder, index.contents.about, read_head(folder, index)
        self._dtype, self._nothing = DTYPES[self.about.dtype], index.contents.nothing()
        self._vocabulary, self._digest = read_vocabulary(folder, index), index.digest
        self.completions = self._rows = Rows(shards)

    @classmethod
    def open(cls, place: str, asking: Asking) -> CachedTeacher:
        """The teacher in a folder. Raises InputError if the folder is none, is not finished, or is damaged."""
        folder = Path(place)
        try:
            if not (folder / INDEX).is_file():
                raise Damaged(f"there is no {INDEX}; cmdp-fast cache-teacher --output {shlex.quote(place)} makes it")
            index = read_index(folder)
            if not index.whole:
                raise Damaged("it is not finished: start the cmdp-fast cache-teacher again that has begun it")
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as readers:  # each of which computes a sha256
                numbers = range(len(index.shards))
                shards = list(readers.map(lambda number: read_shard(folder, index, number), numbers))
            return cls(folder, index, shards)
        except Damaged as error:
            raise InputError(f"cached:{place}: {error}") from error

    @property
    def digest(self) -> str:
        """sha256 of who answers, and of all that is stored."""
        return self._digest

    def answer(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> TeacherOutputs:
        since = time.perf_counter()
        said = [self._said(row, count) for row, count in zip(rows, wanted, strict=True) if count]
        size = sum(tensor.nbytes for each in said for tensor in each.values())
        together = {name: torch.cat([each[name] for each in said]) for name in said[0]} if said else self._nothing
        outputs = self._outputs(together)
        return TeacherOutputs(**outputs, head=self.head, bytes=size, seconds=time.perf_counter() - since)

    def vocabulary(self) -> dict[str, int]:
        """Its tokens with their numbers."""
        return dict(self._vocabulary)

    def _outputs(self, said: dict[str, Tensor]) -> dict[str, Any]:
        if "hidden" in said:
            return {"hidden": said["hidden"].to(self._dtype)}
        return {"topk": TopK(said["topk_ids"].long(), said["topk_logprobs"], said["floors"])}

    def _said(self, row: Sequence[int], count: int) -> dict[str, Tensor]:
        """The outputs at the last ``count`` tokens of a row."""
        where = self._rows.row(row, count)
        if where is None:
            begin = " ".join(map(str, row[:8]))
            raise InputError(
                f"cached:{self.folder} holds no completion that a row of {len(row)} tokens is of ({begin} …, {count} "
                "outputs): it answers for the completions alone that were stored"
            )
        shard, number = where
        said = {name: tensor[-count:] for name, tensor in shard.said(number).items()}
        if wrong := flaw(said, self.about.vocab_size):
            raise InputError(f"cached:{self.folder}: {shard.path.name}: {wrong}")
        return said


class Rows:
    """The completions of some shards, by their prompts and by the rows that a teacher is asked for.

    Raises Damaged if the outputs of one row stand there twice, and differ.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = [shard for shard in shards if len(shard.lengths)]
        self._ends: list[int] = []  # the number of completions in the shards up to each
        by_row, by_prompt = array("q"), array("q")
        for shard in self._shards:
            content = shard.tokens.numpy().data
            for start, prompt, length in zip(
                *(each.tolist() for each in (shard.starts, shard.prompt_lengths, shard.lengths)), strict=True
            ):
                by_prompt.append(_digest(content[start : start + prompt]))
                by_row.append(_digest(content[start : start + prompt + length - 1]))
            self._ends.append(len(by_row))
        self._by_row, self._by_prompt = _Table(by_row), _Table(by_prompt)
        self._check_repeated()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def of(self, prompt: Sequence[int]) -> list[list[int]]:
        """As `StoredCompletions` says."""
        found = []
        for shard, number in self._candidates(self._by_prompt, prompt):
            start, length = int(shard.starts[number]), int(shard.prompt_lengths[number])
            ids = shard.tokens[start : start + length + int(shard.lengths[number])].tolist()
            if ids[:length] == list(prompt):
                found.append(ids[length:])
        return found

    def row(self, row: Sequence[int], count: int) -> tuple[Shard, int] | None:
        """The shard, and the number in it, of a completion with this row and ``count`` tokens, or with more."""
        longer = None
        for shard, number in self._candidates(self._by_row, row):
            if (length := int(shard.lengths[number])) >= count and self._row_of(shard, number) == list(row):
                if length == count:
                    return shard, number
                longer = longer or (shard, number)
        return longer

    def _candidates(self, table: _Table, ids: Sequence[int]) -> Iterator[tuple[Shard, int]]:
        try:
            digest = _digest(memoryview(array("i", ids)))
        except OverflowError:  # no token
            return
        for entry in table.entries(digest):
            yield self._place(entry)

    def _place(self, entry: int) -> tuple[Shard, int]:
        shard = bisect.bisect_right(self._ends, entry)
        return self._shards[shard], entry - (self._ends[shard - 1] if shard else 0)

    @staticmethod
    def _row_of(shard: Shard, number: int) -> list[int]:
        start = int(shard.starts[number])
        row: list[int] = shard.tokens[
            start : start + int(shard.prompt_lengths[number]) + int(shard.lengths[number]) - 1
        ].tolist()
        return row

    def _check_repeated(self) -> None:
        for one, other in self._by_row.neighbours():
            (a, i), (b, j) = self._place(one), self._place(other)
            same = a.lengths[i] == b.lengths[j] and self._row_of(a, i) == self._row_of(b, j)
            if not same or (a is b and a.places[i] == b.places[j]):
                continue
            ours, theirs = a.said(i), b.said(j)
            if not all(_same_bytes(ours[name], theirs[name]) for name in ours):
                files = a.path.name if a is b else f"{a.path.name} and {b.path.name}"
                raise Damaged(f"{files}: one row stands there twice, with different outputs")


class _Table:
    """Numbers of completions by a digest of tokens: 16 bytes each."""

    def __init__(self, digests: array[int]) -> None:
        values = torch.frombuffer(digests, dtype=torch.int64) if digests else torch.empty(0, dtype=torch.int64)
        self._digests, self._entries = values.sort(stable=True)

    def entries(self, digest: int) -> list[int]:
        """Those of a digest, in order."""
        first, end = (int(torch.searchsorted(self._digests, digest, right=right)) for right in (False, True))
        entries: list[int] = self._entries[first:end].tolist()
        return entries

    def neighbours(self) -> Iterator[tuple[int, int]]:
        """Each two that follow one another and have one digest."""
        for first in (self._digests[1:] == self._digests[:-1]).nonzero()[:, 0].tolist():
            yield int(self._entries[first]), int(self._entries[first + 1])


def _digest(ids: memoryview) -> int:
    """A number that looks random and depends on the tokens alone; rows that share it are told apart by their tokens."""
    return int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little", signed=True)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))

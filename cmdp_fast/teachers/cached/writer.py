"""Fills the folder of a cached teacher, a shard at a time, so that whoever is killed goes on where it stood.

A shard appears whole or not at all, and after it the index that names it. What is not in the index is made again, to
the same bytes if the teacher says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cmdp_fast.digest import Damaged, sha256, write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.files import replacing, sync, writing
from cmdp_fast.heads import Head

from ..teacher import Teacher, TeacherOutputs
from .format import (
    DTYPES,
    HEAD,
    INDEX,
    TENSORS,
    VOCABULARY,
    Contents,
    HeadEntry,
    Index,
    ShardEntry,
    cached_about,
    flaw,
    read_head,
    read_index,
    read_shard,
    read_vocabulary,
    shard_name,
)

Pair = tuple[list[int], list[int]]  # a prompt and one of its completions, token ids

_ROWS = 256  # of logits at once, of which there are as many as the vocabulary has tokens


def contents_of(teacher: Teacher, k: int = 0, dtype: str = "", source: Mapping[str, str] | None = None) -> Contents:
    """What a folder holds that is filled by this teacher: ``k`` log-probabilities per token, 0 for hidden states, as
    ``dtype`` ("": the teacher's own for hidden states, float32 for log-probabilities). ``source`` says what the
    completions come from.

    Raises InputError for what it does not answer with.
    """
    about = teacher.about
    if not k and about.answers != "hidden":
        raise InputError(f"{about.model} answers with {about.answers}: of it log-probabilities can be stored alone")
    if k > about.vocab_size:
        raise InputError(f"{k} log-probabilities per token: {about.model} has {about.vocab_size} tokens")
    dtype = dtype or ("float32" if k else about.dtype)
    if dtype not in DTYPES:
        raise InputError(f"{about.model} computes in {dtype}: name one of {', '.join(DTYPES)} to store")
    return Contents(cached_about(about, k), dtype, k, dict(source or {}))


class CacheWriter:
    """A folder that is being filled; one that was begun with the same contents is gone on with.

    Raises InputError if it was begun with others, holds other files, or is damaged.
    """

    def __init__(self, folder: Path, contents: Contents, teacher: Teacher, shard_bytes: int) -> None:
        self.folder, self.contents, self.teacher, self.shard_bytes = folder, contents, teacher, shard_bytes
        self._waiting = _Waiting()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if (folder / INDEX).exists():
            self.index = self._begun()
        else:
            self.index = self._begin()

    @property
    def prompts(self) -> int:
        """The number of prompts that are stored for good, with all of their completions."""
        return sum(shard.prompts for shard in self.index.shards)

    @property
    def bytes_per_token(self) -> float:
        """Bytes on the disk, without the head, per token of a completion that was read."""
        return sum(s.size for s in self.index.shards) / max(1, sum(s.outputs for s in self.index.shards))

    def store(self, pairs: Sequence[Pair], prompts: int, at_once: int) -> None:
        """Asks the teacher about completions, ``at_once`` in a question, and stores them: all completions of so many
        ``prompts``. They may wait for others that make a shard."""
        numbers: dict[tuple[tuple[int, ...], int], int] = {}  # of each row that is asked for
        mine = [numbers.setdefault(_question(pair), len(numbers)) for pair in pairs]
        questions = list(numbers)
        parts = [questions[i : i + at_once] for i in range(0, len(questions), at_once)]
        asked = [self.teacher.ask([row for row, _ in part], [count for _, count in part]) for part in parts]
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.contents.outputs()}
        for each in asked:
            for name, tensor in self._kept(each.result()).items():
                outputs[name].append(tensor)
        firsts, end = [], 0
        for _, count in questions:
            firsts.append(end)
            end += count
        if any(sum(map(len, tensors)) != end for tensors in outputs.values()):
            raise InputError(f"{self.teacher.about.model} has answered with another number of outputs than {end}")
        self._waiting.add(pairs, [firsts[number] for number in mine], prompts, outputs, end)
        if self._waiting.bytes >= self.shard_bytes:
            self._write_shard()

    def write_waiting(self) -> None:
        """Writes what waits as a shard, which may be smaller than others."""
        if self._waiting.pairs:
            self._write_shard()

    def finish(self) -> None:
        """Writes what waits, and an index that says that this is all."""
        self.write_waiting()
        index = replace(self.index, whole=True)
        self._write_index(index)
        self.index = index

    def _kept(self, said: TeacherOutputs) -> dict[str, Tensor]:
        """What is kept of an answer."""
        dtype = DTYPES[self.contents.dtype]
        if not self.contents.k:
            kept = {"hidden": said.as_hidden().detach().to("cpu", dtype)}
        else:
            ids, logprobs, floors = _topk(said, self.contents.k)
            kept = {"topk_ids": ids.to("cpu", torch.int32), "topk_logprobs": logprobs.to("cpu", dtype)}
            kept["floors"] = floors.to("cpu", dtype)
        if wrong := flaw(kept, self.contents.about.vocab_size):
            raise InputError(f"{self.contents.about.model}, as {self.contents.dtype}: {wrong}")
        return kept

    # ------------------------------------------------------------------------------------- files

    def _begin(self) -> Index:
        """Everything but shards; the index last."""
        known = (HEAD, VOCABULARY)  # another may have been killed before its index
        others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
        if others := [name for name in others if name not in known]:
            raise InputError(f"{self.folder} holds something else ({min(others)}): expected an empty folder, or none")
        if (vocabulary := self.teacher.vocabulary()) is None:
            raise InputError(
                f"{self.teacher.about.model} does not say its vocabulary, which a cache has beside its answers"
            )
        numbered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))  # a tokenizer lists them in any order
        write_sealed(self.folder / VOCABULARY, {"tokens": numbered})
        index = Index(self.contents, None if self.contents.k else self._write_head(self.teacher.own_head()))
        write_sealed(self.folder / INDEX, index.as_json())
        sync(self.folder)
        return index

    def _begun(self) -> Index:
        try:
            index = read_index(self.folder)
            if difference := index.contents.differing(self.contents):
                raise InputError(f"{self.folder} holds other answers ({difference}): choose another folder")
            read_head(self.folder, index)
            read_vocabulary(self.folder, index)
            for number in range(len(index.shards)):
                read_shard(self.folder, index, number)
        except Damaged as error:
            raise InputError(f"{self.folder}: {error}; remove the folder to begin again") from error
        return index

    def _write_head(self, head: Head) -> HeadEntry:
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        self._write_tensors(self.folder / HEAD, {name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        return HeadEntry(sha256(self.folder / HEAD), float(head.scale), float(head.softcap or 0.0))

    def _write_shard(self) -> None:
        number, waiting = len(self.index.shards), self._waiting
        path = self.folder / shard_name(number)
        self._write_tensors(path, waiting.tensors())
        counts = (waiting.prompts, len(waiting.pairs), waiting.outputs)
        entry = ShardEntry(sha256(path), path.stat().st_size, *counts)
        index = replace(self.index, shards=(*self.index.shards, entry))
        self._write_index(index)
        self.index, self._waiting = index, _Waiting()  # after an interrupt before this the same shard is written again

    def _write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with replacing(path) as part:
            save_file(tensors, part, metadata={"cache": self.contents.digest})
        sync(self.folder)

    def _write_index(self, index: Index) -> None:
        write_sealed(self.folder / INDEX, index.as_json())
        sync(self.folder)


class _Waiting:
    """Completions for the next shard, and the outputs at their tokens."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.places: list[int] = []
        self.prompts = self.outputs = self.bytes = 0
        self.said: dict[str, list[Tensor]] = {}

    def add(
        self, pairs: Sequence[Pair], firsts: Sequence[int], prompts: int, said: dict[str, list[Tensor]], outputs: int
    ) -> None:
        """Takes completions, whose outputs begin at ``firsts`` among these."""
        self.pairs += pairs
        self.places += [self.outputs + first for first in firsts]
        self.prompts += prompts
        self.outputs += outputs
        for name, tensors in said.items():
            self.said.setdefault(name, []).extend(tensors)
            self.bytes += sum(tensor.nbytes for tensor in tensors)

    def tensors(self) -> dict[str, Tensor]:
        """As a shard has them."""
        values = {
            "tokens": [token for prompt, completion in self.pairs for token in (*prompt, *completion)],
            "prompt_lengths": [len(prompt) for prompt, _ in self.pairs],
            "lengths": [len(completion) for _, completion in self.pairs],
            "places": self.places,
        }
        tensors = {name: torch.tensor(values[name], dtype=dtype) for name, dtype in TENSORS.items()}
        return tensors | {name: torch.cat(parts) for name, parts in self.said.items()}


def _question(pair: Pair) -> tuple[tuple[int, ...], int]:
    """The row that a teacher is asked for, and how many outputs are wanted of it."""
    prompt, completion = pair
    return (*prompt, *completion[:-1]), len(completion)


def _topk(said: TeacherOutputs, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token ids [N, k], their log-probabilities, the least likely token's [N]), most likely first, in float32."""
    if said.topk is not None:
        known = said.topk
        if known.logprobs.shape[-1] < k or known.floor is None:
            raise InputError(
                f"the teacher says {known.logprobs.shape[-1]} log-probabilities per token and "
                f"{'no' if known.floor is None else 'a'} floor; expected at least {k}, and a floor"
            )
        logprobs, order = known.logprobs.float().topk(k)
        return known.ids.gather(-1, order), logprobs.clamp(max=0), known.floor.float().clamp(max=0)
    outputs = said.as_hidden() if said.logits is None else said.logits
    parts = []
    for rows in outputs.split(_ROWS):
        some = replace(said, hidden=rows) if said.logits is None else replace(said, logits=rows)
        # in double: one of float32 adds up in sequence, and is off by more than `topk_bounds` takes from its dtype
        every = torch.log_softmax(some.as_logits().double(), -1).float()
        logprobs, ids = every.topk(k)
        parts.append((ids, logprobs, every.amin(-1)))
    ids, logprobs, floors = (torch.cat(each) for each in zip(*parts, strict=True))
    return ids, logprobs.clamp(max=0), floors.clamp(max=0)  # rounding may lift one above 0

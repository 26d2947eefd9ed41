"""What the folder of a cached teacher holds, and how it is checked: everything in it may be somebody else's.

| file | contents |
| --- | --- |
| `cache.json` | whose answers these are, what the completions come from, each shard's size and sha256; sealed |
| `vocabulary.json` | the number of each token; sealed |
| `head.safetensors` | the head's `weight` [V, H] and `bias` [V], beside hidden states |
| `shard-00000.safetensors`, … | completions with their prompts, and the outputs at their tokens |

The index gives numbers and no names: a file's name follows from its place. A shard of C completions with S tokens, and
N outputs, is these tensors:

| tensor | shape, dtype | contents |
| --- | --- | --- |
| `tokens` | [S] int32 | prompt and completion, one completion behind another |
| `prompt_lengths`, `lengths` | [C] int32 | of prompts, and of completions |
| `places` | [C] int64 | a completion's first output; the next ones follow |
| `hidden` | [N, H] | or the next three |
| `topk_ids`, `topk_logprobs`, `floors` | [N, k] int32, [N, k], [N] | see `TopK` |

An output predicts a token. So the row that a teacher is asked for is a prompt and all but the last token of its
completion, and as many outputs are wanted as the completion has tokens. Completions of one prompt that differ in their
last token alone have the same outputs, and share them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from cmdp_fast.digest import Damaged, read_sealed, sha256
from cmdp_fast.errors import first_line, readable
from cmdp_fast.heads import Head
from cmdp_fast.vocabulary import vocabulary_digest

from ..about import DTYPES as NAMES
from ..about import LONGEST, about_of
from ..teacher import TeacherAbout, head_digest

VERSION = 1
INDEX, VOCABULARY, HEAD = "cache.json", "vocabulary.json", "head.safetensors"
DTYPES = {name: getattr(torch, name) for name in NAMES}

TENSORS = {"tokens": torch.int32, "prompt_lengths": torch.int32, "lengths": torch.int32, "places": torch.int64}


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.safetensors"


# --------------------------------------------------------------------------------------------------------------
# The index


@dataclass(frozen=True)
class Contents:
    """Whose answers a folder holds, in what form, and what the completions come from: the same for all of its life."""

    about: TeacherAbout  # as the folder answers
    dtype: str  # of the stored numbers
    k: int  # log-probabilities per token; 0: hidden states
    source: Mapping[str, str]  # settings of the sampling, digests of the data

    @property
    def digest(self) -> str:
        """sha256 of all of it, which every shard says it belongs to."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def differing(self, other: Contents) -> str:
        """The name of the first thing in which two differ, with both values; empty if they agree."""
        ours, theirs = ({**d.pop("about"), **d.pop("source"), **d} for d in (asdict(self), asdict(other)))
        for name in [*ours, *theirs]:
            if (one := ours.get(name)) != (two := theirs.get(name)):
                return f"{readable(name, 60)}: {readable(str(one), 60)}, and not {readable(str(two), 60)}"
        return ""

    def outputs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Of each tensor of outputs its shape [N, …] without N, and its dtype."""
        dtype = DTYPES[self.dtype]
        if not self.k:
            return {"hidden": ((self.about.hidden_size,), dtype)}
        return {"topk_ids": ((self.k,), torch.int32), "topk_logprobs": ((self.k,), dtype), "floors": ((), dtype)}

    def nothing(self) -> dict[str, Tensor]:
        """The outputs at no tokens."""
        return {name: torch.empty(0, *shape, dtype=dtype) for name, (shape, dtype) in self.outputs().items()}


class ShardEntry(NamedTuple):
    """What the index says of a shard."""

    sha256: str
    size: int  # bytes
    prompts: int
    completions: int
    outputs: int


class HeadEntry(NamedTuple):
    """What the index says of the head's file, and of what is done with the head's product."""

    sha256: str
    scale: float
    softcap: float  # 0: none


@dataclass(frozen=True)
class Index:
    """The contents of `cache.json`."""

    contents: Contents
    head: HeadEntry | None = None
    shards: tuple[ShardEntry, ...] = ()
    whole: bool = False  # whether all completions are there

    @property
    def digest(self) -> str:
        """sha256 of who answers, and of what is in the shards."""
        return hashlib.sha256(" ".join([self.contents.digest, *(s.sha256 for s in self.shards)]).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "version": VERSION,
            "whole": self.whole,
            "contents": asdict(self.contents),
            "head": self.head and self.head._asdict(),
            "shards": [shard._asdict() for shard in self.shards],
        }


def read_index(folder: Path) -> Index:
    """Raises Damaged, which names the file, for anything but an index of this version."""
    value = read_sealed(folder / INDEX)
    try:
        version = value.pop("version", None)
        if version != VERSION:
            raise Damaged(f"its version is {readable(str(version), 20)}, expected {VERSION}")
        _check_fields(value, {"whole": bool, "contents": dict, "head": object, "shards": list}, "it")
        contents = _contents(value["contents"])
        shards = tuple(_shard_entry(each) for each in value["shards"])
        head = None
        if value["head"] is not None:
            head = HeadEntry(**_check_fields(value["head"], get_type_hints(HeadEntry), "its head"))
            if not (math.isfinite(head.scale) and head.scale and 0 <= head.softcap < math.inf):
                raise Damaged("the scale or the softcap of its head is none")
        if (head is None) != (contents.about.answers == "topk"):
            raise Damaged("it has a head beside top-k log-probabilities, or none beside hidden states")
    except Damaged as error:
        raise Damaged(f"{INDEX}: {error}") from error
    return Index(contents, head, shards, value["whole"])


def _contents(value: dict[str, Any]) -> Contents:
    _check_fields(value, {"about": dict, "dtype": str, "k": int, "source": dict}, "contents")
    try:
        about = about_of(value["about"])
    except ValueError as error:
        raise Damaged(str(error)) from error
    if value["dtype"] not in DTYPES:
        raise Damaged(f"its dtype is none of {', '.join(DTYPES)}")
    if about.answers != ("topk" if value["k"] else "hidden") or not 0 <= value["k"] <= about.vocab_size:
        raise Damaged("it answers with something else than hidden states, or than k of the teacher's log-probabilities")
    if not all(type(text) is str and len(text) <= LONGEST for text in value["source"].values()):
        raise Damaged("what its completions come from is no table of texts")
    return Contents(about, value["dtype"], value["k"], value["source"])


def _shard_entry(value: Any) -> ShardEntry:
    entry = ShardEntry(**_check_fields(value, get_type_hints(ShardEntry), "a shard"))
    if min(entry[1:]) < 0:
        raise Damaged("a shard has a negative size")
    return entry


def _check_fields(value: Any, kinds: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A table out of JSON with exactly these fields, each of its kind. Raises Damaged for any other."""
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise Damaged(f"{what} has other fields than {', '.join(kinds)}")
    for name, kind in kinds.items():
        if kind is not object and type(value[name]) is not kind:
            raise Damaged(f"{what}: {name} is no {kind.__name__}")
    return value


# --------------------------------------------------------------------------------------------------------------
# The files


def read_tensors(path: Path, digest: str, belongs_to: str) -> dict[str, Tensor]:
    """The tensors of a file with this sha256, in memory that maps it: what is not looked at is not read.

    Raises Damaged, which names the file, if it is not there, is another, or belongs to another cache.
    """
    from safetensors import safe_open

    try:
        if not path.is_file():  # a pipe or a device would have no end
            raise FileNotFoundError
        present = sha256(path)
        if present != digest:
            raise Damaged(
                f"it is not as it was written (its sha256 begins {present[:12]}, not {readable(digest[:12])})"
            )
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}) != {"cache": belongs_to}:
                raise Damaged("it belongs to another cache")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except Damaged as error:
        raise Damaged(f"{path.name}: {error}") from error
    except FileNotFoundError as error:
        raise Damaged(f"{path.name} is not there") from error
    except Exception as error:  # of a library that reads anybody's file, in whatever form
        raise Damaged(f"{path.name} cannot be read: {readable(first_line(error))}") from error


def read_head(folder: Path, index: Index) -> Head | None:
    """The head, None where there is none. Raises Damaged for another than the teacher's."""
    if index.head is None:
        return None
    about = index.contents.about
    tensors = read_tensors(folder / HEAD, index.head.sha256, index.contents.digest)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    shape = (about.vocab_size, about.hidden_size)
    if tensors.keys() - {"weight", "bias"} or weight is None or weight.shape != shape or not weight.is_floating_point():
        raise Damaged(f"{HEAD}: expected the weight of a head, {list(shape)}, and its bias")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise Damaged(f"{HEAD}: the bias does not fit the weight")
    head = Head(weight, bias, index.head.softcap or None, index.head.scale)
    if head_digest(head) != about.head:
        raise Damaged(f"{HEAD}: it is not the head of {about.model}")
    return head


def read_vocabulary(folder: Path, index: Index) -> dict[str, int]:
    """The numbers of the teacher's tokens. Raises Damaged for another teacher's, or none."""
    if not (folder / VOCABULARY).is_file():
        raise Damaged(f"{VOCABULARY} is not there")
    tokens = read_sealed(folder / VOCABULARY).get("tokens")
    if not isinstance(tokens, dict) or not all(type(number) is int and number >= 0 for number in tokens.values()):
        raise Damaged(f"{VOCABULARY}: it is no table of tokens and numbers")
    if vocabulary_digest(SimpleNamespace(get_vocab=lambda: tokens)) != index.contents.about.tokenizer:
        raise Damaged(f"{VOCABULARY}: it is not the vocabulary of {index.contents.about.model}")
    return tokens


@dataclass(frozen=True)
class Shard:
    """The completions of a file, checked, and outputs that are read as they are asked for."""

    path: Path
    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    places: Tensor
    starts: Tensor  # [C], where the tokens of a completion's prompt begin
    outputs: dict[str, Tensor]

    def said(self, number: int) -> dict[str, Tensor]:
        """The outputs at the tokens of a completion."""
        first, count = int(self.places[number]), int(self.lengths[number])
        return {name: tensor[first : first + count] for name, tensor in self.outputs.items()}


def read_shard(folder: Path, index: Index, number: int) -> Shard:
    """Raises Damaged, which names the file, unless it is what the index says."""
    entry, path = index.shards[number], folder / shard_name(number)
    try:
        if path.is_file() and (size := path.stat().st_size) != entry.size:
            raise Damaged(f"it has {size} bytes, expected {entry.size}")
    except Damaged as error:
        raise Damaged(f"{path.name}: {error}") from error
    tensors = read_tensors(path, entry.sha256, index.contents.digest)
    try:
        return _checked_shard(path, tensors, index.contents, entry)
    except Damaged as error:
        raise Damaged(f"{path.name}: {error}") from error


def _checked_shard(path: Path, tensors: dict[str, Tensor], contents: Contents, entry: ShardEntry) -> Shard:
    counts = {name: (entry.completions,) for name in TENSORS} | {"tokens": (-1,)}
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {n: (counts[n], d) for n, d in TENSORS.items()}
    expected |= {name: ((entry.outputs, *shape), dtype) for name, (shape, dtype) in contents.outputs().items()}
    if tensors.keys() != expected.keys():
        raise Damaged(f"it has other tensors than {', '.join(expected)}")
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        fits = tensor.dim() == 1 if shape == (-1,) else tensor.shape == shape
        if tensor.dtype != dtype or not fits:
            raise Damaged(f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}")
    tokens, prompts, lengths, places = (tensors[name] for name in TENSORS)
    rows, about = prompts.long() + lengths, contents.about
    if len(rows) and (int(prompts.min()) < 1 or int(lengths.min()) < 1 or int(rows.max()) < 2):
        raise Damaged("a prompt or a completion has no tokens")
    if int(rows.sum()) != len(tokens):
        raise Damaged(f"its completions have {int(rows.sum())} tokens, and it has {len(tokens)}")
    if len(places) and (int(places.min()) < 0 or bool((places > entry.outputs - lengths).any())):
        raise Damaged("the outputs of a completion are not there")
    if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < about.vocab_size):
        raise Damaged(f"a token is none of the {about.vocab_size} of {about.model}")
    if about.positions and len(rows) and int(rows.max()) - 1 > about.positions:
        raise Damaged(f"a row has more tokens than the {about.positions} positions of {about.model}")
    return Shard(
        *(path, tokens, prompts, lengths, places, rows.cumsum(0) - rows),
        {name: tensors[name] for name in contents.outputs()},
    )


def flaw(said: Mapping[str, Tensor], vocab_size: int) -> str:
    """What is wrong with some outputs; empty if nothing is. A log-probability may be that of an excluded token."""
    for name, tensor in said.items():
        if name == "hidden" and not bool(tensor.isfinite().all()):
            return "its hidden states are not all finite"
        if name in ("topk_logprobs", "floors") and not bool((tensor <= 0).all()):
            return f"its {name} are not all log-probabilities"
        if name == "topk_ids" and tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < vocab_size):
            return f"its {name} are not all tokens"
        if name == "topk_ids" and bool((tensor.sort(-1).values.diff(dim=-1) == 0).any()):
            return f"its {name} name a token twice"
    return ""


def cached_about(about: TeacherAbout, k: int) -> TeacherAbout:
    """Who answers, as a cache of hidden states or of k log-probabilities says it."""
    about = replace(about, model=readable(about.model, LONGEST - 3))  # or it would not be read again
    return replace(about, answers="topk", head="", hidden_size=0) if k else about

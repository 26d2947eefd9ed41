"""Tensors as bytes in the format of safetensors, read without a copy and without trust.

A length of 8 bytes, a JSON header of names, dtypes, shapes and places, and the numbers. The library of that name reads
the bytes too. It copies each tensor out of them, and gives back no words that were written beside the tensors; a head
has gigabytes, and the words say which question an answer is for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

HEADER = 1 << 16  # bytes of a header at most
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Malformed(ValueError):
    """Bytes that are not what was expected of them. The message is one line, and quotes nothing of them raw."""


def written(tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> list[memoryview]:
    """The pieces of a message, one behind another: the header, and each tensor's bytes, which are not copied where they
    lie together on the CPU."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each begins at its own size
    header: dict[str, Any] = {"__metadata__": dict(words)}
    pieces, end = [], 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        if tensor.nbytes:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            pieces.append(memoryview(flat.numpy().data))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *pieces]


def read(content: bytearray, expected: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, which share the memory of ``content``, and the words beside them. ``expected``: the tensors' names,
    and the dtypes that each may have. Raises Malformed for anything else."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 0 < length <= min(HEADER, len(content) - 8):
        raise Malformed(f"the length of its header is {length}, of {len(content)} bytes in all")
    header = read_json(content[8 : 8 + length])
    words = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(words, dict) or not all(isinstance(word, str) for word in words.values()):
        raise Malformed("its header is no table of tensors and words")
    if header.keys() != expected.keys():
        raise Malformed(f"it has {len(header)} tensors, expected {', '.join(sorted(expected))}")
    first, end = 8 + length, 0
    tensors = {}
    for name, about in sorted(header.items(), key=lambda item: _places(item[1])):
        begin, end_of_this = _places(about)
        shape, dtype = about["shape"], about["dtype"]
        if dtype not in expected[name]:
            raise Malformed(f"{name} has another dtype than {' or '.join(expected[name])}")
        size = DTYPES[dtype].itemsize
        if not (isinstance(shape, list) and len(shape) <= 2 and all(_is_count(each) for each in shape)):
            raise Malformed(f"the shape of {name} is none")
        if begin != end or end_of_this - begin != (count := math.prod(shape)) * size or (first + begin) % size:
            raise Malformed(f"{name} does not lie where its shape and the tensors before it put it")
        end = end_of_this
        if first + end > len(content):
            raise Malformed(f"{name} ends behind the last byte")
        if count:
            flat = torch.frombuffer(content, dtype=DTYPES[dtype], count=count, offset=first + begin)
        else:  # of which it makes no tensor
            flat = torch.empty(0, dtype=DTYPES[dtype])
        tensors[name] = flat.view(shape)
    if first + end != len(content):
        raise Malformed(f"{len(content) - first - end} bytes are behind its last tensor")
    return tensors, words


def read_json(content: bytes | bytearray) -> Any:
    """JSON of numbers, texts, lists and tables, in which no name stands twice. Raises Malformed for anything else."""
    try:
        return json.loads(bytes(content).decode(), parse_constant=_refuse, object_pairs_hook=_table)
    except (ValueError, RecursionError) as error:
        raise Malformed("it is not JSON in UTF-8") from error


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _places(about: Any) -> tuple[int, int]:
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise Malformed("its header describes a tensor otherwise than by dtype, shape and data_offsets")
    places = about["data_offsets"]
    if not (isinstance(places, list) and len(places) == 2 and all(_is_count(each) for each in places)):
        raise Malformed("its header has data_offsets that are none")
    return places[0], places[1]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62

"""What a trainer and a teacher's server say to each other: written and read here, for both sides.

| request | answer |
| --- | --- |
| `GET /about` | JSON: `TeacherAbout`, and the version of this protocol |
| `GET /head` | tensors: the head's weight and bias; its softcap and scale are words beside them |
| `GET /vocabulary` | JSON: the number of each token |
| `POST /ask` | tensors: token ids of some rows -> the hidden states of the last tokens of each |

Tensors are bytes of safetensors (`tensors.py`). A question has a number of its own and says which teacher it is for.
The answer repeats both: that of another question, or of another model behind the same address, is known by them.
An error is one line of text with a status of 400 and above.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmdp_fast.errors import readable
from cmdp_fast.heads import Head

from ..about import about_of
from ..teacher import TeacherAbout
from .tensors import DTYPES, HEADER, NAMES, Malformed, read, read_json, written

VERSION = 1
TOKENS = 1 << 22  # of a question at most
ROWS = 1 << 16  # the same: a row without tokens costs memory, too
WIRES = ("", "bfloat16", "float32", "int8")  # dtypes of hidden states on their way; "": as the model has them
FLOATS = ("F32", "BF16", "F16", "F64")


class Question(NamedTuple):
    """Rows of token ids, and of how many of the last tokens of each the hidden states are wanted."""

    number: str  # 32 hexadecimal digits
    teacher: str  # `about_digest` of who is asked
    wire: str
    rows: list[list[int]]
    wanted: list[int]


# --------------------------------------------------------------------------------------------------------------
# Who answers


def about_bytes(about: TeacherAbout) -> bytes:
    """A teacher as JSON."""
    return json.dumps({"protocol": VERSION, "about": dataclasses.asdict(about)}).encode()


def read_about(content: bytearray) -> TeacherAbout:
    """Raises Malformed for anything but a teacher that answers with hidden states, in this version of the protocol."""
    value = read_json(content)
    if not isinstance(value, dict) or not isinstance(said := value.get("about"), dict):
        raise Malformed("it does not say who it is; expected a server of cmdp-fast teacher")
    if value.get("protocol") != VERSION:
        raise Malformed(f"it speaks version {readable(str(value.get('protocol')), 20)} of the protocol, not {VERSION}")
    try:
        about = about_of(said)
    except ValueError as error:
        raise Malformed(str(error)) from error
    if about.answers != "hidden":
        raise Malformed("it answers with something else than hidden states")
    return about


# --------------------------------------------------------------------------------------------------------------
# Its head


def head_bytes(head: Head) -> list[memoryview]:
    """A head in pieces, of which the weight shares the memory of a model on the CPU."""
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    return written(tensors, {"scale": repr(head.scale), "softcap": "" if head.softcap is None else repr(head.softcap)})


def head_size(about: TeacherAbout) -> int:
    """Bytes that a teacher's head has at most."""
    return (8 + HEADER) + about.vocab_size * (about.hidden_size + 1) * 8


def read_head(content: bytearray, about: TeacherAbout) -> Head:
    """A head that shares the memory of ``content``. Raises Malformed for one that does not fit its teacher."""
    try:
        tensors, words = read(content, {"weight": FLOATS})
    except Malformed:
        tensors, words = read(content, {"weight": FLOATS, "bias": FLOATS})
    weight, bias = tensors["weight"], tensors.get("bias")
    if weight.shape != (about.vocab_size, about.hidden_size) or (bias is not None and bias.shape != weight.shape[:1]):
        raise Malformed(f"its head is {list(weight.shape)}, expected {[about.vocab_size, about.hidden_size]}")
    try:
        scale, softcap = float(words["scale"]), float(words["softcap"]) if words["softcap"] else None
    except (KeyError, ValueError) as error:
        raise Malformed("its head comes without scale and softcap") from error
    if not (math.isfinite(scale) and scale and (softcap is None or 0 < softcap < math.inf)):
        raise Malformed("the scale or the softcap of its head is none")
    return Head(weight, bias, softcap, scale)


# --------------------------------------------------------------------------------------------------------------
# Its vocabulary


def vocabulary_bytes(vocabulary: dict[str, int]) -> bytes:
    """Tokens with their numbers as JSON, in ASCII: a token may be half of a character."""
    return json.dumps(vocabulary).encode()


def read_vocabulary(content: bytearray) -> dict[str, int]:
    """Raises Malformed for anything but tokens with numbers."""
    value = read_json(content)
    if not isinstance(value, dict) or not all(type(number) is int and number >= 0 for number in value.values()):
        raise Malformed("its vocabulary is no table of tokens and numbers")
    return value


# --------------------------------------------------------------------------------------------------------------
# Questions


def question_bytes(question: Question) -> bytes:
    """A question as it is sent."""
    flat = [token for row in question.rows for token in row]
    tensors = {
        "tokens": torch.tensor(flat, dtype=torch.int32),
        "lengths": torch.tensor([len(row) for row in question.rows], dtype=torch.int32),
        "wanted": torch.tensor(list(question.wanted), dtype=torch.int32),
    }
    words = {"question": question.number, "teacher": question.teacher, "wire": question.wire}
    return b"".join(written(tensors, words))


def read_question(content: bytearray, about: TeacherAbout) -> Question:
    """Raises Malformed for one that this teacher cannot answer."""
    tensors, words = read(content, dict.fromkeys(("tokens", "lengths", "wanted"), ("I32",)))
    if words.keys() != {"question", "teacher", "wire"} or not _is_number(words["question"]):
        raise Malformed("a question says its number, the teacher and the wire")
    if words["wire"] not in WIRES:
        raise Malformed(f"the wire is none of {', '.join(filter(None, WIRES))}")
    tokens, lengths, wanted = (tensors[name].long() for name in ("tokens", "lengths", "wanted"))
    if not tokens.dim() == lengths.dim() == wanted.dim() == 1 or lengths.shape != wanted.shape:
        raise Malformed("tokens, lengths and wanted are lists, the last two of one length")
    if len(lengths) > ROWS:
        raise Malformed(f"it has {len(lengths)} rows, expected {ROWS} at most")
    if len(lengths) and not (int(lengths.min()) >= 0 and bool(((wanted >= 0) & (wanted <= lengths)).all())):
        raise Malformed("a row has a negative length, or more outputs are wanted of it than it has tokens")
    if int(lengths.sum()) != len(tokens):
        raise Malformed(f"the rows have {int(lengths.sum())} tokens, and {len(tokens)} came")
    if about.positions and len(lengths) and int(lengths.max()) > about.positions:
        raise Malformed(f"a row has {int(lengths.max())} tokens; {about.model} takes {about.positions}")
    if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < about.vocab_size):
        raise Malformed(f"a token is none of the {about.vocab_size} of {about.model}")
    rows = [row.tolist() for row in tokens.split(lengths.tolist())]
    return Question(words["question"], words["teacher"], words["wire"], rows, wanted.tolist())


def question_size(tokens: int = TOKENS, rows: int = ROWS) -> int:
    """Bytes that a question of so many tokens and rows has at most."""
    return 8 + HEADER + 4 * tokens + 8 * rows


def _is_number(text: str) -> bool:
    return len(text) == 32 and not set(text) - set("0123456789abcdef")


# --------------------------------------------------------------------------------------------------------------
# Answers


def answer_bytes(question: Question, hidden: Tensor) -> list[memoryview]:
    """Hidden states [N, H] as the wire of a question wants them, in pieces."""
    words = {"question": question.number, "teacher": question.teacher, "dtype": NAMES[hidden.dtype]}
    if question.wire == "int8":
        return written(dict(zip(("hidden", "scale"), as_int8(hidden), strict=True)), words)
    sent = hidden.to(getattr(torch, question.wire)) if question.wire else hidden
    return written({"hidden": sent}, words)


def answer_size(about: TeacherAbout, outputs: int) -> int:
    """Bytes that an answer with so many hidden states has at most."""
    return 8 + HEADER + outputs * (about.hidden_size * 8 + 4)


def read_answer(content: bytearray, question: Question, about: TeacherAbout) -> Tensor:
    """The hidden states [N, H], N the outputs that were wanted, in the model's own dtype. Raises Malformed for another
    question's, another teacher's, another shape, and for numbers that are not finite."""
    names = {"int8": ("I8",), "": FLOATS} | {wire: (NAMES[getattr(torch, wire)],) for wire in WIRES[1:3]}
    expected: dict[str, tuple[str, ...]] = {"hidden": names[question.wire]}
    expected |= {"scale": ("F32",)} if question.wire == "int8" else {}
    tensors, words = read(content, expected)
    if words.get("question") != question.number:
        raise Malformed("it is the answer to another question")
    if words.get("teacher") != question.teacher:
        raise Malformed("another model has made it than the one that was there at first")
    if words.get("dtype") not in FLOATS:
        raise Malformed("it does not say the model's dtype")
    hidden, outputs = tensors["hidden"], sum(question.wanted)
    if hidden.shape != (outputs, about.hidden_size) or tensors.get("scale", hidden[:, 0]).shape != hidden.shape[:1]:
        raise Malformed(f"its hidden states are {list(hidden.shape)}, expected {[outputs, about.hidden_size]}")
    if question.wire == "int8":
        hidden = of_int8(hidden, tensors["scale"])
    hidden = hidden.to(DTYPES[words["dtype"]])  # which may have no room for a number
    if not bool(hidden.isfinite().all()):
        raise Malformed("its hidden states are not all finite")
    return hidden


def as_int8(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] as numbers from -127 to 127 and a factor for each row, float32 [N]."""
    wide = hidden.float()
    scale = wide.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def of_int8(numbers: Tensor, scale: Tensor) -> Tensor:
    """The hidden states again, float32, each off by half of its row's factor at most."""
    return numbers.float() * scale[:, None]


def one_line(error: Any) -> bytes:
    """An error as it is sent."""
    return f"{readable(str(error))}\n".encode()

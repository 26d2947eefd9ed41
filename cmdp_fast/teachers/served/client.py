"""The side of the trainer: `ServedTeacher`, asked like any other teacher."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from cmdp_fast.errors import InputError
from cmdp_fast.heads import Head
from cmdp_fast.http_client import HttpClient

from ..teacher import Asking, Teacher, TeacherOutputs, about_digest, head_digest
from . import protocol
from .tensors import Malformed

VOCABULARY = 1 << 26  # bytes of a vocabulary; one of 256k tokens has 6 MB
TOKEN = 4096  # bytes of a token

T = TypeVar("T")


class ServedTeacher(Teacher):
    """A teacher that `cmdp-fast teacher` serves at ``place``: `http://host:port`, `https://…` or `unix:/path`.

    Who it is and its head are asked for at once, and the head is held against its digest. Every answer is held against
    its question and against that teacher: a server that has been started again with another model is refused.
    """

    elsewhere = True

    def __init__(self, place: str, asking: Asking) -> None:
        _check_place(place)
        token = read_token(asking.token_file) if asking.token_file else ""
        self._http = HttpClient(place, asking.seconds, f"the teacher at {place}", "--teacher-timeout", token)
        self._asking = asking
        self.about = self._understood("/about", self._http.ask("GET", "about", longest=1 << 20), protocol.read_about)
        self._digest = about_digest(self.about)
        self.head = self._own_head()

    @classmethod
    def open(cls, place: str, asking: Asking) -> ServedTeacher:
        """Raises InputError if no teacher is there, or if it is none of ours."""
        return cls(place, asking)

    def answer(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> TeacherOutputs:
        since = time.perf_counter()
        question = protocol.Question(
            *(secrets.token_hex(16), self._digest, self._asking.dtype), [list(row) for row in rows], list(wanted)
        )
        if sum(map(len, rows)) > protocol.TOKENS:
            raise InputError(f"{self._http.name} takes {protocol.TOKENS} tokens at once: ask for fewer rows")
        if len(rows) > protocol.ROWS:
            raise InputError(f"{self._http.name} takes {protocol.ROWS} rows at once, got {len(rows)}")
        longest = protocol.answer_size(self.about, sum(wanted))
        content = self._http.ask("POST", "ask", protocol.question_bytes(question), longest)
        hidden = self._understood("/ask", content, lambda content: protocol.read_answer(content, question, self.about))
        return TeacherOutputs(
            hidden=hidden,
            head=self.head,
            bytes=len(content),
            seconds=time.perf_counter() - since,
        )

    def vocabulary(self) -> dict[str, int]:
        """Its tokens with their numbers, asked for anew."""
        content = self._http.ask("GET", "vocabulary", longest=VOCABULARY)
        return self._understood("/vocabulary", content, protocol.read_vocabulary)

    def close(self) -> None:
        """Ends its connections."""
        super().close()
        self._http.close()

    def _own_head(self) -> Head:
        """The head; its bytes are held once."""
        content = self._http.ask("GET", "head", longest=protocol.head_size(self.about))
        head = self._understood("/head", content, lambda content: protocol.read_head(content, self.about))
        if (digest := head_digest(head)) != self.about.head:
            raise InputError(
                f"{self._http.name} sent a head with the sha256 {digest[:12]}, and says {self.about.head[:12]} of it"
            )
        return head

    def _understood(self, page: str, content: bytearray, read: Callable[[bytearray], T]) -> T:
        try:
            return read(content)
        except Malformed as error:
            raise InputError(f"{self._http.name} answered {page} with something else: {error}") from error


def read_token(file: str) -> str:
    """The word in a file of one line. Raises InputError if it holds none that a header may carry."""
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(TOKEN + 1).strip()
    except OSError as error:
        raise InputError(f"the token file {file} cannot be read: {error.strerror}") from error
    if not 8 <= len(content) <= TOKEN or not all(33 <= byte < 127 for byte in content):
        raise InputError(f"the token file {file} holds no word of 8 to {TOKEN} letters, digits and signs")
    return content.decode("ascii")


def _check_place(place: str) -> None:
    if place.startswith("unix:/"):
        return
    try:
        parts = urlsplit(place)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
    except ValueError:  # a port that is none
        fine = False
    if not fine or parts.username or parts.fragment:
        raise InputError(f"served:{place}: expected http://host:port, https://host:port or unix:/path behind served:")

"""What reaches a teacher's server and is no question is refused with a line, and the next honest one is answered."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time

import pytest
import torch
from telling_teacher import VOCABULARY, TellingTeacher, telling

from cmdp_fast import http_client
from cmdp_fast.errors import InputError
from cmdp_fast.teachers.open import open_teacher
from cmdp_fast.teachers.served import server, tensors
from cmdp_fast.teachers.served.server import TeacherServer
from cmdp_fast.teachers.teacher import Asking, about_digest

ABOUT = TellingTeacher().about
DIGEST = about_digest(ABOUT)


@pytest.fixture(scope="module")
def running():
    served = TeacherServer(TellingTeacher(), VOCABULARY).start()
    yield served
    served.close()


def sent(url: str, *pieces: bytes, wait: float = 0.0) -> bytes:
    """All that a server answers to some bytes."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection, contextlib.suppress(OSError):
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(wait)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


def still_answers(url: str) -> None:
    teacher = open_teacher(f"served:{url}")
    assert torch.equal(teacher.answer([[3, 4]], [2]).as_hidden(), telling([[3, 4]], [2]))
    teacher.close()


def posted(body: bytes, *headers: str, path: str = "/ask") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", "Content-Type: application/octet-stream", *headers]
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def asked(tokens=(1, 2, 3), lengths=(3,), wanted=(2,), dtype=torch.int32, words=None, **others) -> bytes:
    """A question with what was given in its place."""
    content = {"tokens": tokens, "lengths": lengths, "wanted": wanted}
    words = {"question": "0" * 32, "teacher": DIGEST, "wire": ""} | (words or {})
    content = {name: torch.tensor(value, dtype=dtype) for name, value in content.items()} | others
    return b"".join(tensors.written(content, words))


def with_header(header: object, body: bytes = b"\0" * 20) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def one(dtype="I32", shape=(3,), places=(0, 12), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(places), **more}


THREE = {"tokens": one(), "lengths": one(shape=(1,), places=(12, 16)), "wanted": one(shape=(1,), places=(16, 20))}
QUESTIONS = {
    "nothing": (b"", "the length of its header is 0"),
    "a few bytes": (b"abc", "the length of its header"),
    "a header of 2^60 bytes": ((1 << 60).to_bytes(8, "little") + b"{}", "header is 1152921504606846976, of 10 bytes"),
    "a header of 2^64 - 1 bytes": (b"\xff" * 16, "the length of its header"),
    "a header that is not JSON": (with_header(b"{'a'}"), "it is not JSON"),
    "a header that is not UTF-8": (with_header(b"\xff\xfe{}"), "it is not JSON"),
    "a deep header": (with_header(b"[" * 60000), "it is not JSON"),
    "a list": (with_header([1]), "no table of tensors"),
    "a name that stands twice": (with_header(b'{"tokens": 1, "tokens": 2}'), "it is not JSON"),
    "NaN": (with_header(b'{"tokens": NaN}'), "it is not JSON"),
    "numbers as words": (with_header({"__metadata__": {"question": 1}}), "no table of tensors and words"),
    "unknown tensors": (asked(more=torch.zeros(1)), "it has 4 tensors, expected lengths, tokens, wanted"),
    "too few tensors": (with_header({"tokens": one()}), "it has 1 tensors"),
    "a tensor that is a number": (with_header(THREE | {"tokens": 3}), "otherwise than by dtype"),
    "a tensor with more to it": (with_header(THREE | {"tokens": one(file="/etc/passwd")}), "otherwise than by dtype"),
    "ids as floats": (asked(dtype=torch.float32), "has another dtype than I32"),
    "an unknown dtype": (with_header(THREE | {"tokens": one("O")}), "has another dtype"),
    "a negative shape": (with_header(THREE | {"tokens": one(shape=(-3,))}), "the shape of tokens is none"),
    "a shape of NaN": (with_header(THREE | {"tokens": one(shape=("NaN",))}), "the shape of tokens is none"),
    "a shape of true": (with_header(THREE | {"tokens": one(shape=(True,))}), "the shape of tokens is none"),
    "a shape beyond the bytes": (with_header(THREE | {"tokens": one(shape=(1 << 61,))}), "does not lie where"),
    "overlapping tensors": (with_header(THREE | {"wanted": one(shape=(1,), places=(12, 16))}), "does not lie where"),
    "a hole": (with_header(THREE | {"wanted": one(shape=(1,), places=(24, 28))}), "does not lie where"),
    "negative places": (with_header(THREE | {"tokens": one(places=(-12, 0))}), "data_offsets that are none"),
    "float places": (with_header(THREE | {"tokens": one(places=(0.0, 12.0))}), "data_offsets that are none"),
    "too few bytes": (with_header(THREE, b"\0" * 19), "wanted ends behind the last byte"),
    "too many bytes": (with_header(THREE, b"\0" * 21), "1 bytes are behind its last tensor"),
    "no words": (with_header(THREE), "a question says its number"),
    "unknown words": (asked(words={"path": "../../etc/passwd"}), "a question says its number"),
    "a number that is none": (asked(words={"question": "\r\nSet-Cookie: a"}), "a question says its number"),
    "an unknown wire": (asked(words={"wire": "float8"}), "the wire is none of bfloat16, float32, int8"),
    "a matrix": (asked(tokens=((1, 2, 3),)), "are lists"),
    "fewer counts than rows": (asked(wanted=()), "are lists, the last two of one length"),
    "a negative length": (asked(lengths=(4, -1), wanted=(0, 0)), "negative length"),
    "a negative wanted": (asked(wanted=(-1,)), "negative length, or more outputs"),
    "more wanted than there are": (asked(wanted=(4,)), "more outputs are wanted"),
    "fewer tokens than the rows have": (asked(lengths=(4,)), "the rows have 4 tokens, and 3 came"),
    "lengths whose sum wraps around": (asked(lengths=((1 << 31) - 1,) * 2 + (5,), wanted=(0,) * 3), "the rows have"),
    "a token beyond the vocabulary": (asked(tokens=(1, 2, 1000)), "a token is none of the 1000 of telling"),
    "a negative token": (asked(tokens=(1, 2, -1)), "a token is none of the 1000"),
    "a long row": (asked(tokens=(1,) * 513, lengths=(513,)), "a row has 513 tokens; telling takes 512"),
    "rows without tokens": (asked(tokens=(), lengths=(0,) * 65537, wanted=(0,) * 65537), "it has 65537 rows"),
    "another teacher": (asked(words={"teacher": "f" * 64}), "another teacher is asked for than telling"),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_that_is_none_is_refused_with_a_line(running, name):
    body, reason = QUESTIONS[name]
    head, _, line = sent(running.url, posted(body)).decode().partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {409 if 'f' * 64 in str(body) else 400} ") and reason in line
    assert line.count("\n") == 1 and "Traceback" not in line
    still_answers(running.url)


REQUESTS = {
    "bytes": (b"\x16\x03\x01\x02\x00" * 40, b"400"),
    "no version": (b"GET /about\r\n\r\n", b"HTTP/1.1 400"),
    "another version": (b"GET /about HTTP/9.9\r\n\r\n", b"505"),
    "another verb": (b"DELETE /about HTTP/1.1\r\nHost: a\r\n\r\n", b"501"),
    "PUT": (b"PUT /ask HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", b"501"),
    "another page": (b"GET /head/ HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
    "a path upwards": (b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
    "an encoded path": (b"GET /%2e%2e/etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
    "a whole address": (b"GET http://10.0.0.1/about HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
    "posted elsewhere": (posted(b"abc", path="/about"), b"404"),
    "a long line": (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"431"),
    "a long header": (b"GET /about HTTP/1.1\r\nA: " + b"a" * 70000 + b"\r\n\r\n", b"431"),
    "many headers": (b"GET /about HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
    "a huge length": (posted(b"abc", "Content-Length: 99999999999999"), b"413"),
    "a longer length": (posted(b"abc", f"Content-Length: {'9' * 5000}"), b"400"),
    "a negative length": (posted(b"abc", "Content-Length: -1"), b"400"),
    "a length of NaN": (posted(b"abc", "Content-Length: NaN"), b"400"),
    "a length with a sign": (posted(b"abc", "Content-Length: +3"), b"400"),
    "two lengths": (posted(b"abc", "Content-Length: 3", "Content-Length: 300"), b"411"),
    "chunks": (posted(b"3\r\nabc\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), b"411"),
    "chunks and a length": (posted(b"abc", "Transfer-Encoding: chunked", "Content-Length: 3"), b"411"),
    "a GET with a body": (b"GET /about HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"400"),
    "a form of a browser's": (posted(b"abc").replace(b"application/octet-stream", b"text/plain"), b"400"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_is_none_is_refused(running, name):
    request, status = REQUESTS[name]
    answer = sent(running.url, request)
    assert answer.startswith(b"HTTP/1.1 ") and status in answer.partition(b"\r\n")[0]
    assert b"passwd" not in answer and b"\xff" not in answer
    still_answers(running.url)


def test_random_bytes_are_refused(running):
    """As requests, and as questions: changed bytes of an honest one among them."""
    generator = random.Random(0)
    honest = posted(asked())
    for _ in range(150):
        changed = bytearray(honest)
        for _ in range(generator.randrange(1, 9)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        sent(running.url, bytes(changed))
        body = bytearray(asked())
        body[generator.randrange(len(body))] = generator.randrange(256)
        assert sent(running.url, posted(bytes(body))).startswith(b"HTTP/1.1 ")
        sent(running.url, generator.randbytes(generator.randrange(300)))
    still_answers(running.url)


def test_half_a_question_is_none(running):
    assert sent(running.url, posted(asked(), "Content-Length: 5000")) == b""
    still_answers(running.url)


def test_who_sends_slowly_is_not_waited_for(running, monkeypatch):
    """A byte now and then does not prolong its time, whether in the headers or in the question."""
    monkeypatch.setattr(server, "SENDING", 0.3)
    for request, at_once in ((b"GET /about HTTP/1.1\r\n" + b"A: b\r\n" * 90, 0), (posted(asked()), 150)):
        pieces = [request[:at_once], *(bytes([byte]) for byte in request[at_once:])]
        since = time.monotonic()
        assert sent(running.url, *filter(None, pieces), wait=0.02) == b""
        assert time.monotonic() - since < len(pieces) * 0.02  # and not until it had sent all
    still_answers(running.url)


def test_more_connections_than_there_may_be_are_told_so(monkeypatch):
    monkeypatch.setattr(server, "CONNECTIONS", 2)
    served = TeacherServer(TellingTeacher(), VOCABULARY).start()
    port = int(served.url.rpartition(":")[2])
    with contextlib.ExitStack() as held:
        open_ones = [held.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(2)]
        for connection in open_ones:  # which are there for sure once they are answered
            connection.sendall(b"GET /about HTTP/1.1\r\nHost: a\r\n\r\n")
            connection.recv(1 << 16)
            connection.sendall(b"GET")  # and in the middle of a request once that has come
        while any(incoming is None or incoming.idle for incoming in served._server._open.values()):
            time.sleep(0.01)
        answer = sent(served.url)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in answer
    still_answers(served.url)
    served.close()


def test_trainers_that_keep_idle_connections_leave_room_for_others(monkeypatch):
    """Each keeps its connection for its next question; the one that was longest not used makes room."""
    monkeypatch.setattr(server, "CONNECTIONS", 2)
    monkeypatch.setattr(http_client, "WAITS", (0.01,))
    served = TeacherServer(TellingTeacher(), VOCABULARY).start()
    trainers = [open_teacher(f"served:{served.url}", Asking(seconds=5.0)) for _ in range(4)]
    for token in range(3):
        for trainer in trainers:
            assert torch.equal(trainer.answer([[token]], [1]).as_hidden(), telling([[token]], [1]))
    for trainer in trainers:
        trainer.close()
    served.close()


def test_a_token_is_asked_for_before_anything_is_read():
    served = TeacherServer(TellingTeacher(), VOCABULARY, token="a-long-word").start()
    for page in (b"GET /about", b"GET /head", b"GET /vocabulary", b"GET /none", b"POST /ask"):
        for given in (b"", b"Authorization: Bearer a-long-wor\r\n", b"Authorization: a-long-word\r\n"):
            answer = sent(served.url, page + b" HTTP/1.1\r\n" + given + b"Content-Length: 99999999999\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 401 ")
    answer = sent(served.url, b"GET /about HTTP/1.1\r\nAuthorization: Bearer a-long-word\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    served.close()


def test_a_socket_is_not_taken_from_another_server_or_file(tmp_path):
    path = tmp_path / "teacher.sock"
    first = TeacherServer(TellingTeacher(), VOCABULARY, path=str(path)).start()
    with pytest.raises(InputError, match="another server listens there"):
        TeacherServer(TellingTeacher(), VOCABULARY, path=str(path))
    still_answers(first.url)
    first.close()
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # of a server that was killed
    second = TeacherServer(TellingTeacher(), VOCABULARY, path=str(path)).start()
    still_answers(second.url)
    second.close()
    path.write_text("a file")
    with pytest.raises(InputError, match="is there, and is no socket"):
        TeacherServer(TellingTeacher(), VOCABULARY, path=str(path))
    assert path.read_text() == "a file"
    with pytest.raises(InputError, match="cannot be listened at"):
        TeacherServer(TellingTeacher(), VOCABULARY, path=str(tmp_path / ("a" * 200)))

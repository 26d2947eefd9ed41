"""What comes from a teacher's server and is no answer is one line, and the next honest answer is taken."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from telling_teacher import VOCABULARY, WIDTH, TellingTeacher, telling

from cmdp_fast import http_client
from cmdp_fast.errors import InputError
from cmdp_fast.teachers.open import open_teacher
from cmdp_fast.teachers.served import protocol, tensors
from cmdp_fast.teachers.teacher import Asking

ABOUT = TellingTeacher().about


@pytest.fixture
def once(monkeypatch):
    """Each is asked once."""
    monkeypatch.setattr(http_client, "WAITS", ())


class Lying:
    """A server that answers each page as an honest one would, but for one change."""

    def __init__(self) -> None:
        teacher = TellingTeacher()
        self.pages = {
            "/about": protocol.about_bytes(teacher.about),
            "/head": b"".join(protocol.head_bytes(teacher.own_head())),
            "/vocabulary": protocol.vocabulary_bytes(VOCABULARY),
        }
        self.lie = lambda question, answer: answer
        lying = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer(lying.pages[self.path])

            def do_POST(self):
                content = bytearray(self.rfile.read(int(self.headers["Content-Length"])))
                question = protocol.read_question(content, teacher.about)
                hidden = telling(question.rows, question.wanted)
                self.answer(lying.lie(question, b"".join(protocol.answer_bytes(question, hidden))))

            def answer(self, content):
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.place = f"served:http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def lying():
    found = Lying()
    yield found
    found.server.shutdown()
    found.server.server_close()


def said(hidden, asked, **words) -> bytes:
    words = {"question": asked.number, "teacher": asked.teacher, "dtype": "F32"} | words
    return b"".join(tensors.written({"hidden": hidden}, words))


RIGHT = telling([[1, 2, 3]], [2])
ANSWERS = {
    "another question's": (lambda q: said(RIGHT, q, question="1" * 32), "the answer to another question"),
    "another model's": (lambda q: said(RIGHT, q, teacher="1" * 64), "another model has made it"),
    "fewer rows": (lambda q: said(RIGHT[:1], q), r"hidden states are \[1, 4\], expected \[2, 4\]"),
    "another width": (lambda q: said(RIGHT[:, :3], q), r"hidden states are \[2, 3\], expected"),
    "a list": (lambda q: said(RIGHT.flatten(), q), r"hidden states are \[8\], expected"),
    "whole numbers": (lambda q: said(RIGHT.int(), q), "hidden has another dtype than F32"),
    "another dtype than asked for": (lambda q: said(RIGHT.bfloat16(), q), "hidden has another dtype than F32"),
    "NaN": (lambda q: said(RIGHT / 0, q), "not all finite"),
    "an infinite one": (lambda q: said(RIGHT.index_fill(1, torch.tensor(0), torch.inf), q), "not all finite"),
    "one too large for the model": (lambda q: said(RIGHT + 1e6, q, dtype="F16"), "not all finite"),
    "no dtype": (lambda q: said(RIGHT, q, dtype="O"), "does not say the model's dtype"),
    "text": (lambda q: b"<html>hello</html>", "the length of its header"),
    "nothing": (lambda q: b"", "the length of its header"),
    "half": (lambda q: said(RIGHT, q)[:-3], "ends behind the last byte"),
    "more": (lambda q: said(RIGHT, q) + b"\0" * 100, "100 bytes are behind"),
    "far more": (lambda q: said(RIGHT, q) + b"\0" * (1 << 17), "answered with more than"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_none_is_one_line(lying, name):
    answer, reason = ANSWERS[name]
    teacher = open_teacher(lying.place, Asking(dtype="float32"))
    lying.lie = lambda question, _: answer(question)
    with pytest.raises(InputError, match=reason) as error:
        teacher.ask([[1, 2, 3]], [2]).result()
    assert "http://127.0.0.1" in str(error.value) and "\n" not in str(error.value)
    lying.lie = lambda question, answer: answer
    assert torch.equal(teacher.answer([[1, 2, 3]], [2]).as_hidden(), RIGHT)


def test_an_answer_that_comes_twice_is_not_taken_for_the_next(lying, once):
    """Its second copy lies in the connection when the next question is asked."""
    teacher = open_teacher(lying.place)

    def twice(question, answer):
        again = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer)
        return Twice(answer, answer + again + answer)

    class Twice(bytes):
        """Bytes that say the length of a part of them."""

        def __new__(cls, counted, content):
            made = super().__new__(cls, content)
            made.counted = len(counted)
            return made

        def __len__(self):
            return self.counted

    lying.lie = twice
    assert torch.equal(teacher.answer([[1, 2, 3]], [2]).as_hidden(), RIGHT)
    for token in (7, 8):  # the connection is not used any more, or its answer is known to be another question's
        with contextlib.suppress(InputError):
            assert torch.equal(teacher.answer([[token]], [1]).as_hidden(), telling([[token]], [1]))


def test_an_answer_that_is_late_is_not_waited_for(lying):
    """Nor taken for that of the next question."""
    teacher = open_teacher(lying.place, Asking(seconds=0.3))
    over = threading.Event()

    def late(question, answer):
        over.wait(10)
        return answer

    lying.lie = late
    with pytest.raises(InputError, match=r"has not answered in 0.3 s \(--teacher-timeout\)"):
        teacher.answer([[1, 2, 3]], [2])
    over.set()
    for token in range(5):
        assert torch.equal(teacher.answer([[token]], [1]).as_hidden(), telling([[token]], [1]))


@pytest.mark.parametrize("name", ["{}", "routed:one={},other={}"])
def test_the_end_of_a_process_does_not_wait_for_an_answer(lying, name):
    """The thread that waits for it is a daemon; one that computes an answer itself is none."""
    teacher, over, before = open_teacher(name.replace("{}", lying.place)), threading.Event(), {*threading.enumerate()}

    def late(question, answer):
        over.wait(60)
        return answer

    lying.lie = late
    under_way = teacher.each()[0].ask([[1, 2, 3]], [2])
    (waiting,) = (t for t in threading.enumerate() if t not in before and "_work" in t.name)
    computing = TellingTeacher()
    computing.answer = lambda rows, wanted: threading.current_thread().daemon
    assert waiting.daemon and not computing.ask([[1]], [1]).result(60)
    over.set()
    assert torch.equal(under_way.result(60).as_hidden()[:, :WIDTH], RIGHT)


def about(**changes) -> bytes:
    value = json.loads(protocol.about_bytes(ABOUT))
    return json.dumps(value | {"about": value["about"] | changes}).encode()


PAGES = {
    "not JSON": ("/about", b"<html>", "it is not JSON"),
    "another server": ("/about", b'{"object": "list"}', "expected a server of cmdp-fast teacher"),
    "another version": ("/about", about().replace(b'"protocol": 1', b'"protocol": 2'), "version 2 of the protocol"),
    "more about it": ("/about", about(more=1), "it says other things of itself"),
    "a size that is text": ("/about", about(hidden_size="4"), "its hidden_size is no int"),
    "a size of true": ("/about", about(hidden_size=True), "its hidden_size is no int"),
    "a size of nothing": ("/about", about(vocab_size=0), "sizes that no model has"),
    "a huge size": ("/about", about(vocab_size=1 << 40), "sizes that no model has"),
    "a name that a terminal obeys": ("/about", about(model="\x1b[2J"), "its model is no plain text"),
    "a long name": ("/about", about(model="a" * 2000), "its model is no plain text"),
    "log-probabilities": ("/about", about(answers="topk"), "something else than hidden states"),
    "an end beyond the vocabulary": ("/about", about(ends=[1000]), "its ends are no tokens that it has"),
    "an end that is no number": ("/about", about(ends=["a"]), "its ends are no tokens that it has"),
    "another dtype": ("/about", about(dtype="load"), "it computes in something else than bfloat16"),
    "whole numbers": ("/about", about(dtype="int8"), "it computes in something else than bfloat16"),
    "no head": ("/head", b"", "the length of its header"),
    "a head of another model": (
        "/head",
        b"".join(protocol.head_bytes(TellingTeacher(seed=1).own_head())),
        "sent a head with the sha256",
    ),
    "a small head": (
        "/head",
        b"".join(tensors.written({"weight": torch.zeros(3, WIDTH)}, {"scale": "1.0", "softcap": ""})),
        r"its head is \[3, 4\], expected \[1000, 4\]",
    ),
    "a head without a scale": (
        "/head",
        b"".join(tensors.written({"weight": torch.zeros(1000, WIDTH)}, {"softcap": ""})),
        "without scale and softcap",
    ),
    "a scale of NaN": (
        "/head",
        b"".join(tensors.written({"weight": torch.zeros(1000, WIDTH)}, {"scale": "nan", "softcap": ""})),
        "the scale or the softcap of its head is none",
    ),
    "a head that does not end": ("/head", b"\0" * (1 << 17), "answered with more than"),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_teacher_that_is_none_is_refused_before_it_is_asked(lying, name):
    page, content, reason = PAGES[name]
    lying.pages[page] = content
    with pytest.raises(InputError, match=reason) as error:
        open_teacher(lying.place)
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("vocabulary", [b"[]", b'{"a": -1}', b'{"a": 1.5}', b'{"a": 1, "a": 2}', b'{"a": true}'])
def test_a_vocabulary_that_is_none_is_refused(lying, vocabulary):
    lying.pages["/vocabulary"] = vocabulary
    with pytest.raises(InputError, match="answered /vocabulary with something else"):
        open_teacher(lying.place).vocabulary()

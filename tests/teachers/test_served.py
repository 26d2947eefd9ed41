"""A teacher behind HTTP says what it says in this process: the same numbers, whoever else asks."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from telling_teacher import VOCABULARY, TellingTeacher, ask_many, telling
from tiny_models import tiny

import cmdp_fast as cf
from cmdp_fast import http_client
from cmdp_fast.errors import InputError
from cmdp_fast.heads import Head
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.open import check_vocabulary, open_teacher
from cmdp_fast.teachers.served import batching, protocol, tensors
from cmdp_fast.teachers.served import server as serving
from cmdp_fast.teachers.served.server import TeacherServer
from cmdp_fast.teachers.teacher import Asking, about_digest
from cmdp_fast.vocabulary import vocabulary_digest

TOKENIZER = SimpleNamespace(get_vocab=lambda: {f"t{i}": i for i in range(101)})


@pytest.fixture
def serve():
    """A function that serves a teacher and returns the server."""
    servers = []

    def start(teacher, vocabulary=VOCABULARY, **options):
        servers.append(TeacherServer(teacher, vocabulary, **options).start())
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def impatient(monkeypatch):
    """Asks once."""
    monkeypatch.setattr(http_client, "WAITS", ())


def in_process(family="llama", **options) -> TeacherInProcess:
    return TeacherInProcess(tiny(family, **options), TOKENIZER, "a teacher")


def rows_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 101, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("over", ["tcp", "unix"])
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("gemma2", torch.bfloat16), ("phi", torch.float32)]
)
def test_answers_are_those_of_the_model_to_the_bit(serve, tmp_path, over, family, dtype):
    """And so is the head, with softcap and bias."""
    model = tiny(family).to(dtype)
    teacher = TeacherInProcess(model, TOKENIZER, "a teacher")
    server = serve(teacher, TOKENIZER.get_vocab(), **({"path": str(tmp_path / "socket")} if over == "unix" else {}))
    served = open_teacher(f"served:{server.url}")
    assert served.about == teacher.about
    rows, wanted = rows_of([7, 3, 0, 5, 1]), [4, 3, 0, 0, 1]
    said, expected = served.ask(rows, wanted).result(), teacher.answer(rows, wanted)
    assert said.as_hidden().dtype == dtype and torch.equal(said.as_hidden(), expected.as_hidden())
    assert said.bytes > said.as_hidden().nbytes and said.seconds > 0
    for ours, theirs in zip(served.own_head(), teacher.own_head(), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert served.answer([], []).as_hidden().shape == (0, 16)
    served.close()
    if over == "unix":
        assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o600


def test_no_answer_is_mixed_up_among_several_trainers(serve):
    """Odd sizes, several threads, merged and split: each hidden state tells which token it is of. The same, 10,000
    times, with the server's memory: the docstring of `telling_teacher`."""
    for options in ({}, {"batch_tokens": 512, "merge": True}):
        server = serve(TellingTeacher(), **options)
        assert ask_many(server.url, 148) == 148


def test_a_question_that_fits_is_read_as_it_was_asked(serve):
    """What is larger is split, and what waits is put together only where that is asked for."""
    teacher = TellingTeacher()
    served = open_teacher(f"served:{serve(teacher, batch_tokens=20).url}")
    rows = rows_of([5, 1, 4, 2])
    served.answer(rows, [1, 1, 1, 1])
    assert teacher.asked == [(5, 1, 4, 2)]
    rows = rows_of([6, 1, 30, 4])
    said = served.answer(rows, wanted := [6, 0, 3, 2]).as_hidden()
    assert torch.equal(said, telling(rows, wanted)) and teacher.asked[1:] == [(30,), (6, 4, 1)]


@pytest.mark.parametrize("merge", [False, True])
def test_questions_that_wait_are_put_together_where_that_is_asked_for(merge):
    teacher, begun, go_on = TellingTeacher(), threading.Event(), threading.Event()

    def wait(hidden):
        begun.set()
        go_on.wait()
        return hidden

    teacher.change = wait
    line = batching.Batching(teacher, 20, merge)
    first = line.ask([[9]], [1])
    begun.wait()  # the others come while it is read
    questions = [(rows_of([4, 3], seed), [2, 3]) for seed in range(4)]
    answers = [line.ask(rows, wanted) for rows, wanted in questions]
    go_on.set()
    line.close()
    assert first.result().shape == (1, 4)
    for (rows, wanted), answer in zip(questions, answers, strict=True):
        assert torch.equal(answer.result(), telling(rows, wanted))
    assert teacher.asked == [(1,), *([(4, 3, 4, 3)] * 2 if merge else [(4, 3)] * 4)]
    with pytest.raises(batching.Busy):
        line.ask([[1]], [1])


def test_split_questions_differ_by_rounding_alone(serve):
    """A batch of another shape adds up in another order; float32 against float64."""
    teacher = in_process()
    served = open_teacher(f"served:{serve(teacher, batch_tokens=8).url}")
    rows, wanted = rows_of([7, 3, 6, 5, 1]), [4, 3, 6, 0, 1]
    exact = TeacherInProcess(tiny().double(), TOKENIZER).answer(rows, wanted).as_hidden()
    said, itself = (each.answer(rows, wanted).as_hidden() for each in (served, teacher))
    error, own = ((each - exact).abs().max() for each in (said, itself))
    assert error <= 2 * own + 8 * torch.finfo(torch.float32).eps * exact.abs().max()


# --------------------------------------------------------------------------------------------------------------
# The wire


def test_a_narrower_wire_costs_as_much_as_its_dtype_rounds(serve):
    """The relative error of a row, and what it does to the reverse KL from a student, against float64.

    A number of bfloat16 is off by 2^-8 of itself at most, one of int8 by 1/254 of the largest of its row. The
    derivative of the reverse KL by the teacher's logits is q - p, whose absolute values add up to 2 at most: so the KL
    is off by no more than twice the largest error of a logit.
    """
    teacher, student = in_process(hidden_size=64), tiny(seed=1, hidden_size=64)
    url = f"served:{serve(teacher).url}"
    rows = rows_of([20] * 8)
    wanted = [20] * 8
    exact = teacher.answer(rows, wanted).as_hidden()
    read = TeacherInProcess(student, TOKENIZER).answer(rows, wanted)
    tokens = torch.tensor(rows).flatten()

    def reverse_kl(hidden):
        wide = [Head(head.weight.double()) for head in (read.head, teacher.head)]
        return cf.linear_token_stats(read.as_hidden().double(), wide[0], hidden.double(), wide[1], tokens).reverse_kl

    kl = float(reverse_kl(exact).mean())
    for wire, bound in (("float32", 0.0), ("bfloat16", 2**-8), ("int8", 1 / 254)):
        said = open_teacher(url, Asking(dtype=wire)).answer(rows, wanted).as_hidden()
        assert said.dtype == torch.float32  # the model's own; the wire's is on the wire
        off = said - exact
        largest = exact.abs() if wire == "bfloat16" else exact.abs().amax(-1, keepdim=True)
        assert bool((off.abs() <= bound * largest * 1.001).all())
        relative, nats = off.norm(dim=-1) / exact.norm(dim=-1), (reverse_kl(said) - reverse_kl(exact)).abs()
        assert bool((nats <= 2 * teacher.head.logits(off).abs().amax(-1) + 1e-12).all())
        print(f"{wire}: a row off by up to {relative.max():.2g}, {nats.mean():.2g} nats per token of {kl:.3g}")
        assert bool(relative.any()) == bool(nats.any()) == (wire != "float32")


def test_the_bytes_are_those_of_safetensors():
    """Its library reads what we write, and we read what it writes."""
    safetensors = pytest.importorskip("safetensors.torch")
    tensor = {"hidden": torch.randn(3, 5).bfloat16(), "scale": torch.randn(3), "none": torch.empty(0, 4)}
    content = b"".join(tensors.written(tensor, {"question": "q"}))
    expected = {"hidden": ("BF16",), "scale": ("F32",), "none": ("F32",)}
    for bytes_ in (content, safetensors.save(tensor, {"question": "q"})):
        ours, words = tensors.read(bytearray(bytes_), expected)
        assert words == {"question": "q"}
        for name, value in safetensors.load(bytes(bytes_)).items():
            assert torch.equal(value, tensor[name]) and torch.equal(ours[name], tensor[name])


# --------------------------------------------------------------------------------------------------------------
# Other teachers and other vocabularies


def test_a_vocabulary_is_compared_by_digest_and_then_token_by_token(serve):
    def named(**changes):
        vocabulary = {f"t{i}": i for i in range(101)} | changes
        return SimpleNamespace(get_vocab=lambda: vocabulary)

    served = open_teacher(f"served:{serve(in_process(), TOKENIZER.get_vocab()).url}")
    check_vocabulary(served, TOKENIZER)
    check_vocabulary(served, named(more=101))  # behind the other's last
    with pytest.raises(InputError, match=r"token 7 is 'other' in one .* 't7' in the other .*sha256 of the student's"):
        check_vocabulary(served, SimpleNamespace(get_vocab=lambda: {**TOKENIZER.get_vocab(), "t7": 200, "other": 7}))
    teacher = TellingTeacher()  # which knows only a digest
    with pytest.raises(InputError, match=r"telling has another \(sha256"):
        check_vocabulary(teacher, TOKENIZER)
    lying = open_teacher(f"served:{serve(in_process(), {'a': 0}).url}")
    with pytest.raises(InputError, match="not the one that it says"):
        check_vocabulary(lying, named(more=101))


def test_a_server_that_came_back_with_another_model_is_refused(serve):
    """At the first question. With the same model it goes on."""
    server = serve(TellingTeacher())
    port = int(server.url.rpartition(":")[2])
    served = open_teacher(f"served:{server.url}")
    assert torch.equal(served.answer([[5]], [1]).as_hidden(), telling([[5]], [1]))
    server.close()
    again = serve(TellingTeacher(), port=port)
    assert torch.equal(served.answer([[5]], [1]).as_hidden(), telling([[5]], [1]))
    again.close()
    serve(TellingTeacher(name="another"), port=port)
    with pytest.raises(InputError, match=r"answered 409: another teacher is asked for than another, which is here now"):
        served.answer([[5]], [1])


def test_a_server_that_ends_answers_what_was_asked(serve, impatient):
    teacher = TellingTeacher(seconds=0.1)
    server = serve(teacher)
    served = open_teacher(f"served:{server.url}")
    answers = [served.ask([[i]], [1]) for i in range(5)]
    while len(teacher.asked) + server.batching.waiting < 5:
        time.sleep(0.001)
    server.close()
    for i, answer in enumerate(answers):
        assert torch.equal(answer.result().as_hidden(), telling([[i]], [1]))
    with pytest.raises(InputError, match=r"the teacher at .* cannot be reached"):
        served.answer([[1]], [1])


def test_a_model_that_fails_is_one_line_and_the_next_question_is_answered(serve):
    def unreadable(hidden):
        raise OSError("a file of it is gone")

    teacher = TellingTeacher()
    served = open_teacher(f"served:{serve(teacher).url}")
    teacher.change = lambda hidden: 1 / 0
    with pytest.raises(InputError, match=r"answered 500: the model failed: division by zero \(POST /ask\)"):
        served.answer([[1]], [1])
    teacher.change = unreadable
    with pytest.raises(InputError, match="answered 500: the model failed: a file of it is gone"):
        served.answer([[1]], [1])
    teacher.change = lambda hidden: hidden / 0
    with pytest.raises(InputError, match="its hidden states are not all finite"):
        served.answer([[1]], [1])
    teacher.change = lambda hidden: hidden[1:]
    with pytest.raises(InputError, match="answered 500: the model failed: "):  # and its thread goes on
        served.answer([[1]], [1])
    teacher.change = lambda hidden: hidden
    assert torch.equal(served.answer([[1]], [1]).as_hidden(), telling([[1]], [1]))


def test_a_head_that_is_not_the_one_it_says_is_refused(serve):
    teacher = TellingTeacher()
    teacher.head = teacher.head.scaled(2.0)
    with pytest.raises(InputError, match=r"sent a head with the sha256 \w{12}, and says \w{12} of it"):
        open_teacher(f"served:{serve(teacher).url}")


def test_a_token_is_asked_for(serve, tmp_path):
    server = serve(TellingTeacher(), token="a-long-word")
    for name, word, refused in (
        ("right", "a-long-word\n", ""),
        ("wrong", "another-word", "answered 401: expected the token of --token-file"),
        ("short", "word", "holds no word of 8 to"),
        ("binary", "\x00\r\n: x" * 4, "holds no word of 8 to"),
    ):
        (tmp_path / name).write_text(word)
        asking = Asking(token_file=str(tmp_path / name))
        if refused:
            with pytest.raises(InputError, match=refused):
                open_teacher(f"served:{server.url}", asking)
        else:
            assert len(open_teacher(f"served:{server.url}", asking).answer([[1]], [1]).as_hidden()) == 1
    with pytest.raises(InputError, match="answered 401"):
        open_teacher(f"served:{server.url}")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        open_teacher(f"served:{server.url}", Asking(token_file=str(tmp_path / "none")))


@pytest.mark.parametrize(
    "place", ["", "10.0.0.2:8000", "ftp://a:1", "http://", "http://a:port", "unix:socket", "http://u@a"]
)
def test_a_place_that_is_none_is_refused(place):
    with pytest.raises(InputError, match="expected"):
        open_teacher(f"served:{place}")


def test_more_than_a_server_takes_is_told_to_wait(serve, monkeypatch):
    """By the trainer, which asks again until its time is over."""
    teacher, go_on = TellingTeacher(), threading.Event()
    url = serve(teacher, waiting=1).url
    served, busy = open_teacher(f"served:{url}"), Mock(wraps=http_client._reason)
    monkeypatch.setattr(http_client, "_reason", busy)
    teacher.change = lambda hidden: go_on.wait() and hidden
    monkeypatch.setattr(http_client, "WAITS", ())  # which are for servers that do not say when to ask again
    hasty = open_teacher(f"served:{url}", Asking(seconds=20))
    answers = [served.ask([[i]], [1]) for i in range(4)]
    try:
        while busy.call_count < 2:
            time.sleep(0.01)
        monkeypatch.setattr(serving, "RETRY", 30)  # later than it has time
        with pytest.raises(InputError, match="answered 503: 1 questions wait already"):
            hasty.answer([[1]], [1])
        monkeypatch.setattr(serving, "RETRY", 1)
    finally:
        go_on.set()  # or the server would never end
    for i, answer in enumerate(answers):
        assert torch.equal(answer.result().as_hidden(), telling([[i]], [1]))


def test_a_tokenizer_that_differs_is_one_short_line(serve):
    """However long a token is that the server says it has."""
    theirs = {f"{i}" * 10_000: i for i in range(3)}
    teacher = TellingTeacher()
    teacher.about = replace(teacher.about, tokenizer=vocabulary_digest(SimpleNamespace(get_vocab=lambda: theirs)))
    served = open_teacher(f"served:{serve(teacher, theirs).url}")
    with pytest.raises(InputError, match=r"token 0 is 't0' in one .* and '000") as raised:
        check_vocabulary(served, TOKENIZER)
    assert len(str(raised.value)) < 600


def test_more_rows_than_a_server_takes_are_not_sent(serve, monkeypatch):
    monkeypatch.setattr(protocol, "ROWS", 3)
    with pytest.raises(InputError, match="takes 3 rows at once, got 4"):
        open_teacher(f"served:{serve(TellingTeacher()).url}").answer([[]] * 4, [0] * 4)


def test_sizes_that_are_written_are_bounds():
    """Of a question and an answer."""
    about = TellingTeacher().about
    question = protocol.Question("0" * 32, about_digest(about), "", [[1]] * 50, [1] * 50)
    assert len(protocol.question_bytes(question)) <= protocol.question_size(50)
    assert sum(map(len, protocol.answer_bytes(question, torch.zeros(50, 4)))) <= protocol.answer_size(about, 50)

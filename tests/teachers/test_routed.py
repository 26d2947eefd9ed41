"""Several teachers: each answers for its own rows, and the account of a batch is that of each teacher's part."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_teacher import TOKENIZER, completions
from tiny_models import tiny

from cmdp_fast import scoring
from cmdp_fast.errors import InputError
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.open import check_vocabulary, open_teacher
from cmdp_fast.teachers.routed import RoutedTeacher, places, rows_by_teacher
from cmdp_fast.teachers.served.server import TeacherServer
from cmdp_fast.teachers.teacher import Asking

VOCABULARY = TOKENIZER.get_vocab()


def of(family: str, name: str, dtype: torch.dtype = torch.float32, **options) -> TeacherInProcess:
    return TeacherInProcess(tiny(family, **options).to(dtype), TOKENIZER, name, ends=(5,) if name == "one" else (6, 5))


def two(dtype: torch.dtype = torch.float32) -> dict[str, TeacherInProcess]:
    """Of different width and family; one has a softcap."""
    return {"math": of("llama", "one"), "code": of("gemma2", "other", dtype, hidden_size=32, seed=3)}


def part(batch: SimpleNamespace, rows: list[int], index: torch.Tensor) -> SimpleNamespace:
    tensors = {name: value[rows] for name, value in vars(batch).items() if value is not None}
    return SimpleNamespace(**tensors, lengths=None, teacher_index=index[rows])


def statistics(student, teacher, batch, beta: float = 0.3):
    """(statistics, divergence) of a batch, with a gradient."""
    score = scoring.make_scoring("tiled", (student, teacher), 101, 0.7, 1.3)
    models = (student, scoring.answering(teacher, batch))
    outputs = (score.outputs(student, batch), score.outputs(teacher, batch))
    stats = score.token_stats(models, outputs, batch.tokens, batch.mask)
    return [*stats, score.divergence(models, outputs, batch.mask, beta)]


@pytest.mark.parametrize("served", [False, True], ids=["in process", "served"])
def test_each_teachers_rows_have_the_numbers_of_that_teacher_alone(served):
    """Statistics, divergence and gradient, to the last digit."""
    teachers, student, batch = two(), tiny("llama", seed=1), completions()
    servers = [TeacherServer(teacher, VOCABULARY).start() for teacher in teachers.values()] if served else []
    if served:
        name = ",".join(f"{name}=served:{server.url}" for name, server in zip(teachers, servers, strict=True))
        routed = open_teacher(f"routed:{name}", Asking(seconds=20.0))
    else:
        routed = RoutedTeacher(teachers)
    index = routed.numbers(["code", "math", "math", "code"])
    groups = rows_by_teacher(range(4), index)
    assert groups == [[1, 2], [0, 3]]
    for rows, teacher in zip(groups, teachers.values(), strict=True):
        found = []
        for asked in (routed, teacher):
            student.zero_grad()
            values = statistics(student, asked, part(batch, rows, index))
            torch.stack([values[4].sum(), values[-1].sum()]).sum().backward()
            found.append([*values, *(parameter.grad for parameter in student.parameters())])
        for ours, alone in zip(*found, strict=True):
            assert torch.equal(ours, alone)
        assert values[4].abs().sum() > 0
    assert routed.taken.tokens == int(batch.mask.sum()) and (routed.taken.bytes > 0) == served
    routed.close()
    for server in servers:
        server.close()


def test_what_is_said_of_several_holds_for_each():
    routed = RoutedTeacher(two())
    about = routed.about
    assert (about.answers, about.hidden_size, about.vocab_size, about.ends) == ("hidden", 32, 101, (5, 6))
    check_vocabulary(routed, TOKENIZER)
    with pytest.raises(InputError, match="must share a tokenizer"):
        check_vocabulary(routed, SimpleNamespace(get_vocab=lambda: {f"u{i}": i for i in range(101)}))
    again, turned = RoutedTeacher(two()).about, RoutedTeacher(dict(reversed(two().items()))).about
    assert about == again and about.revision != turned.revision
    with pytest.raises(TypeError, match="has no head of its own"):
        routed.own_head()
    with pytest.raises(TypeError, match="whose they are"):
        routed.answer([[1]], [1])


def test_teachers_of_two_dtypes_are_read_in_the_wider():
    routed, batch = RoutedTeacher(two(torch.bfloat16)), completions()
    index = torch.tensor([1, 1, 1, 1])
    wide = routed.of_completions(part(batch, [0, 1, 2, 3], index)).as_hidden()
    assert wide.dtype == torch.float32 and routed.about.dtype == "float32"
    assert torch.equal(wide, two(torch.bfloat16)["code"].of_completions(batch).as_hidden().float())


def test_completions_that_do_not_say_whose_they_are_are_refused():
    routed, batch = RoutedTeacher(two()), completions()
    with pytest.raises(ValueError, match="do not say whose they are"):
        routed.begin(batch)
    with pytest.raises(ValueError, match=r"completions of several teachers, \[0, 1\]"):
        routed.of_completions(part(batch, [0, 1], torch.tensor([0, 1])))
    with pytest.raises(InputError, match=r"calls for the teacher 'physics'; there are math, code"):
        routed.numbers(["math", "physics"])
    assert rows_by_teacher([3, 1], None) == [[3, 1]]


@pytest.mark.parametrize("text", ["", "math", "math=", "=served:x", "math=a,math=b", "math=a,"])
def test_a_name_of_several_that_is_none(text):
    with pytest.raises(InputError, match="expected NAME=TEACHER,NAME=TEACHER"):
        places(text)


def test_teachers_that_cannot_be_among_several():
    stored = of("llama", "one")
    stored.completions = SimpleNamespace(of=lambda prompt: [])
    likely = of("llama", "one")
    likely.about = SimpleNamespace(**{**vars(likely.about), "answers": "topk"})
    for teachers, message in (
        ({"math": of("llama", "one")}, "takes two teachers or more, got math"),
        ({**two(), "stored": stored}, "the teacher stored answers for its stored completions alone"),
        ({**two(), "likely": likely}, "the teacher likely answers with topk"),
    ):
        with pytest.raises(InputError, match=message):
            RoutedTeacher(teachers)
    with pytest.raises(InputError, match="names no teacher that can be asked"):
        open_teacher("routed:math=some/folder,code=other/folder")

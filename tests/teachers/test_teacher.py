"""A teacher that is asked says what a model says that reads the completions itself: the same numbers, to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from completion_batches import batch
from tiny_models import tiny

from cmdp_fast import reading, scoring
from cmdp_fast.heads import head_of, last_hidden_state
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.teacher import head_digest

TOKENIZER = SimpleNamespace(get_vocab=lambda: {f"t{i}": i for i in range(101)})


def completions(lengths=(4, 1, 6, 0), seed=0) -> SimpleNamespace:
    """Four, of which one has no tokens."""
    return batch((3, 5, 1, 2), lengths, seed)


def teacher_of(family: str = "llama", **options) -> TeacherInProcess:
    return TeacherInProcess(tiny(family, **options), TOKENIZER, "a teacher")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_completions_have_the_hidden_states_that_the_model_itself_gives(family):
    teacher, batch = teacher_of(family), completions()
    said = teacher.of_completions(batch)
    with torch.no_grad():
        hidden = reading.completion_hidden(teacher.model, batch)
    assert torch.equal(said.as_hidden()[batch.mask], hidden[batch.mask])
    assert said.as_hidden()[~batch.mask].eq(0).all()
    logits = head_of(teacher.model).logits(hidden)
    torch.testing.assert_close(said.as_logits()[batch.mask], logits[batch.mask])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_be_on_either_side(side):
    """Or in the middle: what is masked is not seen, and the outputs are those of the row without it."""
    teacher = teacher_of()
    ids = torch.randint(3, 101, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(8) < torch.tensor([8, 3, 5])[:, None]
    mask = mask.flip(1) if side == "left" else mask
    said = teacher.outputs(ids.masked_fill(~mask, 0), mask).as_hidden()
    for row in range(3):
        with torch.no_grad():
            alone = last_hidden_state(teacher.model, ids[row][mask[row]][None])[0]
        torch.testing.assert_close(said[row][mask[row]], alone)
    last = teacher.outputs(ids, mask, last=2).as_hidden()
    torch.testing.assert_close(last, said[:, -2:])


def test_questions_are_answered_in_any_order():
    """And each gets its own answer."""
    teacher = teacher_of()
    rows = [[list(range(3 + i, 9 + i))] for i in range(20)]
    under_way = [teacher.ask(row, [2]) for row in rows]
    for row, future in reversed(list(zip(rows, under_way, strict=True))):
        assert torch.equal(future.result().as_hidden(), teacher.answer(row, [2]).as_hidden())


def test_scoring_takes_a_teacher_in_the_place_of_a_model():
    student, teacher, batch = tiny("llama", seed=1), teacher_of(), completions()
    results = []
    for kind in ("tiled", "full"):
        for asked in (teacher, teacher.model):
            models = (student, asked)
            score = scoring.make_scoring(kind, models, 101, 0.7, 1.3)
            outputs = (score.outputs(student, batch), score.outputs(asked, batch).detach())
            results.append(score.token_stats(models, outputs, batch.tokens, batch.mask))
            results[-1].reverse_kl.sum().backward()
    for tiled, itself in (results[:2], results[2:]):
        for ours, theirs in zip(tiled, itself, strict=True):
            assert torch.equal(ours, theirs)


def test_a_question_that_cannot_be_answered_is_refused_before_it_is_sent():
    teacher = teacher_of(max_position_embeddings=8)
    for rows, wanted, message in (
        ([[1, 2]], [3], "3 outputs are wanted of a row of 2 tokens"),
        ([[1, 2]], [1, 1], "1 rows and 2 numbers"),
        ([[1, 101]], [1], "token 101 is none of the 101"),
        ([[1, -1]], [1], "token -1"),
        ([[1] * 9], [1], "9 tokens; a teacher takes 8"),
    ):
        with pytest.raises(ValueError, match=message):
            teacher.ask(rows, wanted)
    with pytest.raises(ValueError, match="expected equal"):
        teacher.outputs(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4))


def test_a_heads_digest_tells_heads_apart():
    head = teacher_of().head
    assert head_digest(head) == head_digest(head._replace(weight=head.weight.clone()))
    changed = head.weight.clone()
    changed[-1, -1] += 1e-3
    others = (head._replace(weight=changed), head.scaled(2.0), head._replace(softcap=30.0))
    assert len({head_digest(each) for each in (head, *others)}) == 4

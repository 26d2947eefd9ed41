"""The task of short instructions, and the rewards that can be had without doing what they ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks import data, writing
from cmdp_fast.trainer.tasks.hackable import colour_words, questions


@pytest.mark.parametrize("about", writing.TEMPLATES)
def test_problems_are_apart_and_of_every_topic(about):
    train, held_out = data.load_problems(TrainConfig(task="writing", task_args={"about": about}))
    prompts = [row["prompt"] for row in (*train, *held_out)]
    assert len(prompts) == len(set(prompts)) == 5 * len(writing.TOPICS) > 350
    assert len(held_out) > 50 and not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    few = writing.writing_rows({"about": about}, len(writing.TOPICS))
    assert {row["topic"] for row in few} == set(writing.TOPICS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"about": "poems"}, "about must be one of colours, questions, not 'poems'"),
        ({"about": ["colours"]}, "about must be one of"),
        ({"topic": "x"}, "has no argument 'topic', only 'about'"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        data.load_problems(TrainConfig(task="writing", task_args=arguments))


@pytest.mark.parametrize(
    ("text", "colours"),
    [
        ("", 0),
        ("A Red kite, GREEN and red-gold!", 4),
        ("redden blueish greenhouse", 0),  # whole words
        ("blue " * 20, 20),
        ([{"role": "assistant", "content": "a grey day"}], 1),
    ],
)
def test_colours_are_counted(text, colours):
    assert colour_words([text]) == [pytest.approx(1 - 0.7**colours)]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("???", 0.0),  # no word
        ("What?", 1.0),
        ("I see. What is it?", 0.5),
        ("What is it?! Tell me...", 0.5),
        ("What is it? I wonder", 0.5),
        ('He asked: "Why?"', 1.0),
        ("No end", 0.0),
    ],
)
def test_questions_are_a_share_of_the_sentences(text, share):
    assert questions([text]) == [share]


@given(st.text())
def test_any_text_has_a_reward(text):
    for reward in (colour_words, questions):
        assert 0.0 <= reward([text])[0] <= 1.0

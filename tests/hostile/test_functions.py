"""Reward functions, verifiers and judges that do anything, and completions that are made to break those that are ours:
one line that names the function, or a number."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
import torch

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks.data import last_group
from cmdp_fast.trainer.tasks.equations import all_hold
from cmdp_fast.trainer.tasks.hackable import colour_words, questions
from cmdp_fast.trainer.tasks.judge import compare_pairs
from cmdp_fast.trainer.tasks.rewards import brevity, call_rewards, exact_answer, trainer_state
from cmdp_fast.trainer.tasks.step_verifiers import arithmetic_chain, call_step_verifier

ROWS = [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": "2"}]
CODE = "\x1b[2J"


class Panic(BaseException):
    """As that of a library in Rust, which is no Exception."""


class NoNumber:
    def __float__(self) -> float:
        raise SystemExit(3)

    def __repr__(self) -> str:
        raise KeyError(CODE)


class NoList(list):
    def __iter__(self) -> Iterator[Any]:
        raise Panic(f"{CODE}\nmore")


class Exits(Exception):
    def __str__(self) -> str:
        raise SystemExit(0)


class TextThatExits(str):
    __str__ = Exits.__str__


class OddShape:
    shape = 5


class ShapeThatExits:
    @property
    def shape(self) -> Any:
        raise SystemExit(0)


class ClassThatExits:
    __class__ = ShapeThatExits.shape  # type: ignore[assignment]


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def giving(value: Callable[[], Any]) -> Callable[..., Any]:
    return lambda *_, **__: value()


def endless(*_: Any, **__: Any) -> Any:
    return endless()


ERRORS: dict[str, Callable[..., Any]] = {
    "an exit": lambda *_, **__: sys.exit(3),
    "an exit without a word": lambda *_, **__: sys.exit(),
    "a panic": raising(Panic(f"{CODE}\nmore")),
    "the end of an iterator": raising(StopIteration()),
    "half a character": raising(ValueError("\ud800")),
    "an exit in its text": raising(Exits()),
    "a name of many lines": raising(type("no\n" * 10**4, (Exception,), {})()),
    "ten megabytes": raising(ValueError("x" * 10**7)),
    "no memory": raising(MemoryError()),
    "no depth": endless,
    "no number": giving(lambda: [NoNumber(), NoNumber()]),
    "no list": giving(lambda: NoList([1, 2])),
    "texts": giving(lambda: ["1", "2"]),
    "a text": giving(lambda: "12"),
    "bytes": giving(lambda: b"12"),
    "nothing": giving(lambda: NoNumber()),
    "an exit in a text": giving(lambda: TextThatExits("12")),
    "an odd shape": giving(lambda: [OddShape(), OddShape()]),
    "no list of an odd shape": giving(OddShape),
    "an exit in a shape": giving(lambda: [ShapeThatExits(), 1]),
    "no list that exits": giving(ShapeThatExits),
    "an exit in a class": giving(lambda: [ClassThatExits(), 1]),
    "no list of a class that exits": giving(ClassThatExits),
    "one of two": giving(lambda: [1.0]),
    "infinity": giving(lambda: [math.inf, 1]),
    "beyond float32": giving(lambda: [1e39, 1]),
    "beyond float64": giving(lambda: [10**400, 1]),
    "complex": giving(lambda: [1j, 1]),
    "a complex tensor": giving(lambda: torch.tensor([1j, 1])),
    "a tensor without numbers": giving(lambda: torch.ones(2, device="meta")),
    "rows of a tensor": giving(lambda: torch.ones(2, 2)),
    "no Decimal": giving(lambda: [Decimal("sNaN"), 1]),
    "a table": giving(lambda: {0: 1, 1: 2}),
    "a set": giving(lambda: {1, 2}),
}


def called(function: Callable[..., Any]) -> list[float]:
    state = trainer_state(TrainConfig(task="chain_sum"))
    return call_rewards({"mine": function}, ROWS, ["a", "b"], [[1], [2]], state).rewards["mine"]


@pytest.mark.parametrize("kind", ["reward", "coroutine", "verifier", "judge"])
@pytest.mark.parametrize("case", ERRORS)
def test_what_a_function_does_is_one_line(case, kind):
    function = ERRORS[case]

    async def awaited(**given: Any) -> Any:
        await asyncio.sleep(0)
        return function(**given)

    asks: dict[str, Callable[[], object]] = {
        "reward": lambda: called(function),
        "coroutine": lambda: called(awaited),
        "verifier": lambda: call_step_verifier(function, ROWS, ["a", "b"]),
        "judge": lambda: compare_pairs(function, ROWS, ["a", "b"], ["c", "d"]),
    }
    with pytest.raises(InputError) as raised:
        asks[kind]()
    said = str(raised.value)
    assert said.isprintable() and len(said) < 800, said


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda **_: (number for number in (1, 2)), [1.0, 2.0]),
        (lambda **_: torch.ones(2, 1, requires_grad=True), [1.0, 1.0]),
        (lambda **_: torch.ones(2, dtype=torch.int8), [1.0, 1.0]),
        (lambda **_: [True, 2**63], [1.0, 2.0**63]),
        (lambda prompts, completions, answer, **_: [prompts.clear(), completions.clear(), answer.clear()][:2], None),
    ],
)
def test_numbers_of_any_kind_are_numbers(function, expected):
    found = called(function)
    assert found == expected if expected else all(map(math.isnan, found))
    assert called(lambda prompts, **_: [float(each) for each in prompts]) == [1.0, 2.0], "its lists are its own"


def test_an_object_that_answers_nothing_that_it_is_asked():
    class Silent:
        def __getattribute__(self, name: str) -> Any:
            raise SystemExit(0)

        def __call__(self, **_: Any) -> list[float]:
            return [1.0, 2.0]

    assert called(Silent()) == [1.0, 2.0]


MEGABYTE = 10**6
TEXTS = {
    "digits": "9" * MEGABYTE,
    "digits of a fraction": "1" * 309 + ".5 + 1 = 2",
    "digits behind the point": "1." + "5" * MEGABYTE + " + 1 = 2",
    "spaces": "1" + " " * MEGABYTE + "+ 1 = 2",
    "brackets": "(" * 10**5 + "1" + ")" * 10**5 + " + 1 = 2",
    "powers": "9**9**9**9 = 1 + 1",
    "other digits": "\u0663 + \u0664 = \u0667; \u00b2 + 1 = 2; \uff11+\uff12=\uff13",
    "directions": "\u202e2 = 1 + 1\u202c" * 1000,
    "zeros": "\0" * MEGABYTE + "1+1=2",
    "boxes": "\\boxed{" * 10**5,
    "codes": "\x1b]0;x\x07\x1b[2J" * 10**4,
    "half characters": "\ud800" * 10**4 + "1 + 1 = 2",
    "no number by no number": "0/0=0/0 = 1/0 " * 1000,
    "equations": "1+1=2 " * 20_000,
    "signs": "-+" * 10**5 + "=1",
}


@pytest.mark.parametrize("case", TEXTS)
def test_what_is_ours_says_something_of_any_text(case):
    import re

    text, used = TEXTS[case], time.process_time()
    assert all_hold(text) in (True, False, None)
    assert arithmetic_chain("1 + 1 =", text, metadata={"expression": "1 + 1"}) is False
    assert all(0 <= value <= 1 for reward in (colour_words, questions) for value in reward(completions=[text]))
    for pattern in ("", r"A(.+)", r"\\boxed\{(.*)\}", r"(-?\d+)"):
        exact_answer(re.compile(pattern))(completions=[text], answer=["1"])
    brevity(re.compile(""), 10)(completions=[text], completion_ids=[[1]], answer=["1"])
    assert time.process_time() - used < 20, "seconds of a processor for a megabyte, where one is enough"


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(a*)*b", r"((a?){30})a{30}$", r"(.*,){20}P"])
def test_a_pattern_that_never_ends_finds_nothing(pattern, monkeypatch):
    """Its time is that of a clock, so nothing is said of how long it takes; it ends."""
    import re

    from cmdp_fast.trainer.tasks import data

    monkeypatch.setattr(data, "SEARCH", 0.05)
    last_group(re.compile(pattern), "a" * 5000 + "!" + "1,2," * 100)

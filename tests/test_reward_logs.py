"""What reward functions log: numbers, and columns of values that may come from completions."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reward_forms import FORMS, lengths
from test_reward_functions import called

from cmdp_fast.errors import InputError
from cmdp_fast.files import as_json, write_text
from cmdp_fast.reward_functions import mean_metrics, plain_value


def test_metrics_are_collected_and_their_mean_is_that_of_all_processes(monkeypatch):
    def logging(completions: Any, log_metric: Any, **_: Any) -> list[float]:
        for value in (1, torch.tensor(2.0), True):
            log_metric("x", value)
        return [0.0] * len(completions)

    logged = called(logging, functools.partial(logging)).logged
    assert logged.metrics == {"x": [1.0, 2.0, 1.0] * 2}
    assert mean_metrics(logged, SimpleNamespace(num_processes=1)) == {"x": pytest.approx(4 / 3)}
    utils = pytest.importorskip("accelerate.utils")
    monkeypatch.setattr(utils, "gather_object", lambda mine: [*mine, {"y": (3.0, 1), "x": (0.0, 2)}])
    means = mean_metrics(logged, SimpleNamespace(num_processes=2))
    assert means == {"x": 1.0, "y": 3.0} and list(means) == ["x", "y"]


def test_columns_may_come_in_parts_and_must_be_whole():
    def parts(completions: Any, log_extra: Any, **_: Any) -> list[float]:
        for completion in completions:
            log_extra("length", torch.tensor([len(completion)]))
        return [0.0] * len(completions)

    assert called(parts).logged.rows() == [{"length": 3}, {"length": 0}, {"length": 5}]
    assert called(lengths, parts, FORMS["partial"][0]).logged.rows()[0] == {"text": "<one>", "length": 3}

    def odd(completions: Any, log_extra: Any, **_: Any) -> list[float]:
        log_extra("x" * 1000, completions[:2])
        return [0.0] * len(completions)

    with pytest.raises(InputError, match=r"reward function odd: log_extra\('x{80}...', ...\) got 2 values for 3 compl"):
        called(parts, odd)


def test_what_cannot_be_logged_is_told():
    def logging(how: str, *what: Any) -> Any:
        return lambda **given: given[how](*what) or [0.0] * 3

    with pytest.raises(
        InputError, match=r"reward function <lambda>: log_metric\('x', ...\) got a value of type str; expected"
    ):
        called(logging("log_metric", "x", "1"))
    with pytest.raises(
        InputError, match=r"log_metric\('x', ...\) got a value of type Tensor and shape \(2,\); expected"
    ):
        called(logging("log_metric", "x", torch.ones(2)))
    with pytest.raises(InputError, match=r"log_metric\('x', ...\) got None; expected a number"):
        called(logging("log_metric", "x", None))  # TRL ends with it at the end of the step
    with pytest.raises(
        InputError, match=r"log_metric\('\{0.__class__\}\{1\}', ...\) got a value of type str; expected"
    ):
        called(logging("log_metric", "{0.__class__}{1}", "{}"))  # a name may be a completion's
    with pytest.raises(InputError, match="log_extra takes a name and what to log, the name was a value of type int"):
        called(logging("log_extra", 3, [1]))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        (True, True),
        (2, 2),
        (torch.tensor(2), 2),
        (torch.tensor(0.5), 0.5),
        ("\ud800 half a pair", "\\ud800 half a pair"),
        ("\x1b[2J\x00", "\x1b[2J\x00"),
        (2**63 - 1, 2**63 - 1),
        (10**20, "1" + "0" * 20),
        (10**5000, "<int>"),  # Python writes no such number
        ([1, "a"], "[1, 'a']"),
        (nested(100_000), "<list>"),
        (type("Hostile", (), {"__str__": lambda self: 1 / 0})(), "<Hostile>"),
    ],
    ids=lambda value: "",
)
def test_what_comes_from_a_completion_can_be_written(value, plain, tmp_path):
    assert plain_value(value) == plain and type(plain_value(value)) is type(plain)
    write_text(tmp_path / "x", as_json({"extra": plain_value(value)}))
    assert json.loads((tmp_path / "x").read_text())["extra"] == plain

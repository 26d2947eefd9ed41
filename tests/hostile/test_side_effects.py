"""What a function of the user's leaves otherwise in the process: put back, or refused, and told; and what it may do."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from faults import command, differences, in_child, result
from matplotlib.figure import Figure

from cmdp_fast import reward_functions, unchanged
from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks.judge import compare_pairs
from cmdp_fast.trainer.tasks.rewards import call_rewards, trainer_state
from cmdp_fast.trainer.tasks.step_verifiers import call_step_verifier

ROWS = [{"prompt": [{"role": "user", "content": "1"}], "answer": "1", "metadata": {"a": [1]}}] * 2


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(unchanged, "_told", set())


def called(*functions: Callable[..., Any], rows: list[dict[str, Any]] = ROWS) -> dict[str, list[float]]:
    state = trainer_state(TrainConfig(task="chain_sum"))
    named = {f"mine{i}": function for i, function in enumerate(functions)}
    return call_rewards(named, rows, ["a", "b"], [[1], [2]], state).rewards


def closes() -> None:
    sys.stdout = io.StringIO()
    sys.stdout.close()


EFFECTS: dict[str, Callable[[], object]] = {
    "the working directory": lambda: os.chdir("/"),
    "PyTorch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "PyTorch's default device": lambda: torch.set_default_device("meta"),
    "PyTorch's number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "whether PyTorch takes gradients": lambda: torch.set_grad_enabled(False),
    "whether PyTorch is deterministic": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "PyTorch's precision of float32 products": lambda: torch.set_float32_matmul_precision("medium"),
    **(
        {"PyTorch's precision of float32": lambda: setattr(torch.backends, "fp32_precision", "tf32")}
        if hasattr(torch.backends, "fp32_precision")
        else {}
    ),
    "cuDNN's settings": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "sys.stdout": closes,
    "sys.stderr": lambda: setattr(sys, "stderr", None),
    "the handler of SIGINT": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "the handler of SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
}


OF_A_THREAD = ("the handler of SIGINT", "the handler of SIGTERM", "whether PyTorch takes gradients")
OF_A_THREAD += ("PyTorch's number of threads", "PyTorch's default device")


def state() -> list[Any]:
    return [unchanged._of(setting) for setting in (*unchanged._SETTINGS, *unchanged._SIGNALS)]


@pytest.fixture
def clean() -> Iterator[None]:
    """Whatever a fault of ours leaves is put back behind the test."""
    settings = (*unchanged._SETTINGS, *unchanged._SIGNALS)
    before = state()
    yield
    for setting, value in zip(settings, before, strict=True):
        if value is not None:
            setting.put(value)


@pytest.mark.parametrize("how", ["returns", "raises", "verifier", "judge", "coroutine"])
@pytest.mark.parametrize("what", EFFECTS)
def test_settings_of_the_process(what, how, clean, caplog):
    if how == "coroutine" and what in OF_A_THREAD:
        pytest.skip("a coroutine function has a thread of its own")

    def mine(*_: Any, **__: Any) -> Any:
        EFFECTS[what]()
        if how == "raises":
            raise ValueError
        return {"verifier": True, "judge": "tie"}.get(how, [1, 2])

    async def later(**given: Any) -> Any:
        return mine(**given)

    def call() -> None:
        with pytest.raises(InputError) if how == "raises" else contextlib.nullcontext():
            if how == "verifier":
                call_step_verifier(mine, ROWS, ["a", "b"])
            elif how == "judge":
                compare_pairs(mine, ROWS, ["a", "b"], ["c", "d"])
            else:
                called(later if how == "coroutine" else mine)

    before = state()
    call()
    call()
    assert state() == before
    (told,) = [line for line in caplog.messages if "changed" in line]
    assert f" has left {what} changed: it is put back" in told


def test_a_function_that_minds_its_own_is_not_spoken_of(clean, caplog):
    def mine(**_: Any) -> Any:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.alarm(100)
            signal.alarm(0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            random.random(), np.random.rand(), torch.rand(1)
            return [1, 2]

    caplog.set_level(logging.DEBUG)
    before = state()
    assert called(mine) == {"mine0": [1.0, 2.0]}
    assert state() == before and not caplog.messages


def test_an_alarm_that_is_left_is_called_off():
    called(lambda **_: [float(signal.alarm(100)), 1])
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
    signal.setitimer(signal.ITIMER_REAL, 100)  # somebody else's
    try:
        called(lambda **_: [1, 1])
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_inference_mode_that_is_left_on_is_refused():
    def child() -> int:
        mode = torch.inference_mode()
        with pytest.raises(InputError, match=r"reward function mine0 has left torch.inference_mode on"):
            called(lambda **_: [mode.__enter__() is None, 1])
        return 0

    assert in_child(child) == 0


@pytest.mark.parametrize("ends", ["returns", "raises", "exits"])
def test_a_process_that_comes_back_is_no_second_training(ends, tmp_path):
    def mine(**_: Any) -> Any:
        if child := os.fork():
            return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 1]
        if ends == "raises":
            raise ValueError
        if ends == "exits":
            sys.exit(3)
        return [1, 1]

    def child() -> int:
        found = called(mine)
        (tmp_path / "others").open("a").write("went on\n")
        return 0 if found == {"mine0": [1.0, 1.0]} else 2

    assert in_child(child, tmp_path / "told") == 0
    assert (tmp_path / "others").read_text() == "went on\n"
    assert (tmp_path / "told").read_text().count("has forked a process that came back from it: it is ended") == 1


def test_a_process_that_ends_by_itself_is_nobody_s_business(tmp_path):
    def mine(**_: Any) -> Any:
        return [float(in_child(lambda: 7)), 1]

    assert called(mine) == {"mine0": [7.0, 1.0]}


def test_what_a_function_is_given_is_its_own():
    """Not the next function's, nor the problems'."""
    rows, before = copy.deepcopy(ROWS), copy.deepcopy(ROWS)

    def fills(prompts, completions, completion_ids, metadata, **_: Any) -> Any:
        prompts[0].append("more")
        prompts[1][0]["content"] = "other"
        completions[0][0]["content"] = "other"
        completion_ids[0].clear()
        metadata[0]["a"].append(2)
        metadata[1].clear()
        return [1, 1]

    def looks(prompts, completions, completion_ids, metadata, **_: Any) -> Any:
        assert prompts == [row["prompt"] for row in before] and metadata == [row["metadata"] for row in before]
        assert completion_ids == [[1], [2]] and completions[0][0]["content"] == "a"
        return [1, 1]

    called(fills, looks, rows=rows)
    assert rows == before


def test_rows_that_a_verifier_and_a_judge_are_given_are_their_own():
    rows, before = copy.deepcopy(ROWS), copy.deepcopy(ROWS)

    def fills(prompt, *completions, metadata, **_: Any) -> Any:
        assert prompt == before[0]["prompt"] and metadata == before[0]["metadata"]
        assert [each[0]["content"] for each in completions] in (["a"], ["a", "c"], ["c", "a"])
        prompt[0]["content"] = completions[0][0]["content"] = "other"
        metadata["a"].append(2)
        return True if len(completions) == 1 else "tie"

    call_step_verifier(fills, rows, ["a", "a"])
    assert rows == before
    compare_pairs(fills, rows, ["a", "a"], ["c", "c"])
    assert rows == before


def test_token_ids_are_copied_as_lists_of_numbers(monkeypatch):
    """There are millions of them: none is looked at."""
    seen: list[Any] = []
    copies = reward_functions.own_copy
    monkeypatch.setattr(reward_functions, "own_copy", lambda value: seen.append(value) or copies(value))
    called(lambda completion_ids, **_: [each.pop() for each in completion_ids])
    assert seen and [2] not in seen and [[1], [2]] not in seen


def test_a_column_too_deep_to_be_copied_is_passed():
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert called(lambda x, **_: [len(each) for each in x], rows=[{"prompt": "1", "x": deep}] * 2) == {"mine0": [1, 1]}


# ------------------------------------------------------------------------------------- random numbers


def draws(seed: int | None) -> Callable[..., Any]:
    """A function of random rewards, which may seed them."""

    def mine(**_: Any) -> Any:
        if seed is not None:
            torch.manual_seed(seed)
        return torch.rand(2)

    return mine


def test_a_seed_of_a_function_s_does_not_reach_the_training():
    torch.manual_seed(1)
    seen = set()
    for _ in range(3):
        called(draws(7))
        seen.add(float(torch.rand(1)))
    assert len(seen) == 3, "the training would have drawn the same each time"


def test_random_numbers_of_a_function_s_are_others_each_time():
    """Also where the training draws none between them, since a server samples."""
    torch.manual_seed(1)
    assert len({tuple(called(draws(None))["mine0"]) for _ in range(3)}) == 3


def test_a_function_that_draws_none_leaves_the_training_s():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    called(lambda **_: [random.random(), np.random.rand()])
    assert torch.equal(torch.get_rng_state(), before)


MINE = """
import os, signal, sys, torch

def clean(completions, **_):
    return [float(len(text)) for text in completions]

def dirty(completions, **_):
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("medium")
    sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.alarm(1000)
    return [float(len(text)) for text in completions]

def draws(completions, **_):
    torch.manual_seed(0)
    return [float(torch.rand(())) for text in completions]
"""


@pytest.fixture
def trained(pair, tmp_path, monkeypatch, capsys, one_thread, undrawn):
    """A run with a reward in a place of its own, and what its folder holds."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write_bytes(b"not drawn"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)

    def train(name: str, place: str, *more: str) -> dict[str, Any]:
        words = command(pair, place, rewards=f"mine.py:{name}", eval_every=0, checkpoint_every=1)
        assert main([*words, "--no-eval-before", *more]) == 0
        return result(tmp_path / place / "r")

    return train


def test_a_run_is_as_if_nothing_had_been_done(trained, tmp_path, clean, capsys):
    clean_one = trained("clean", "clean")
    capsys.readouterr()
    dirty = trained("dirty", "dirty")
    assert "student_after" in capsys.readouterr().out
    text = {name: json.loads(json.dumps(str(value)).replace("dirty", "clean")) for name, value in dirty.items()}
    assert {*differences(text, {name: str(value) for name, value in clean_one.items()})} <= {"samples.jsonl"}
    assert not os.path.exists("/dirty")


def test_a_run_with_random_rewards_goes_on_bit_for_bit(trained, tmp_path):
    whole = trained("draws", "whole")
    trained("draws", "cut", "--steps=1")
    assert main(["train", "--resume=cut/r", "--steps=2", "--rewards=mine.py:draws"]) == 0
    found = differences(result(tmp_path / "cut" / "r"), whole)
    assert not [name for name in found if not name.startswith("students")], found  # none of a last step's

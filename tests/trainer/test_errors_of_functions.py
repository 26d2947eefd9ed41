"""What functions of the user's may raise or return instead: one line that names the function and the place."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import logging
import re
import subprocess
import sys
import threading
import time

import pytest
from tiny_pair import arguments, settings

from cmdp_fast import time_limits
from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.own_code import described
from cmdp_fast.reward_functions import KEYWORDS, check_call
from cmdp_fast.time_limits import told_of
from cmdp_fast.trainer import material
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.tasks.judge import compare_pairs
from cmdp_fast.trainer.tasks.rewards import call_rewards, load_rewards, trainer_state
from cmdp_fast.trainer.tasks.step_verifiers import call_step_verifier

ROW = {"prompt": "1+2=", "answer": "3"}
FILE = """
import json, sys

def deep(text):
    return json.loads(text)

def raises(completions, **_):
    return [deep(text) for text in completions]

def leaves(completions, **_):
    sys.exit(3)

def none(completions, **_):
    pass

def number(completions, **_):
    return 3

def texts(completions, **_):
    return ["1"] * len(completions)

def short(completions, **_):
    return [1.0]

async def later(completions, **_):
    return 1.0

def forgotten(completions, **_):
    return later(completions)

def forgotten_each(completions, **_):
    return [later(completions) for _ in completions]

def generated(completions, **_):
    yield 1.0
    raise ValueError("\\ud800\\u202e\\x1b" + "x" * 1000 + "\\n2")

def narrow(completions):
    return [1.0] * len(completions)
"""
REWARDS = {
    "raises": r"raised JSONDecodeError: Expecting value: .* \({file}:5\)",
    "leaves": r"raised SystemExit: 3 \({file}:11\)",
    "none": "returned None; expected 2 numbers or None, one per completion",
    "number": "returned a value of type int; expected 2 numbers or None, one per completion",
    "texts": "returned for completion 0 a value of type str; expected 2 numbers or None, one per completion",
    "short": "returned 1 rewards for 2 completions",
    "later": "returned a value of type float; expected 2 numbers or None, one per completion",
    "forgotten": "returned a coroutine: expected it to be defined with `async def`",
    "forgotten_each": "returned coroutines; expected 2 numbers or None, one per completion",
    "generated": r"raised ValueError: \?{{3}}x{{297}}\.\.\. \({file}:36\)",
    "narrow": r"raised TypeError: narrow\(\) got an unexpected keyword argument 'answer' \({file}:38\)",
}


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", REWARDS)
def test_rewards(name, mine, pair):
    """Those that raise ended a run with a traceback; one of `sys.exit` without a word."""
    config = settings(pair, rewards=(f"{mine}:{name}",))
    functions = load_rewards(config, ROW)
    line = f"^reward function {name} " + REWARDS[name].format(file=re.escape(str(mine))) + "$"
    with pytest.raises(InputError, match=line):
        call_rewards(functions, [ROW] * 2, ["a", "b"], [[1], [2]], trainer_state(config))
    gc.collect()  # a coroutine that nobody awaits would warn now


def fails(prompt, first, second="", **_):
    return {}[0]


async def is_later(prompt, first, second="", **_):
    return True


def is_narrow(prompt):
    return True


FUNCTIONS = {
    fails: rf"raised KeyError: 0 \({re.escape(__file__)}:\d+\)",
    functools.partial(fails, note=1): rf"raised KeyError: 0 \({re.escape(__file__)}:\d+\)",
    is_later: "returned a coroutine: expected .*",
    is_narrow: rf"raised TypeError: .* \({re.escape(__file__)}:\d+\)",
    (lambda *_, **__: "maybe" * 1000): r"returned '(maybe){16}\.\.\.': expected .*",
    (lambda *_, **__: [10**5000]): "returned a value of type list: expected .*",
    (lambda *_, **__: 10**5000): "returned '<int>': expected .*",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("function", "line"), FUNCTIONS.items())
def test_step_verifiers_and_judges(function, line):
    name = getattr(function, "__name__", "fails")
    with pytest.raises(InputError, match=f"^the step verifier {name} {line}$"):
        call_step_verifier(function, [ROW], ["a"])
    with pytest.raises(InputError, match=f"^the judge {name} {line}$"):
        compare_pairs(function, [ROW], ["a"], ["b"])
    gc.collect()


def test_columns_that_have_the_name_of_an_argument_are_left_out():
    """A dataset's own `completion` is in many."""
    row = {**ROW, "completion": "c", "first": "f", "second": "s"}
    assert call_step_verifier(lambda prompt, completion, **_: completion == "a", [row], ["a"]) == [1.0]
    assert compare_pairs(lambda prompt, first, second, **_: "tie", [row], ["a"], ["b"]).tie == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def f(:\n", r"raised SyntaxError: invalid syntax \(mine.py, line 1\)"),
        ("\nmissing\n", r"raised NameError: name 'missing' is not defined \({file}:2\)"),
        ("import sys\nsys.exit(4)\n", r"raised SystemExit: 4 \({file}:2\)"),
        ("import json\njson.loads('')\n", r"raised JSONDecodeError: .* \({file}:2\)"),
    ],
)
def test_files_that_cannot_be_imported(text, line, tmp_path, pair):
    path = tmp_path / "mine.py"
    path.write_text(text)
    line = line.format(file=re.escape(str(path)))
    with pytest.raises(InputError, match=f"^--rewards {re.escape(str(path))}:f: its import {line}$"):
        load_rewards(settings(pair, rewards=(f"{path}:f",)), ROW)


def test_a_class_that_cannot_be_made(tmp_path, pair):
    path = tmp_path / "mine.py"
    path.write_text("class Kind:\n    def __init__(self):\n        raise OSError('no model')\n")
    with pytest.raises(InputError, match=rf"Kind is a class; name an object of it: it raised OSError: .*{path}:3\)$"):
        load_rewards(settings(pair, rewards=(f"{path}:Kind",)), ROW)


def test_the_place_is_the_last_line_that_was_not_installed():
    """Of code that is installed, the line in the function's own file."""
    with pytest.raises(ValueError, match="Expecting") as raised:
        json.loads("{")
    assert described(raised.value, json.loads).endswith(f"({__file__}:{raised.tb.tb_lineno})")
    raised.value.__traceback__ = raised.tb.tb_next
    inside = described(raised.value, json.loads)
    assert re.search(rf"\({re.escape(json.__file__)}:\d+\)$", inside)


def test_the_whole_traceback_is_there_for_the_asking(mine, pair, tmp_path, capsys, monkeypatch):
    command = arguments(pair, tmp_path / "runs", rewards=f"{mine}:raises")
    assert main(command) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("cmdp-fast: error: reward function raises raised JSONDecodeError")
    assert not any("Traceback" in line for line in told)
    monkeypatch.setenv("CMDP_FAST_TRACEBACK", "1")
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "in deep\n    return json.loads(text)" in told and told.splitlines()[-1].startswith("cmdp-fast: error: ")


class Heard(logging.Handler):
    """What functions that would never return wait for: that something is said of them."""

    def __init__(self) -> None:
        super().__init__()
        self.event, self.lines = threading.Event(), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.event.set()


@pytest.fixture
def heard(monkeypatch):
    handler = Heard()
    monkeypatch.setattr(time_limits, "NOTICE", 0.01)
    logging.getLogger(time_limits.__name__).addHandler(handler)
    yield handler
    logging.getLogger(time_limits.__name__).removeHandler(handler)


@pytest.mark.parametrize("form", ["plain", "generator", "coroutine that blocks", "coroutine", "verifier", "judge"])
def test_one_that_does_not_return_is_named_with_its_place(form, heard, pair):
    """A run stood still and said nothing."""

    def hangs(*_, completions=(), **__):
        assert heard.event.wait(60)
        return {"verifier": True, "judge": "tie"}.get(form, [1.0] * len(completions))

    def hangs_later(completions, **_):
        assert heard.event.wait(60)
        yield from (1.0 for _ in completions)

    async def hangs_at_once(completions, **_):
        return hangs(completions=completions)

    async def hangs_waiting(completions, **_):
        for _ in range(6000):
            if heard.event.is_set():
                break
            await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    functions = {"generator": hangs_later, "coroutine that blocks": hangs_at_once, "coroutine": hangs_waiting}
    if form == "verifier":
        assert call_step_verifier(hangs, [ROW], ["a"]) == [1.0]
    elif form == "judge":
        assert compare_pairs(hangs, [ROW], ["a"], ["b"]).tie == 1
    else:
        state = trainer_state(settings(pair))
        judged = call_rewards({"mine": functions.get(form, hangs)}, [ROW], ["a"], [[1]], state)
        assert judged.rewards == {"mine": [1.0]}
    whose = {"verifier": "the step verifier hangs", "judge": "the judge hangs"}
    what = whose.get(form, "reward function mine on 1 completion")
    assert heard.lines[0].startswith(f"{what} has not returned for 0.01 s")
    if "coroutine" not in form:  # it may not have begun, and one that waits in a loop is nowhere
        assert re.search(rf", it is at {re.escape(__file__)}:\d+$", heard.lines[0])


def test_the_place_is_that_of_the_thread_that_is_asked_about(heard):
    begun = threading.Event()

    def stands_still() -> None:
        begun.set()
        heard.event.wait(60)

    thread = threading.Thread(target=stands_still, name="theirs")
    thread.start()
    assert begun.wait(60)
    with told_of("it", "theirs"):
        thread.join()
    line = stands_still.__code__.co_firstlineno
    assert heard.lines[0] in {f"it has not returned for 0.01 s, it is at {__file__}:{line + after}" for after in (1, 2)}


def test_one_thread_watches_all_calls(monkeypatch):
    """To start one for each took more time than the calls, of which a step has hundreds."""
    monkeypatch.setattr(time_limits, "_watch", time_limits._Watch())
    before = {thread.ident for thread in threading.enumerate()}
    for _ in range(100):
        with told_of("outer"), told_of("inner"):
            pass
    new = [thread.name for thread in threading.enumerate() if thread.ident not in before]
    assert new == [time_limits.WATCH]


def test_calls_within_one_another_are_both_told_of(heard):
    with told_of("first"), told_of("second"):
        for _ in range(6000):
            if {line.partition(" ")[0] for line in heard.lines} == {"first", "second"}:
                break
            time.sleep(0.01)
        else:
            pytest.fail(f"told of {heard.lines}")


def test_a_shorter_notice_than_the_last_is_kept(heard, monkeypatch):
    """The thread sleeps until the first call is due, and is woken for one that is due earlier."""
    monkeypatch.setattr(time_limits, "_watch", time_limits._Watch())
    time_limits.NOTICE = 60.0
    with told_of("slow"):
        time.sleep(0.1)  # until it sleeps
        time_limits.NOTICE = 0.01
        with told_of("quick"):
            assert heard.event.wait(30)
    assert heard.lines[0].startswith("quick has not returned")


def test_a_call_that_has_returned_is_not_told_of(heard):
    time_limits.NOTICE = 1.0
    with told_of("quick"):
        pass
    with told_of("slow"):
        assert heard.event.wait(60)
    assert {line.partition(" ")[0] for line in heard.lines} == {"slow"}


def test_the_next_call_is_told_of_after_a_handler_raised(heard, monkeypatch):
    raised = threading.Event()

    def emit(record: logging.LogRecord) -> None:
        if not raised.is_set():
            raised.set()
            raise OSError("the log is full")
        Heard.emit(heard, record)

    monkeypatch.setattr(heard, "emit", emit)
    with told_of("first"):
        assert raised.wait(60)
    with told_of("second"):
        assert heard.event.wait(60)
    assert heard.lines[0].startswith("second has not returned for 0.01 s")


def test_a_call_is_made_where_no_thread_can_be_started(monkeypatch):
    monkeypatch.setattr(time_limits, "_watch", time_limits._Watch())
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new")))
        with told_of("it"):
            pass
    with told_of("the next"):
        assert time_limits._watch._next


FORKED = """
import logging, os, sys, time
from cmdp_fast import time_limits
time_limits.NOTICE = 0.01

class Heard(logging.Handler):
    def emit(self, record):
        os.write(1, (record.getMessage().split(",")[0] + "\\n").encode())
        told.append(record)

told = []
logging.getLogger(time_limits.__name__).addHandler(Heard())
with time_limits.told_of("parent"):
    while not told:
        time.sleep(0.001)
told.clear()
with time_limits.told_of("both"):
    child = os.fork()
    if not child:
        with time_limits.told_of("child"):
            while not told:
                time.sleep(0.001)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_calls_of_a_fork_are_told_of_too():
    """It has none of its parent's threads."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"parent has not returned for 0.01 s", "child has not returned for 0.01 s"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize(
    ("option", "function", "error"),
    [
        ("rewards", "narrow", "got an unexpected keyword argument 'note'"),
        ("rewards", "noted", "missing a required argument: 'note'"),
        ("step_verifier", "narrow", "too many positional arguments"),
        ("rollout", "missing", "has no function 'missing'"),
    ],
)
def test_a_call_that_cannot_be_is_refused_before_a_model_is_read(
    option, function, error, mine, pair, tmp_path, monkeypatch
):
    """Those to evaluate on lack a column of those to train on."""
    mine.write_text(mine.read_text() + "\ndef noted(completions, note, **_):\n    return [1.0] * len(completions)\n")
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    spec = f"{mine}:{function}"
    config = settings(pair, eval_dataset=(str(other),), **{option: (spec,) if option == "rewards" else spec})
    monkeypatch.setattr(material, "find_pair", None)
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')} {re.escape(spec)}.*{re.escape(error)}"):
        material.load(config, Report())


def test_a_function_that_empties_its_lists_changes_nobody_else_s(pair):
    def empties(prompts, completions, answer, **_):
        for each in (prompts, completions, answer):
            each.clear()
        return []

    config = settings(pair)
    functions = {"empties": empties, "exact_answer": load_rewards(config, ROW)["exact_answer"]}
    given = [ROW] * 2, ["a", "b"], [[1], [2]], trainer_state(config)
    with pytest.raises(InputError, match="reward function empties returned 0 rewards for 2 completions"):
        call_rewards(functions, *given)
    functions["empties"] = lambda **columns: empties(**columns) or [1.0] * 2
    assert call_rewards(functions, *given).rewards["exact_answer"] == [0.0, 0.0]


def test_a_wrapper_is_called_as_itself():
    """It may take more than the function that it wraps, whose signature Python would tell of it."""

    @functools.wraps(len)
    def wrapper(completions, **_):
        return [float(len(each)) for each in completions]

    check_call("wrapper", wrapper, ["answer", *KEYWORDS])

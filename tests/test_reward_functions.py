"""Reward functions of TRL's signature, called as TRL calls them: names, coroutines, results, what is logged."""

from __future__ import annotations

import asyncio
import functools
import gc
import math
import os
import subprocess
import sys
import threading
import warnings
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reward_forms import FORMS, expected, failing, failing_later, later, lengths, short

from cmdp_fast import event_loop
from cmdp_fast.errors import InputError
from cmdp_fast.reward_functions import (
    Given,
    Logged,
    Named,
    RewardError,
    call,
    columns_of,
    import_reward,
    is_async,
    name_of,
)

TEXTS = ["one", "", "three"]
GIVEN = Given(["p"] * 3, TEXTS, [[1], [], [1, 2]], {"answer": ["1", "2", "3"]}, SimpleNamespace(global_step=7))


def called(*functions: Any, given: Given = GIVEN) -> Any:
    return call([Named(name_of(function), function) for function in functions], given)


def rewards_of(*functions: Any) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in called(*functions).rewards]


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No thread of ours, and no coroutine that nobody has awaited."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [str(w.message) for w in caught if "never awaited" in str(w.message)]
    assert not [thread for thread in threading.enumerate() if thread.name == "cmdp_fast event loop"]


# ------------------------------------------------------------------------------------------------------------ the forms


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_called(form):
    function, name = FORMS[form]
    assert name_of(function) == name and is_async(function) is ("later" in form)
    outcome = called(function)
    assert rewards_of(function) == [expected(TEXTS)]
    assert outcome.logged == Logged({"longest": [5.0]}, {"text": ["<one>", "<>", "<three>"]})


def test_names_and_coroutines_are_trls():
    utils = pytest.importorskip("trl.trainer.utils", reason="needs the extra `trl`")
    functions = [function for function, _ in FORMS.values()]
    functions += [lambda **_: [], len, functools.partial(functools.partial(len)), functools.partial(FORMS["later"][0])]
    for function in functions:
        assert name_of(function) == utils.get_callable_name(function)
        assert is_async(function) is utils.is_async_callable(function)


def test_each_function_gets_everything():
    seen = []

    def spy(**given: Any) -> list[None]:
        seen.append(given)
        return [None] * 3

    called(spy)
    (given,) = seen
    assert sorted(given) == sorted(
        ["prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "answer"]
    )
    assert given["trainer_state"].global_step == 7 and given["completion_ids"] == [[1], [], [1, 2]]
    row = {"prompt": 1, "completion": 2, "completion_ids": 3, "trainer_state": 4, "log_extra": 5, "answer": 6}
    assert columns_of([row]) == {"answer": [6]}


def trls_rewards(function: Any) -> list[float]:
    """What TRL makes of a function."""
    trainer = pytest.importorskip("trl", reason="needs the extra `trl`").GRPOTrainer
    from accelerate import PartialState

    PartialState(cpu=True)  # its logger asks for one
    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        args=SimpleNamespace(report_to=[]),
        reward_funcs=[function],
        reward_func_names=[name_of(function)],
        reward_processing_classes=[None],
        state=GIVEN.trainer_state,
        environments=None,
        _log_completion_extra=lambda *_: None,
        _log_metric=lambda *_: None,
    )
    inputs = [{"prompt": "p", "answer": answer} for answer in GIVEN.columns["answer"]]
    given = (inputs, GIVEN.prompts, GIVEN.completions, GIVEN.completion_ids)
    return trainer._calculate_rewards(stand_in, *given)[:, 0].tolist()


RESULTS: dict[str, Any] = {
    "list": [1, None, 2.5],
    "tuple": (1.0, float("nan"), 3),
    "tensor": torch.tensor([1.0, 2.0, math.nan]),
    "tensor with a gradient": torch.ones(3, requires_grad=True),
    "column": torch.ones(3, 1),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "tensors": [torch.tensor(1), torch.tensor([2.0]), None],
    "bool": [True, False, None],
    "decimal": [Decimal("0.5"), 1, 2],
    "infinite": [math.inf, -math.inf, 0],
    "generator": (x for x in (1, 2, 3)),
    "nothing": None,
    "a number": 1.0,
    "0-d": torch.tensor(1.0),
    "text": "123",
    "texts": ["1", "2", "3"],
    "complex": [1j, 1, 1],
    "lists": [[1.0], [2.0], [3.0]],
    "vectors": torch.ones(3, 2),
    "huge": [10**400, 1, 1],
    "short": [1.0, 2.0],
    "long": [1.0] * 4,
}
TAKEN = [*list(RESULTS)[:11]]


@pytest.mark.parametrize("kind", RESULTS)
def test_results_are_taken_and_refused_as_trl_does(kind):
    result = list(RESULTS[kind]) if kind == "generator" else RESULTS[kind]
    ours, theirs = (lambda **_: iter(result) if kind == "generator" else result for _ in range(2))
    if kind in TAKEN:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TRL's conversion of a tensor with a gradient
            assert called(ours).rewards[0] == pytest.approx(trls_rewards(theirs), nan_ok=True)
        return
    with pytest.raises(InputError, match="reward function <lambda> returned"):
        called(ours)
    with pytest.raises((TypeError, ValueError, OverflowError, RuntimeError)):
        trls_rewards(theirs)


def test_numpy_s_are_taken():
    np = pytest.importorskip("numpy")
    objects = np.array([1.0, None, 2], dtype=object)
    for result in (np.array([1.0, 2, 3]), [np.float16(1), np.int64(2), np.bool_(True)], objects):
        ours, theirs = called(lambda result=result, **_: result), trls_rewards(lambda result=result, **_: result)
        assert ours.rewards[0] == pytest.approx(theirs, nan_ok=True)


@pytest.mark.parametrize("result", [{"a": 1, "b": 2, "c": 3}, {1.0, 2.0, 3.0}], ids=["dict", "set"])
def test_what_has_no_order_is_refused(result):
    """TRL takes the keys of a dict for the rewards."""
    with pytest.raises(
        InputError, match=f"returned a value of type {type(result).__name__}; expected 3 numbers or None"
    ):
        called(lambda **_: result)


def test_a_plain_function_that_returns_a_coroutine_is_told():
    with pytest.raises(
        InputError, match="reward function <lambda> returned a coroutine: expected it to be defined with"
    ):
        called(lambda **given: later(**given))


def test_messages_hold_no_completion():
    with pytest.raises(InputError, match="returned for completion 1 a value of type str; expected 3 numbers") as caught:
        called(lambda **_: [0.0, "hostile\n" * 1000, 0.0])
    assert "hostile" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- coroutines


def meeting(count: int) -> Any:
    """Coroutine functions that wait for each other: called in turn, the first would wait forever."""
    arrived: list[int] = []
    everyone: list[asyncio.Event] = []

    async def reward(completions: Any, **_: Any) -> list[float]:
        if not everyone:
            everyone.append(asyncio.Event())
        arrived.append(threading.get_ident())
        if len(arrived) == count:
            everyone[0].set()
        await everyone[0].wait()
        return [float(len(arrived))] * len(completions)

    return reward


def test_coroutine_functions_run_together():
    reward = meeting(3)
    assert called(reward, lengths, reward, reward).rewards[2:] == [[3.0] * 3] * 2


def test_calls_of_several_threads_run_together_and_share_the_loop():
    """A client that is kept belongs to a loop; OpenRLHF calls from a thread per completion."""
    reward, loops, results = meeting(4), [], []

    async def in_loop(**given: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return await reward(**given)

    threads = [threading.Thread(target=lambda: results.append(called(in_loop).rewards)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[[4.0] * 3]] * 4

    async def again(**_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * 3

    called(again)
    assert len(set(map(id, loops))) == 1 and not loops[0].is_running()


@pytest.mark.parametrize("form", FORMS)
def test_where_a_loop_runs_already(form):
    async def notebook() -> Any:
        return rewards_of(FORMS[form][0])

    assert asyncio.run(notebook()) == [expected(TEXTS)]


def test_an_exception_names_the_function_and_ends_the_others():
    ended = []

    async def waiting(**_: Any) -> list[float]:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)
        return []

    for function in (failing, failing_later, functools.partial(failing_later, x=1)):
        with pytest.raises(
            RewardError, match=f"reward function {name_of(function)} raised LookupError: .*no such judge"
        ) as caught:
            called(lengths, waiting, function)
        assert isinstance(caught.value.__cause__, LookupError)
    assert len(ended) == 2  # where a plain function raises, none has begun
    assert called(later).rewards[0][0] == 0.3
    gc.collect()  # a coroutine that was lost would warn now


def test_an_input_error_stays_one():
    def picky(**_: Any) -> list[float]:
        raise InputError("there is no column 'answer'")

    with pytest.raises(InputError, match=r"^reward function picky: there is no column 'answer'$"):
        called(picky)


def test_a_coroutine_function_that_exits_does_not_take_the_caller_along():
    async def leaving(**_: Any) -> list[float]:
        raise SystemExit(3)

    with pytest.raises(RewardError, match="reward function leaving raised SystemExit: 3"):
        called(leaving)
    assert called(later).rewards[0][0] == 0.3


def test_a_task_of_a_coroutine_function_that_exits_does_not_end_the_loop():
    async def leaving() -> list[float]:
        raise SystemExit(3)

    async def asking(**_: Any) -> list[float]:
        [rewards] = await asyncio.gather(leaving())
        return rewards

    with pytest.raises(RewardError, match="reward function asking raised SystemExit: 3"):
        called(asking)
    assert called(later).rewards[0][0] == 0.3


FORKING = """
import os, signal, sys, threading
from cmdp_fast import event_loop

signal.alarm(20)  # ends a process that waits for ever; a forked one has no alarm of its own

async def one():
    return 1

async def until_set():
    while not ended.is_set():
        await __import__("asyncio").sleep(0.01)

event_loop.run(one)
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    signal.alarm(10)
    assert event_loop.run(one) == 1
    sys.exit()
assert [event_loop.run(one) for _ in range(20)] == [1] * 20

ended = threading.Event()
during = threading.Thread(target=event_loop.run, args=(until_set,))
during.start()
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    signal.alarm(10)
    assert event_loop.run(one) == 1
    os._exit(0)
ended.set()
during.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_forked_process_has_a_loop_of_its_own_and_leaves_its_parents_alone():
    subprocess.run([sys.executable, "-c", FORKING], check=True, timeout=60)


def test_a_coroutine_function_that_cancels_itself_cancels_nobody_else():
    async def ending(**_: Any) -> list[float]:
        asyncio.current_task().cancel()
        await asyncio.sleep(0)
        return [0.0] * 3

    with pytest.raises(RewardError, match="reward function ending raised CancelledError"):
        called(later, ending)


def test_an_interrupt_of_the_caller_cancels_what_runs(monkeypatch):
    ended = []

    async def waiting(**_: Any) -> list[float]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(True)
            raise
        return []

    real = asyncio.run_coroutine_threadsafe

    def interrupted(coroutine: Any, loop: Any) -> Any:
        future = real(coroutine, loop)
        begun = threading.Event()
        loop.call_soon_threadsafe(lambda: loop.call_soon(begun.set))
        begun.wait()

        def result() -> None:
            raise KeyboardInterrupt

        future.result = result
        return future

    monkeypatch.setattr(event_loop.asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        called(waiting)
    assert ended == [True]
    gc.collect()


def test_a_coroutine_function_that_stops_the_loop_stops_nobody():
    async def stops(**_: Any) -> list[float]:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        return [1.0] * 3

    assert called(stops, later).rewards[0] == [1.0] * 3
    assert called(later).rewards[0][0] == 0.3


def test_a_coroutine_function_that_cancels_everybody_is_named():
    async def cancels(**_: Any) -> list[float]:
        for task in asyncio.all_tasks():
            task.cancel()
        await asyncio.sleep(0)
        return [1.0] * 3

    with pytest.raises(RewardError, match="reward function cancels cancelled tasks that are not its own"):
        called(cancels)
    assert called(later).rewards[0][0] == 0.3


LEFT_OVER = """
import asyncio, sys
from cmdp_fast import event_loop

async def swallows():
    while True:
        try:
            await asyncio.sleep(600)
        except {caught}:
            pass

async def begins():
    asyncio.ensure_future(swallows())
    await asyncio.sleep(0.01)

event_loop.PATIENCE = 0.1
event_loop.run(begins)
"""


@pytest.mark.parametrize("caught", ["asyncio.CancelledError", "BaseException"])
def test_a_task_that_catches_its_end_does_not_keep_the_process(caught):
    program = [sys.executable, "-c", LEFT_OVER.format(caught=caught)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


OPEN_GENERATOR = """
import asyncio
from cmdp_fast import event_loop

async def numbers():
    try:
        yield 1
    finally:
        await asyncio.sleep(600)

async def begins():
    kept.append(numbers())
    await kept[0].asend(None)

kept = []
event_loop.PATIENCE = 0.1
event_loop.run(begins)
"""


def test_a_generator_that_is_left_open_does_not_keep_the_process():
    done = subprocess.run([sys.executable, "-c", OPEN_GENERATOR], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_plain_code_inside_a_coroutine_cannot_wait_for_another():
    async def outer(**_: Any) -> list[float]:
        return called(later).rewards[0]

    with pytest.raises(
        RewardError, match="reward function outer raised RuntimeError: a coroutine function was called by"
    ):
        called(outer)


# --------------------------------------------------------------------------------------------------- from a file's name


def test_a_class_that_is_named_stands_for_an_object_of_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "class Reward:\n    def __call__(self, completions, **_):\n        return [1.0] * len(completions)\n"
        "class Settled(Reward):\n    def __init__(self, length):\n        pass\n"
        "class Nothing:\n    pass\n"
    )
    assert called(import_reward("--rewards", f"{path}:Reward")).rewards == [[1.0] * 3]
    with pytest.raises(InputError, match=r"--rewards .*:Settled is a class; name an object of it: .*'length'"):
        import_reward("--rewards", f"{path}:Settled")
    with pytest.raises(InputError, match="Nothing is a class without __call__"):
        import_reward("--rewards", f"{path}:Nothing")


def test_lengths_that_are_wrong_are_named():
    with pytest.raises(InputError, match="reward function short returned 1 rewards for 3 completions"):
        called(lengths, short)


def test_an_exception_whose_own_text_raises_names_the_function() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    def reward(**_: Any) -> list[float]:
        raise Mute

    with pytest.raises(RewardError, match="reward function reward raised Mute"):
        called(reward)

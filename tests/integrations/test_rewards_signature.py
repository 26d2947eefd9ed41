"""TRL's whole signature in verl's and OpenRLHF's hands: forms of functions, what they are told, what they log."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from reward_forms import FORMS, failing, failing_later, short, steps
from test_rewards import ANSWERS, COMPLETIONS, PROMPTS, verl_score

from cmdp_fast.errors import InputError
from cmdp_fast.integrations.rewards import from_verl, to_openrlhf, to_verl
from cmdp_fast.reward_functions import Given, Named, RewardError, call


def scored(score: Any, text: str, answer: Any = "7") -> Any:
    """What verl gets of a function, plain or not."""
    result = score(data_source="x", solution_str=text, ground_truth=answer, extra_info={})
    return asyncio.run(result) if inspect.iscoroutinefunction(score) else result


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_verls_hands(form) -> None:
    function, _ = FORMS[form]
    score = to_verl(function)
    assert inspect.iscoroutinefunction(score) is ("later" in form)  # which is how verl asks
    assert scored(score, "three") == {"score": 0.5, "acc": 0.5, "longest": 5.0, "text": "<three>"}
    assert scored(score, "") == {"score": 0.0, "acc": 0.0, "longest": 0.0, "text": "<>"}

    async def loop() -> Any:
        result = score("x", "one", "7")
        return await result if "later" in form else result

    assert asyncio.run(loop())["score"] == 0.3


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_openrlhfs_hands(form) -> None:
    function, name = FORMS[form]
    reward_func = to_openrlhf(function)

    def result() -> dict[str, Any]:
        return reward_func(["p: one", "p: ", "p: three"], ["p: "] * 3, ["7"] * 3)

    async def loop() -> dict[str, Any]:
        many = [asyncio.to_thread(reward_func, ["p: " + "x" * i], ["p: "], ["7"]) for i in range(8)]
        rewards = [one["rewards"].item() for one in await asyncio.gather(*many)]
        assert rewards == pytest.approx([i / 10 for i in range(8)])
        return result()

    for given in (result(), asyncio.run(loop())):
        assert given["rewards"].tolist() == pytest.approx([0.3, 0.0, 0.5])
        assert list(given["extra_logs"]) == [name, "longest"]  # texts have no place there
        assert given["extra_logs"]["longest"].tolist() == [5.0] * 3


def test_what_neither_package_tells_is_none() -> None:
    """A function that needs it raises, and is named: a reward of step 0 would be a wrong one."""
    message = "reward function steps raised AttributeError: 'NoneType' object has no attribute 'global_step'"
    with pytest.raises(RewardError, match=message):
        scored(to_verl(steps), "three")
    with pytest.raises(RewardError, match=message):
        to_openrlhf(steps)(["p: x"], ["p: "], ["7"])


@pytest.mark.parametrize("function", [failing, failing_later])
def test_a_function_that_raises_is_named(function) -> None:
    for asked in (lambda: scored(to_verl(function), "x"), lambda: to_openrlhf(function)(["p: x"], ["p: "], ["7"])):
        with pytest.raises(RewardError, match=f"reward function {function.__name__} raised LookupError: no such judge"):
            asked()


def test_results_of_the_wrong_length_are_named() -> None:
    with pytest.raises(InputError, match="reward function short returned 1 rewards for 2 completions"):
        to_openrlhf(short)(["p: x"] * 2, ["p: "] * 2, ["7"] * 2)
    with pytest.raises(InputError, match="reward function <lambda> returned 2 rewards for 1 completions"):
        scored(to_verl(lambda **_: [1.0, 2.0]), "x")


def logging(**values: Any) -> Any:
    """A reward that logs metrics of these names, the completion's own where the value is None."""

    def reward(completions: Any, log_metric: Any, **_: Any) -> list[float]:
        for name, value in values.items():
            log_metric(completions[0] if value is None else name, 1.0 if value is None else value)
        return [1.0] * len(completions)

    return reward


def test_names_that_are_the_packages_own_are_refused() -> None:
    for name in ("score", "reward", "data_source"):
        with pytest.raises(InputError, match=f"a reward function logged '{name}', which is something else in verl"):
            scored(to_verl(logging(**{name: 5.0})), "x")
    for name in ("reward", "score", "response_clip_ratio"):
        with pytest.raises(InputError, match=f"logged '{name}', which is something else in OpenRLHF"):
            to_openrlhf(logging(**{name: 5.0}))(["p: x"], ["p: "], ["7"])
    assert scored(to_verl(logging(acc=0.0)), "x") == {"score": 1.0, "acc": 0.0}  # theirs to say


def test_names_that_change_are_refused() -> None:
    """verl makes an array of each of the first completion's, and raises KeyError where another has it not."""
    score, reward_func = to_verl(logging(a=2.0, b=None)), to_openrlhf(logging(a=2.0, b=None))
    assert scored(score, "y") == {"score": 1.0, "acc": 1.0, "a": 2.0, "y": 1.0}
    assert list(reward_func(["p: y"], ["p: "], ["7"])["extra_logs"]) == ["reward", "a", "y"]
    message = r"logged \['a', 'z'\] after \['a', 'y'\]: {} takes the same names with every completion; log NaN"
    with pytest.raises(InputError, match=message.format("verl")):
        scored(score, "z")
    with pytest.raises(InputError, match=message.format("OpenRLHF")):
        reward_func(["p: z"], ["p: "], ["7"])
    quiet = to_verl(lambda completions, log_metric, **_: (completions[0] == "x" and log_metric("a", 1.0)) or [1.0])
    assert scored(quiet, "y") == 1.0
    with pytest.raises(InputError, match=r"logged \['a'\] after \[\]"):
        scored(quiet, "x")


def test_verl_gets_what_it_can_take() -> None:
    """It makes means of numbers alone, and of a name whose first value is no text: not of an unlucky mixture."""

    def reward(log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("nothing", float("nan"))
        log_metric("twice", 1)
        log_metric("twice", 2)
        log_extra("found", [4])
        log_extra("none", [None])
        return [1.0]

    extra = {"found": "4", "none": None, "nothing": None, "twice": 1.5}
    assert scored(to_verl(reward), "x") == {"score": 1.0, "acc": 1.0, **extra}
    assert list(scored(to_verl(reward), "x")) == ["score", "acc", *sorted(extra)]  # in one order in all processes


def test_verls_coroutine_functions_in_trls_hands() -> None:
    together: list[Any] = []

    async def score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> Any:
        together.append(asyncio.Event())
        if len(together) == len(COMPLETIONS):
            for event in together:
                event.set()
        await together[-1].wait()  # asked in turn, the first would wait forever
        return {"score": verl_score("openai/gsm8k", solution_str, ground_truth)}

    reward = from_verl(score)
    given = Given(PROMPTS, COMPLETIONS, None, {"answer": ANSWERS}, None)
    assert call([Named("reward", reward)], given).rewards == [[1, 0.1, 0]]
    back = to_verl(from_verl(to_verl(FORMS["later"][0])))
    assert inspect.iscoroutinefunction(back) and scored(back, "three") == 0.5


def test_verls_validation_makes_means_of_what_was_logged() -> None:
    pytest.importorskip("verl", reason="see test_verl_trainer.py")
    import numpy as np
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    def reward(completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        (text,) = completions
        log_metric("length", len(text) if text else float("nan"))
        log_extra("text", [text or None])
        log_extra("number", [len(text) if text != "two" else "2"])  # of two types
        return [1.0]

    score = to_verl(reward)
    infos = [scored(score, text) for text in ("", "two", "three")]
    columns = {key: np.array([info[key] for info in infos]).tolist() for key in infos[0]}  # as its reward loop
    metrics = process_validation_metrics(["x"] * 3, ["a problem"] * 3, columns)["x"]
    assert metrics["length"]["mean@2"] == 4.0 and metrics["acc"]["mean@3"] == 1.0
    assert set(metrics) == {"score", "acc", "length"}

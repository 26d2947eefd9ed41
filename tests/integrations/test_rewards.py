"""A reward function of each trainer's documentation, in its own trainer's hands and, adapted, in the others'."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_forms import FORMS, failing, failing_later, short, steps

from cmdp_fast.errors import InputError
from cmdp_fast.integrations.rewards import from_openrlhf, from_verl, to_openrlhf, to_verl
from cmdp_fast.reward_functions import Given, Named, RewardError, call

# ------------------------------------------------------------------ three functions, in three documentations' words


def boxed(text: str) -> str | None:
    found = re.search(r"\\boxed\{(.*?)\}", text)
    return found and found.group(1)


def trl_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float | None]:
    """https://huggingface.co/docs/trl/main/en/grpo_trainer#using-a-custom-reward-function: texts against a column."""
    return [
        None if right is None else float(boxed(text) == right) for text, right in zip(completions, answer, strict=True)
    ]


def trl_chat_reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    """The same page, for a chat: a completion is a list of one message."""
    return [float(completion[0]["content"].startswith("<think>")) for completion in completions]


def verl_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """https://verl.readthedocs.io/en/latest/preparation/reward_function.html: one solution, by its data source."""
    assert data_source == "openai/gsm8k", data_source
    return 1.0 if boxed(solution_str) == ground_truth else 0.1 * ("boxed" in solution_str)


def verl_score_of_parts(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> dict:
    """The same page: a dict with a score and what else to log."""
    return {"score": float(len(solution_str) <= extra_info["limit"]), "acc": True, "prompt": extra_info["prompt"]}


def openrlhf_reward(queries: list[str], prompts: list[str], labels: list[str], **kwargs: Any) -> dict[str, Any]:
    """https://github.com/OpenRLHF/OpenRLHF: `reward_func` of a file given as --reward.remote_url."""
    answers = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    reward = torch.tensor([float(boxed(answer) == label) for answer, label in zip(answers, labels, strict=True)])
    return {"rewards": reward, "scores": reward, "extra_logs": {"dummy_scores": reward}}


PROMPTS = ["What is 2+2? \\boxed{4}?", "What is 3+4?", "And 1+1?"]
COMPLETIONS = ["It is \\boxed{4}.", "It is \\boxed{8}.", "two"]
ANSWERS = ["4", "7", "2"]


# --------------------------------------------------------------------------------------------------- to TRL's signature


def test_verls_in_trls_hands() -> None:
    reward = from_verl(verl_score, data_source="openai/gsm8k")
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, answer=ANSWERS, completion_ids=[[1], [2], [3]]) == [
        1,
        0.1,
        0,
    ]
    chat = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    named = from_verl(verl_score, label="truth")
    assert named(prompts=PROMPTS, completions=chat, truth=ANSWERS, data_source=["openai/gsm8k"] * 3) == [1, 0.1, 0]


def test_verls_dict_and_the_other_columns() -> None:
    reward = from_verl(verl_score_of_parts)
    columns = dict(answer=ANSWERS, limit=[100, 2, 3], trainer_state=object(), completion_ids=[[1], [2], [3]])
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, **columns) == [1, 0, 1]


def test_openrlhfs_in_trls_hands() -> None:
    reward = from_openrlhf(openrlhf_reward)
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, answer=ANSWERS, completion_ids=[[1], [2], [3]]) == [1, 0, 0]
    plain = from_openrlhf(lambda queries, prompts, labels: torch.ones(len(queries), 1))  # older files return a tensor
    assert plain(prompts=PROMPTS, completions=COMPLETIONS, answer=ANSWERS) == [1, 1, 1]


# ------------------------------------------------------------------------------------------------- from TRL's signature


def test_trls_in_verls_hands() -> None:
    score = to_verl(trl_reward)
    values = [
        score(data_source="x", solution_str=text, ground_truth=answer, extra_info={"index": 3})
        for text, answer in zip(COMPLETIONS, ANSWERS, strict=True)
    ]
    assert values == [1, 0, 0] and score("x", "4", None) == 0.0  # None: no opinion
    assert to_verl(lambda **_: [float("nan")])("x", "4", None) == 0.0  # NaN is none either, as in TRL


def test_trls_chat_in_verls_hands_with_the_prompt_in_extra_info() -> None:
    seen = []

    def spy(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.append((prompts, columns))
        return trl_chat_reward(prompts, completions)

    score = to_verl(spy, conversational=True)
    assert score("src", "<think>x", "7", {"prompt": "Why?", "level": 2}, reward_router_address=None) == 1.0
    ((prompts, columns),) = seen
    assert prompts == ["Why?"] and callable(columns.pop("log_extra")) and callable(columns.pop("log_metric"))
    unknown = {"completion_ids": None, "trainer_state": None}
    assert columns == {"data_source": ["src"], "level": [2], "answer": ["7"], **unknown}


def test_trls_in_openrlhfs_hands() -> None:
    reward_func = to_openrlhf(trl_reward, special_tokens=("<s>", "</s>"))
    queries = [f"<s>{prompt}{text}</s>" for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)]
    result = reward_func(queries, PROMPTS, [*ANSWERS[:2], None], images=None)
    assert set(result) == {"rewards", "scores", "extra_logs"}
    assert torch.equal(result["rewards"], torch.tensor([1.0, 0.0, 0.0])) and result["rewards"].dtype == torch.float32
    assert torch.equal(result["extra_logs"]["trl_reward"], result["rewards"])


def test_the_prompt_is_no_part_of_the_completion_and_scores_stay_in_the_filters_range() -> None:
    seen = []

    def spy(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [5.0, -5.0, 0.5]

    queries = [prompt + text for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)]
    result = to_openrlhf(spy)(queries, PROMPTS, ANSWERS)
    assert seen == COMPLETIONS
    assert result["scores"].tolist() == [1.0, 0.0, 0.5] and result["rewards"].tolist() == [5.0, -5.0, 0.5]


# ------------------------------------------------------------------------------------------------------- there and back


def test_from_verl_to_openrlhf_and_from_openrlhf_to_verl() -> None:
    reward_func = to_openrlhf(from_verl(verl_score, data_source="openai/gsm8k"))
    queries = [prompt + text for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert torch.allclose(reward_func(queries, PROMPTS, ANSWERS)["rewards"], torch.tensor([1.0, 0.1, 0.0]))
    score = to_verl(from_openrlhf(openrlhf_reward))
    assert [score("x", text, answer) for text, answer in zip(COMPLETIONS, ANSWERS, strict=True)] == [1, 0, 0]


def test_there_and_back_is_the_same() -> None:
    columns = dict(prompts=PROMPTS, completions=COMPLETIONS, answer=ANSWERS)
    for adapted in (from_verl(to_verl(trl_reward)), from_openrlhf(to_openrlhf(trl_reward))):
        assert adapted(**columns) == trl_reward(COMPLETIONS, ANSWERS)


# ------------------------------------------------------------------------------------------------ TRL's whole signature


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


# --------------------------------------------------------------------------------------------------- our own --rewards


def test_the_command_line_takes_an_adapted_function(tmp_path) -> None:
    pytest.importorskip("tyro", reason="the extra `train`")
    from dataclasses import replace

    from cmdp_fast.trainer.settings.config import TrainConfig
    from cmdp_fast.trainer.tasks.rewards import call_rewards, load_rewards, trainer_state

    path = tmp_path / "gsm8k.py"
    path.write_text(
        "from cmdp_fast.integrations.rewards import from_verl\n"
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': float(ground_truth in solution_str and extra_info['note'] < 2)}\n"
        "reward = from_verl(score)\n"
    )
    config = replace(TrainConfig(), rewards=(f"{path}:reward",))
    rows = [{"prompt": PROMPTS[i], "answer": ANSWERS[i], "note": i} for i in range(3)]
    functions = load_rewards(config, rows[0])
    judged = call_rewards(functions, rows, ["4!", "8", "2"], [[1], [2], [3]], trainer_state(config))
    assert judged.rewards == {"reward": [1.0, 0.0, 0.0]} and judged.failed == {}


# ------------------------------------------------------------------------------------------------------------- refusals


async def coroutine(*_: Any, **__: Any) -> float:
    return 0.0


def test_openrlhf_takes_no_coroutine_function() -> None:
    for function in (coroutine, functools.partial(coroutine, 1)):
        with pytest.raises(InputError, match="coroutine is a coroutine function, expected a plain one"):
            from_openrlhf(function)


def test_what_cannot_be_used_is_named() -> None:
    with pytest.raises(InputError, match=r"no column 'answer' for the right answer, only \['level'\]"):
        from_verl(verl_score)(prompts=PROMPTS, completions=COMPLETIONS, level=[1, 2, 3])
    with pytest.raises(InputError, match="does not contain its prompt"):
        to_openrlhf(trl_reward)(["something else"], ["What?"], ["1"])
    with pytest.raises(InputError, match="prompts that are texts"):
        from_openrlhf(openrlhf_reward)(prompts=[[{"role": "user"}]], completions=["x"], answer=["y"])
    with pytest.raises(InputError, match="returned 1 rewards for 3 queries"):
        from_openrlhf(lambda *_: torch.ones(1))(prompts=PROMPTS, completions=COMPLETIONS, answer=ANSWERS)


# --------------------------------------------------------------------------------------------- the packages themselves


def test_verls_reward_manager_takes_an_adapted_function() -> None:
    pytest.importorskip("verl", reason="see test_verl_trainer.py")
    import asyncio

    import numpy as np
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

    class Letters:
        def decode(self, ids: Any, skip_special_tokens: bool) -> str:
            return "".join(map(chr, ids.tolist()))

    text = "It is \\boxed{4}."
    padding = [0, 0]
    data = DataProto.from_dict(
        tensors={
            "responses": torch.tensor([[*map(ord, text), *padding]]),
            "attention_mask": torch.tensor([[1, 1, *(1 for _ in text), *padding]]),
        },
        non_tensors={
            "data_source": np.array(["x"], dtype=object),
            "reward_model": np.array([{"ground_truth": "4"}], dtype=object),
            "extra_info": np.array([{}], dtype=object),
        },
    )
    asyncio.set_event_loop(loop := asyncio.new_event_loop())
    result = loop.run_until_complete(NaiveRewardManager(None, Letters(), to_verl(trl_reward)).run_single(data))
    assert result == {"reward_score": 1.0, "reward_extra_info": {"acc": 1.0}}
    for form, (function, _) in FORMS.items():
        result = loop.run_until_complete(NaiveRewardManager(None, Letters(), to_verl(function)).run_single(data))
        logged = {"score": 1.6, "acc": 1.6, "longest": 16.0, "text": f"<{text}>"}
        assert result == {"reward_score": 1.6, "reward_extra_info": logged}, form
    loop.close()


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


def test_verls_own_score_in_trls_hands() -> None:
    pytest.importorskip("verl", reason="see test_verl_trainer.py")
    from verl.utils.reward_score import default_compute_score

    reward = from_verl(default_compute_score, data_source="openai/gsm8k")
    assert reward(prompts=["p"] * 2, completions=["#### 4", "#### 5"], answer=["4", "4"]) == [1.0, 0.0]
    assert json.dumps(reward(prompts=["p"], completions=["#### 4"], answer=["4"])) == "[1.0]"  # plain floats


def test_verls_judges_run_no_completion(tmp_path, monkeypatch) -> None:
    """One of them evaluates what a completion says: not here, and what gives no answer costs nobody else his."""
    pytest.importorskip("verl", reason="see test_verl_trainer.py")
    from verl.utils.reward_score import default_compute_score

    monkeypatch.chdir(tmp_path)
    hostile = ["[open('made','w')]", "\\boxed{open('made','w')}", "\\boxed{9**9**9**9}"]
    completions = [*hostile, "\\boxed{4} #### 4"]
    answers = [*["\\begin{pmatrix}1\\end{pmatrix}"] * 3, "4"]
    right = {"numina_olympiads": 1.0, "openai/gsm8k": 1.0, "codecontests": 0.0, "no such source": None}
    for source, expected in right.items():
        reward = from_verl(default_compute_score, data_source=source, timeout=3.0)
        scores = reward(prompts=["p"] * 4, completions=completions, answer=answers)
        assert not any(scores[:3]) and scores[3] == expected
        assert [score is None for score in scores] == [bool(failure) for failure in reward.failures]
    assert not Path("made").exists()
    at_home = from_verl(default_compute_score, data_source="numina_olympiads", unisolated=True)
    at_home(prompts=["p"], completions=hostile[:1], answer=answers[:1])
    assert Path("made").exists()  # which is what the others could not do

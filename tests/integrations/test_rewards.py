"""A reward function of each trainer's documentation, in its own trainer's hands and, adapted, in the others'."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_forms import FORMS

from cmdp_fast.errors import InputError
from cmdp_fast.integrations.rewards import from_openrlhf, from_verl, to_openrlhf, to_verl

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

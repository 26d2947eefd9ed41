"""One reward function for several trainers: adapters between the signatures of TRL, verl and OpenRLHF.

    TRL       reward(prompts, completions, **columns) -> list[float | None]       also `cmdp-fast train --rewards`
    verl      compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | {"score": float, ...}
    OpenRLHF  reward_func(queries, prompts, labels, **kwargs) -> {"rewards": Tensor, "scores": Tensor, ...}

TRL's is the one in the middle: `from_verl` and `from_openrlhf` make it of the others, `to_verl` and `to_openrlhf` the
others of it, and `to_openrlhf(from_verl(compute_score))` goes from one to the other. With a file ``gsm8k.py`` of

    from verl.utils.reward_score import default_compute_score
    from cmdp_fast.integrations.rewards import from_verl

    reward = from_verl(default_compute_score, data_source="openai/gsm8k")

``cmdp-fast train --rewards gsm8k.py:reward`` scores as verl does. The right answer is TRL's column ``answer``, verl's
``ground_truth`` and OpenRLHF's label; ``label`` names another column. Nothing here imports any of the three packages.

An opinion that is None (TRL) becomes 0 where a number is needed; such a completion earns 0 in TRL too.

A completion is hostile input. A function of yours runs where it is called; verl's own, some of which evaluate or run
the text of a completion (``prime_math``, ``prime_code``), are asked in isolated processes, see `from_verl`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.errors import InputError
from cmdp_fast.judging.reward import JudgedReward
from cmdp_fast.messages import as_message, text_of

TRLReward = Callable[..., "Sequence[float | None]"]
VerlScore = Callable[..., "float | Mapping[str, Any]"]
OpenRLHFReward = Callable[..., "Mapping[str, Any] | Tensor"]


def from_verl(
    compute_score: VerlScore,
    *,
    label: str = "answer",
    data_source: str = "",
    timeout: float = 10.0,
    unisolated: bool = False,
) -> TRLReward:
    """A reward with TRL's signature that asks verl's ``compute_score`` for each completion.

    ``ground_truth`` is the column ``label``, ``data_source`` the column of that name or the argument, ``extra_info`` a
    dict of the row's other columns and its ``prompt``. Of a dict result the ``score`` counts.

    A function of the package verl itself is asked in a process of its own for each completion, isolated as
    `cmdp_fast.judging` says and ended after ``timeout`` seconds; the opinion is None where it raises or does
    not answer. Those that start processes or need a network (``prime_code``, ``sandbox_fusion``, verl's
    ``math_verify``) do not work there. ``unisolated=True`` asks them in this process; any other function always is.

    Raises InputError if the function is a coroutine, there is no such column, or the function cannot be isolated here.
    """
    _check_plain(compute_score)
    if isinstance(compute_score, functools.partial) and _of_verl(compute_score.func) and not unisolated:
        raise InputError("a functools.partial of verl's function cannot be isolated: give the function itself")
    module = getattr(compute_score, "__module__", None) or ""

    def requests(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[dict[str, Any]]:
        return [
            {
                "data_source": row.pop("data_source", data_source),
                "solution_str": text_of(completion),
                "ground_truth": _pop(row, label),
                "extra_info": {"prompt": prompt, **row},
            }
            for prompt, completion, row in zip(prompts, completions, _rows(columns, len(completions)), strict=True)
        ]

    if _of_verl(compute_score) and not unisolated:
        name = compute_score.__name__
        return JudgedReward(
            "verl",
            f"{module}.{name}",
            requests,
            seconds=timeout,
            isolated=True,
            arguments={"module": module, "function": name},
            insist="unisolated=True",
        )

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        results = [compute_score(**request) for request in requests(prompts, completions, **columns)]
        return [float(result["score"] if isinstance(result, Mapping) else result) for result in results]

    return reward


def to_verl(reward: TRLReward, *, label: str = "answer", conversational: bool = False) -> VerlScore:
    """verl's ``compute_score`` that asks a reward with TRL's signature about its one completion.

    Name the result in ``reward.custom_reward_function``. ``ground_truth`` becomes the column ``label``, ``data_source``
    and the entries of ``extra_info`` further columns; the prompt is ``extra_info["prompt"]``, else empty: verl does not
    pass it. ``conversational`` gives the completion as a list of one message, as TRL does for a chat. Raises InputError
    if the function is a coroutine.
    """
    _check_plain(reward)

    def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **_: Any
    ) -> float:
        row = {"data_source": data_source, **(extra_info or {}), label: ground_truth}
        prompt = row.pop("prompt", "")
        columns = {name: [value] for name, value in row.items()}
        (value,) = reward(prompts=[prompt], completions=[_completion(solution_str, conversational)], **columns)
        return 0.0 if value is None else float(value)

    return compute_score


def from_openrlhf(reward_func: OpenRLHFReward, *, label: str = "answer") -> TRLReward:
    """A reward with TRL's signature that asks OpenRLHF's ``reward_func`` about all completions at once.

    A query is the prompt's text with the completion's; the labels are the column ``label``; a result that is not a dict
    is taken for the rewards. Raises InputError if the function is a coroutine, there is no such column, a prompt is not
    a text, or there are not as many rewards as completions.
    """
    _check_plain(reward_func)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("OpenRLHF's reward functions take prompts that are texts, not lists of messages")
        labels = [_pop(row, label) for row in _rows(columns, len(completions))]
        queries = [prompt + text_of(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        result = reward_func(queries, list(prompts), labels)
        rewards = torch.as_tensor(result["rewards"] if isinstance(result, Mapping) else result).flatten().tolist()
        if len(rewards) != len(queries):
            raise InputError(f"the reward function returned {len(rewards)} rewards for {len(queries)} queries")
        return [float(value) for value in rewards]

    return reward


def to_openrlhf(
    reward: TRLReward,
    *,
    label: str = "answer",
    special_tokens: Sequence[str] = (),
    conversational: bool = False,
) -> OpenRLHFReward:
    """OpenRLHF's ``reward_func`` that asks a reward with TRL's signature; the file in ``--reward.remote_url`` has to
    call it ``reward_func``.

    The completion is the text after the prompt in the query, without the ``special_tokens`` (OpenRLHF decodes with
    them: name the end of sequence). The labels become the column ``label``. ``rewards`` is a float32 tensor [B],
    ``scores`` the same between 0 and 1 for its dynamic filter, ``extra_logs`` the reward under the function's name.
    Raises InputError if the function is a coroutine or a query does not contain its prompt.
    """
    _check_plain(reward)
    name = getattr(reward, "__name__", type(reward).__name__)

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any) -> dict[str, Any]:
        texts = [_after(prompt, query, special_tokens) for prompt, query in zip(prompts, queries, strict=True)]
        completions = [_completion(text, conversational) for text in texts]
        values = reward(prompts=list(prompts), completions=completions, **{label: list(labels)})
        rewards = torch.tensor([0.0 if value is None else float(value) for value in values])
        return {"rewards": rewards, "scores": rewards.clamp(0.0, 1.0), "extra_logs": {name: rewards}}

    return reward_func


def _of_verl(function: Callable[..., Any]) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "verl"


def _check_plain(function: Callable[..., Any]) -> None:
    if inspect.iscoroutinefunction(function):
        raise InputError(f"{getattr(function, '__name__', function)} is a coroutine function, expected a plain one")


def _rows(columns: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """The dataset's columns as a dict per completion, without the rest that TRL passes (token ids, state, loggers)."""
    named = {
        name: values
        for name, values in columns.items()
        if name != "completion_ids" and isinstance(values, list | tuple) and len(values) == size
    }
    return [{name: values[i] for name, values in named.items()} for i in range(size)]


def _pop(row: dict[str, Any], label: str) -> Any:
    if label not in row:
        raise InputError(f"there is no column {label!r} for the right answer, only {sorted(row)}; label= names another")
    return row.pop(label)


def _completion(text: str, conversational: bool) -> Any:
    return as_message(text) if conversational else text


def _after(prompt: str, query: str, special_tokens: Sequence[str]) -> str:
    """The completion in a query, which may begin with a token of the tokenizer's own."""
    start = query.find(prompt)
    if start < 0:
        raise InputError(f"the query {query[:80]!r} does not contain its prompt {prompt[:80]!r}")
    text = query[start + len(prompt) :]
    for token in special_tokens:
        text = text.replace(token, "")
    return text

"""One reward function for several trainers: adapters between the signatures of TRL, verl and OpenRLHF.

    TRL       reward(prompts, completions, ..., **columns) -> list[float | None]  also `cmdp-fast train --rewards`
    verl      compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | {"score": float, ...}
    OpenRLHF  reward_func(queries, prompts, labels, **kwargs) -> {"rewards": Tensor, "scores": Tensor, ...}

TRL's is the one in the middle: `from_verl` and `from_openrlhf` make it of the others, `to_verl` and `to_openrlhf` the
others of it, and `to_openrlhf(from_verl(compute_score))` goes from one to the other. With a file ``gsm8k.py`` of

    from verl.utils.reward_score import default_compute_score
    from cmdp_fast.integrations.rewards import from_verl

    reward = from_verl(default_compute_score, data_source="openai/gsm8k")

``cmdp-fast train --rewards gsm8k.py:reward`` scores as verl does. The right answer is TRL's column ``answer``, verl's
``ground_truth`` and OpenRLHF's label; ``label`` names another column. Nothing here imports any of the three packages.

A reward with TRL's signature has all of it (`cmdp_fast/reward_functions.py`): functions, partials and objects, plain or
coroutine functions, with `trainer_state`, `log_metric` and `log_extra`. Neither verl nor OpenRLHF tells a function how
far the training is or which tokens a completion has: `trainer_state` and `completion_ids` are None there. A function
that reads them raises. A made-up step or an empty list would give a wrong reward instead.

TRL leaves a completion on which no function has an opinion (None or NaN) out of its group's mean and deviation. verl
and OpenRLHF take a number for every completion: no opinion becomes 0, and 0 counts in both.

What a function logs goes with the completion's score. Both packages take the same names with every completion, so the
function has to log the same names in every call: NaN for a number, None for a value that there is not. Names that
change raise InputError.

A completion is hostile input. A function of yours runs where it is called; verl's own, some of which evaluate or run
the text of a completion (``prime_math``, ``prime_code``), are asked in isolated processes, see `from_verl`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.errors import InputError
from cmdp_fast.judging.reward import JudgedReward
from cmdp_fast.messages import as_message, text_of
from cmdp_fast.reward_functions import (
    Given,
    Logged,
    Named,
    Outcome,
    call,
    call_async,
    columns_of,
    concurrently,
    is_async,
    name_of,
)

TRLReward = Callable[..., Any]  # a sequence of float | None, or a coroutine of one
VerlScore = Callable[..., Any]  # a float, or a dict with a score, or a coroutine of one
OpenRLHFReward = Callable[..., "Mapping[str, Any] | Tensor"]

# In the extra information of verl and OpenRLHF these are something else than what a function logs.
OF_VERL = ("score", "reward", "uid", "data_source", "reward_model", "extra_info")
OF_OPENRLHF = ("reward", "score", "response_clip_ratio")


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
    dict of the row's other columns and its ``prompt``. Of a dict result the ``score`` counts. A coroutine function is
    asked about all completions at once, and the reward is one too.

    A function of the package verl itself is asked in a process of its own for each completion, isolated as
    `cmdp_fast.judging` says and ended after ``timeout`` seconds; the opinion is None where it raises or does
    not answer. Those that start processes or need a network (``prime_code``, ``sandbox_fusion``, verl's
    ``math_verify``) do not work there. ``unisolated=True`` asks them in this process; any other function always is.

    Raises InputError if there is no such column, or the function cannot be isolated here, as no partial and no
    coroutine function of verl's can.
    """
    if isinstance(compute_score, functools.partial) and _of_verl(compute_score.func) and not unisolated:
        raise InputError("a functools.partial of verl's function cannot be isolated: give the function itself")
    if is_async(compute_score) and _of_verl(compute_score) and not unisolated:
        raise InputError("a coroutine function of verl's cannot be isolated; unisolated=True runs it here")
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
        return _scores(compute_score(**request) for request in requests(prompts, completions, **columns))

    async def async_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        asked = [compute_score(**request) for request in requests(prompts, completions, **columns)]
        return _scores(await concurrently(asked))

    async_reward.__name__ = reward.__name__  # TRL logs under it
    return async_reward if is_async(compute_score) else reward


def to_verl(reward: TRLReward, *, label: str = "answer", conversational: bool = False) -> VerlScore:
    """verl's ``compute_score`` that asks a reward with TRL's signature about its one completion.

    Name the result in ``reward.custom_reward_function``. ``ground_truth`` becomes the column ``label``, ``data_source``
    and the entries of ``extra_info`` further columns; the prompt is ``extra_info["prompt"]``, else empty: verl does not
    pass it. ``conversational`` gives the completion as a list of one message, as TRL does for a chat.

    A coroutine function makes a coroutine function, which verl awaits in its own loop (its reward manager ``remote``
    takes none). The result is a number, which verl logs as ``acc``, or, where the function logs, a dict of ``score``,
    ``acc`` and what was logged: a metric's mean (None for NaN, which verl passes over), a column's value as text, which
    verl writes with the generations and makes no mean of. Raises, when called, what `reward_functions.call` does, and
    InputError for a name of verl's own or names that change from call to call.
    """
    named, names = Named(name_of(reward), reward), _Names("verl", OF_VERL)

    def given(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None) -> Given:
        row = {"data_source": data_source, **(extra_info or {}), label: ground_truth}
        completion = _completion(solution_str, conversational)
        return Given([row.get("prompt", "")], [completion], None, columns_of([row]), None)

    def score_of(outcome: Outcome) -> float | dict[str, Any]:
        score, logged = _numbers(outcome)[0], outcome.logged
        texts = {name: None if value is None else str(value) for row in logged.rows() for name, value in row.items()}
        numbers = {name: None if math.isnan(value) else value for name, value in _means(logged).items()}
        extra = names.checked(texts | numbers)
        return {"score": score, "acc": score, **extra} if extra else score

    def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **_: Any
    ) -> float | dict[str, Any]:
        return score_of(call([named], given(data_source, solution_str, ground_truth, extra_info)))

    async def async_compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **_: Any
    ) -> float | dict[str, Any]:
        return score_of(await call_async(named, given(data_source, solution_str, ground_truth, extra_info)))

    return async_compute_score if is_async(reward) else compute_score


def from_openrlhf(reward_func: OpenRLHFReward, *, label: str = "answer") -> TRLReward:
    """A reward with TRL's signature that asks OpenRLHF's ``reward_func`` about all completions at once.

    A query is the prompt's text with the completion's; the labels are the column ``label``; a result that is not a dict
    is taken for the rewards. Raises InputError if the function is a coroutine function (OpenRLHF takes none), there is
    no such column, a prompt is not a text, or there are not as many rewards as completions.
    """
    if is_async(reward_func):
        raise InputError(f"{name_of(reward_func)} is a coroutine function, expected a plain one, as OpenRLHF does")

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
    ``scores`` the same between 0 and 1 for its dynamic filter, ``extra_logs`` the reward under the function's name and
    the mean of each metric that it logs, [B] too. OpenRLHF has no table of completions: what ``log_extra`` gets is
    dropped.

    OpenRLHF calls the function in a thread per completion and takes no coroutine function; one is run in a loop that
    all these calls share. Raises InputError if a query does not contain its prompt, and when called what
    `reward_functions.call` does, and InputError for a name of OpenRLHF's own or names that change from call to call.
    """
    name = name_of(reward)
    names = _Names("OpenRLHF", (*OF_OPENRLHF, name))

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any) -> dict[str, Any]:
        texts = [_after(prompt, query, special_tokens) for prompt, query in zip(prompts, queries, strict=True)]
        completions = [_completion(text, conversational) for text in texts]
        given = Given(list(prompts), completions, None, {label: list(labels)}, None)
        outcome = call([Named(name, reward)], given)
        rewards = torch.tensor(_numbers(outcome), dtype=torch.float32)
        means = names.checked(_means(outcome.logged))
        logs = {metric: torch.full_like(rewards, mean) for metric, mean in means.items()}
        return {"rewards": rewards, "scores": rewards.clamp(0.0, 1.0), "extra_logs": {name: rewards, **logs}}

    return reward_func


def _of_verl(function: Callable[..., Any]) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "verl"


def _scores(results: Iterable[Any]) -> list[float | None]:
    """verl's results as numbers."""
    return [float(result["score"] if isinstance(result, Mapping) else result) for result in results]


def _numbers(outcome: Outcome) -> list[float]:
    """The one function's rewards, 0 for no opinion."""
    return [0.0 if math.isnan(value) else value for value in outcome.rewards[0]]


def _means(logged: Logged) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in logged.metrics.items()}


class _Names:
    """The names that are logged with every completion, those of the first call."""

    def __init__(self, package: str, taken: Sequence[str]) -> None:
        self.package, self.taken = package, taken
        self.names: list[str] | None = None

    def checked(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values in the order of their names. Raises InputError for names that the package cannot take."""
        names = sorted(values)
        if clash := [name for name in names if name in self.taken]:
            raise InputError(f"a reward function logged {clash[0]!r}, which is something else in {self.package}")
        self.names = names if self.names is None else self.names
        if names != self.names:
            raise InputError(
                f"a reward function logged {names} after {self.names}: {self.package} takes the same names with every "
                "completion; log NaN, or None in log_extra, where there is nothing"
            )
        return {name: values[name] for name in names}


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

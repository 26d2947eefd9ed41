"""Task rewards: functions with TRL's signature, built in or the user's own.

    reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> [float | None, ...]

`prompts` and `completions` are texts, or lists of chat messages where the dataset's prompts are; `completion_ids`
lists of token ids without padding; `columns` the other columns of the dataset but for `completion`, a value per
completion. None, and NaN, means that the function has no opinion: the rewards of those that have one are added up, and
a completion on which none has one is left out of its group's baseline (`cmdp_fast.credit.task_rewards`). A function
may be a coroutine function, a partial, an object (or its class) with `__call__`: `cmdp_fast/reward_functions.py` calls
them.

`trainer_state` is a `transformers.TrainerState` with the steps done so far as `global_step` (0 before the first step,
and where nothing is trained), `max_steps` and `epoch`. `log_metric(name, value)` adds a number to the metrics of the
step, the mean over all calls of its name; `log_extra(column, values)` adds a value per completion to the samples of an
evaluation, in their `extra`.

A completion is hostile input. Judges of other packages that parse it, math-verify and those of reasoning-gym, are asked
in processes of their own (`cmdp_fast.judging`). What runs here takes a time that grows with the length of the text, or
is given up (`data.last_group`). A function of the user's runs here too, as the user's code, in the main thread of the
training (a coroutine function in another one). What it is given is its own to change. A call that has not returned
after `--reward-timeout` ends the run with a line, to be resumed (`cmdp_fast.time_limits.told_of`). What it changes of
this process, such as the working directory, PyTorch's settings or the seed of its generators, is put back after each
call (`cmdp_fast.unchanged`), but for `random`, numpy and the environment: the place for settings of its own is the
module, as it is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cmdp_fast import reward_functions
from cmdp_fast.errors import InputError
from cmdp_fast.judging.reward import JudgedReward
from cmdp_fast.messages import as_completion, text_of
from cmdp_fast.time_limits import Limit
from cmdp_fast.unchanged import unchanged

from ..settings.config import TrainConfig, reward_name
from .data import Problem, last_group
from .hackable import colour_words, questions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState

RewardFunction = reward_functions.RewardFunction

LARGEST = torch.finfo(torch.float32).max  # of a reward
NEEDED = {  # columns, by the name of a built-in reward
    **dict.fromkeys(("exact_answer", "brevity", "math_verify"), ("answer",)),
    "reasoning_gym": ("answer", "metadata"),
    **dict.fromkeys(("colour_words", "questions"), ()),
}
BREVITY_BONUS = 0.2  # small beside the 1 of a right answer


def check_columns(config: TrainConfig, functions: dict[str, RewardFunction], rows: list[Problem], where: str) -> None:
    """Raises InputError if a reward function does not fit the problems of a set, which ``where`` names."""
    given = [*reward_functions.columns_of(rows[:1]), *reward_functions.KEYWORDS]
    for spec, function in zip(config.rewards, functions.values(), strict=True):
        if spec in NEEDED:
            _check_needed(spec, rows[0], f" in {where}")
            if NEEDED[spec] == ("answer",):  # the judges of reasoning-gym take what its tasks give
                _check_references(spec, rows, where)
        else:
            reward_functions.check_call(f"{where}: --rewards {spec}", function, given)


def _check_needed(spec: str, example: Problem, where: str = "") -> None:
    for column in NEEDED[spec]:
        if column not in example:
            raise InputError(
                f"--rewards {spec} needs the column {column!r}, there are only {', '.join(example)}{where}"
            )


def _check_references(spec: str, rows: list[Problem], where: str) -> None:
    for row in rows:
        if isinstance(row["answer"], (list, dict)):
            raise InputError(
                f"--rewards {spec} compares with a text or a number, and the column for the answer of {where} holds a "
                f"{type(row['answer']).__name__}"
            )
        if isinstance(row["answer"], float) and not (abs(row["answer"]) < 2**53 or math.isnan(row["answer"])):
            raise InputError(
                f"--rewards {spec} compares with a text or a number, and the column for the answer of {where} holds "
                f"{row['answer']:g}, of which digits may be lost: write such numbers as texts"
            )
    if all(_is_none(row["answer"]) for row in rows):
        raise InputError(f"--rewards {spec}: the column for the answer of {where} is empty in all {len(rows)} rows")


def _is_none(answer: Any) -> bool:
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


def load_rewards(config: TrainConfig, example: Problem) -> dict[str, RewardFunction]:
    """The reward functions of a configuration by the name under which they are logged."""
    pattern, seconds = re.compile(config.answer_pattern), config.judge_timeout
    built_in: dict[str, Callable[[], RewardFunction]] = {
        "exact_answer": lambda: exact_answer(pattern),
        "brevity": lambda: brevity(pattern, config.max_new_tokens),
        "math_verify": lambda: math_verify(pattern, seconds),
        "reasoning_gym": lambda: reasoning_gym_judge(pattern, seconds, isolated=not config.unisolated_judges),
        "colour_words": lambda: colour_words,
        "questions": lambda: questions,
    }
    functions: dict[str, RewardFunction] = {}
    for spec in config.rewards:
        name = reward_name(spec)
        if name in functions:
            raise InputError(f"--rewards {spec}: there is a reward {name!r} already, and metrics go by that name")
        if spec in built_in:
            _check_needed(spec, example)
            functions[spec] = built_in[spec]()
        else:
            functions[name] = reward_functions.import_reward("--rewards", spec, sorted(built_in))
    return functions


def exact_answer(pattern: re.Pattern[str]) -> RewardFunction:
    """1 if the final answer is the reference answer, character by character but for spaces at the ends; else 0. None
    where there is no reference, or NaN, as tables have it.

    A number without a fraction is itself with and without a point: a table with gaps holds 3 as 3.0.
    """

    def reward(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
        return [
            None if _is_none(expected) else float(final_answer(text_of(completion), pattern) in _texts(expected))
            for completion, expected in zip(completions, answer, strict=True)
        ]

    return reward


def _texts(expected: Any) -> set[str]:
    whole = isinstance(expected, float) and expected.is_integer()
    return {str(expected).strip(), *([str(int(expected))] if whole else [])}


def brevity(pattern: re.Pattern[str], max_new_tokens: int) -> RewardFunction:
    """0.2 (1 - tokens / max_new_tokens) for a completion that `exact_answer` accepts, else 0; None where it has none.

    A bonus to go with `exact_answer`. A wrong answer earns nothing however short, or an empty completion would be the
    easiest way to it.
    """
    right = exact_answer(pattern)

    def reward(
        completions: Sequence[Any], completion_ids: Sequence[list[int]], answer: Sequence[Any], **_: Any
    ) -> list[float | None]:
        return [
            BREVITY_BONUS * (1 - len(ids) / max_new_tokens) if is_right else is_right
            for is_right, ids in zip(right(completions=completions, answer=answer), completion_ids, strict=True)
        ]

    return reward


def math_verify(pattern: re.Pattern[str], seconds: float) -> RewardFunction:
    """1 if math-verify finds an expression in the final answer that equals the reference, else 0; None if it cannot
    read the reference, or does not say within `seconds`.

    No completion is known to run as code in it, so where it cannot be isolated it is asked with limits alone.
    """

    def requests(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[dict[str, Any]]:
        return [
            {"answer": str(expected), "given": final_answer(text_of(completion), pattern)}
            for completion, expected in zip(completions, answer, strict=True)
        ]

    return JudgedReward("math_verify", "--rewards math_verify", requests, seconds=seconds, isolated=None)


def reasoning_gym_judge(pattern: re.Pattern[str], seconds: float, isolated: bool = True) -> RewardFunction:
    """The score of the reasoning-gym task itself for the final answer, between 0 and 1; None if its judge raises or
    does not say within `seconds`.

    Many of them evaluate the answer as Python. Which one is asked stands in the row's metadata, which may come from
    somebody else's file, so all of them are isolated. Raises InputError where that cannot be, unless told not to.
    """

    def requests(
        completions: Sequence[Any], answer: Sequence[Any], metadata: Sequence[dict[str, Any]], **_: Any
    ) -> list[dict[str, Any]]:
        return [
            {"answer": expected, "given": final_answer(text_of(completion), pattern), "metadata": about}
            for completion, expected, about in zip(completions, answer, metadata, strict=True)
        ]

    option = "--rewards reasoning_gym"
    return JudgedReward(
        "reasoning_gym", option, requests, seconds=seconds, isolated=isolated, insist="--unisolated-judges"
    )


def final_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """The first group of the last match, or the whole text if the pattern is empty; None where it does not match."""
    if not pattern.pattern:
        return text.strip()
    return last_group(pattern, text)


class Judged(NamedTuple):
    """A value per completion by the function's name: ``rewards``, NaN for None, and, of functions that ask a judge
    elsewhere, ``failed``, 1 where it failed to say anything; and what the functions have logged."""

    rewards: dict[str, list[float]]
    failed: dict[str, list[float]]
    logged: reward_functions.Logged


def call_rewards(
    functions: dict[str, RewardFunction],
    rows: Sequence[Problem],
    texts: Sequence[str],
    completion_ids: list[list[int]],
    state: TrainerState,
    limit: Limit | None = None,
) -> Judged:
    """Calls each function once for all completions, and leaves the process as it was (`unchanged`).

    Raises InputError, which names the function, if one raises, has not returned at the limit, or returns anything but
    finite numbers, NaN and None.
    """
    prompts = [row["prompt"] for row in rows]
    given = reward_functions.Given(
        prompts=prompts,
        completions=[as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        completion_ids=completion_ids,
        columns=reward_functions.columns_of(rows),
        trainer_state=state,
    )
    named = [reward_functions.Named(*each) for each in functions.items()]
    try:
        with unchanged(f"reward function {', '.join(functions)}"):
            rewards, logged = reward_functions.call(named, given, limit)
    except reward_functions.RewardError as error:
        raise InputError(str(error)) from error.__cause__
    for name, values in zip(functions, rewards, strict=True):
        if (largest := max((abs(value) for value in values if not math.isnan(value)), default=0.0)) > LARGEST:
            raise InputError(
                f"reward function {name} returned a reward of size {largest:g}, infinite in float32: expected finite "
                "numbers or None"
            )
    failed = {
        name: [float(bool(failure)) for failure in function.failures]
        for name, function in functions.items()
        if type(function) is JudgedReward
    }
    return Judged(dict(zip(functions, rewards, strict=True)), failed, logged)


def limit_of(config: TrainConfig) -> Limit:
    """How long a call of a function of the user's may take."""
    return Limit(config.reward_timeout, "--reward-timeout")


def trainer_state(
    config: TrainConfig, steps_done: int = 0, problem_count: int = 0, accelerator: Accelerator | None = None
) -> TrainerState:
    """What reward functions are told of the training; ``problem_count``: those that make an epoch, 0 if not known."""
    from transformers import TrainerState

    processes = 1 if accelerator is None else accelerator.num_processes
    return TrainerState(
        global_step=steps_done,
        max_steps=config.steps,
        epoch=steps_done * config.prompts_per_step * processes / problem_count if problem_count else 0.0,
        train_batch_size=config.batch_size,
        is_world_process_zero=accelerator is None or accelerator.is_main_process,
        is_local_process_zero=accelerator is None or accelerator.is_local_main_process,
    )

"""Task rewards: functions with TRL's signature, built in or the user's own.

    reward(prompts, completions, completion_ids, **columns) -> list[float | None]

`prompts` and `completions` are texts, or lists of chat messages where the dataset's prompts are; `completion_ids`
lists of token ids without padding; `columns` the other columns of the dataset, a value a completion. None means that
the function has no opinion: such a completion earns nothing from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from .config import TrainConfig
from .data import Row, last_group
from .errors import InputError
from .imports import import_function

RewardFunction = Callable[..., Sequence["float | None"]]

BREVITY_BONUS = 0.2  # small beside the 1 of a right answer


def load_rewards(config: TrainConfig, example: Row) -> dict[str, RewardFunction]:
    """The reward functions of a configuration by the name under which they are logged."""
    pattern = re.compile(config.answer_pattern)
    built_in: dict[str, RewardFunction] = {
        "exact_answer": exact_answer(pattern),
        "brevity": brevity(pattern, config.max_new_tokens),
        "math_verify": math_verify(pattern),
        "reasoning_gym": reasoning_gym_judge(pattern),
    }
    functions = {}
    for spec in config.rewards:
        if spec in built_in:
            needed = ("answer", "metadata") if spec == "reasoning_gym" else ("answer",)
            if missing := [column for column in needed if column not in example]:
                raise InputError(
                    f"--rewards {spec} needs the column {missing[0]!r}, there are only {', '.join(example)}"
                )
            functions[spec] = built_in[spec]
        else:
            functions[spec.rpartition(":")[2]] = import_function("--rewards", spec, sorted(built_in))
    return functions


def exact_answer(pattern: re.Pattern[str]) -> RewardFunction:
    """1 if the final answer is the reference answer, character by character but for spaces at the ends; else 0."""

    def reward(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
        return [
            float(final_answer(text_of(completion), pattern) == str(expected).strip())
            for completion, expected in zip(completions, answer, strict=True)
        ]

    return reward


def brevity(pattern: re.Pattern[str], max_new_tokens: int) -> RewardFunction:
    """0.2 (1 - tokens / max_new_tokens) for a completion that `exact_answer` accepts, else 0.

    A bonus to go with `exact_answer`. A wrong answer earns nothing however short, or an empty completion would be the
    easiest way to it.
    """
    right = exact_answer(pattern)

    def reward(
        completions: Sequence[Any], completion_ids: Sequence[list[int]], answer: Sequence[Any], **_: Any
    ) -> list[float | None]:
        return [
            BREVITY_BONUS * (1 - len(ids) / max_new_tokens) if is_right else 0.0
            for is_right, ids in zip(right(completions=completions, answer=answer), completion_ids, strict=True)
        ]

    return reward


def math_verify(pattern: re.Pattern[str]) -> RewardFunction:
    """1 if math-verify finds an expression in the final answer that equals the reference, else 0; None if it cannot
    read the reference."""

    def reward(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
        from math_verify import parse, verify

        scores: list[float | None] = []
        for completion, expected in zip(completions, answer, strict=True):
            gold, given = parse(str(expected)), final_answer(text_of(completion), pattern)
            scores.append(float(given is not None and verify(gold, parse(given))) if gold else None)
        return scores

    return reward


def reasoning_gym_judge(pattern: re.Pattern[str]) -> RewardFunction:
    """What the reasoning-gym task itself says of the final answer, between 0 and 1."""

    def reward(
        completions: Sequence[Any], answer: Sequence[Any], metadata: Sequence[dict[str, Any]], **_: Any
    ) -> list[float | None]:
        from reasoning_gym import get_score_answer_fn

        scores: list[float | None] = []
        for completion, expected, about in zip(completions, answer, metadata, strict=True):
            judge = get_score_answer_fn(about["source_dataset"])
            entry = {"answer": expected, "metadata": about}
            scores.append(float(judge(final_answer(text_of(completion), pattern), entry)))
        return scores

    return reward


def final_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """The first group of the last match, or the whole text if the pattern is empty; None where it does not match."""
    if not pattern.pattern:
        return text.strip()
    return last_group(pattern, text)


def text_of(completion: Any) -> str:
    """The text of a completion, which for a chat is a list of one message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def as_completion(prompt: Any, text: str) -> Any:
    """What functions of the user's are given as the completion: a text, or for a chat a list of one message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def call_rewards(
    functions: dict[str, RewardFunction], rows: Sequence[Row], texts: Sequence[str], completion_ids: list[list[int]]
) -> dict[str, list[float]]:
    """Calls each function once for all completions. Returns a value a completion by name, NaN for None."""
    prompts = [row["prompt"] for row in rows]
    completions = [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    values = {}
    for name, function in functions.items():
        result = function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        if len(result) != len(rows):
            raise InputError(f"--rewards {name} returned {len(result)} rewards for {len(rows)} completions")
        values[name] = [math.nan if value is None else float(value) for value in result]
    return values

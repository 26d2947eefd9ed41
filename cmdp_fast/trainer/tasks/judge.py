"""A pairwise judge: the better of two completions of a prompt, asked for in both orders.

    judge(prompt, first, second, **columns) -> "first" | "second" | "tie"

Many a judge, a language model above all, favours the completion that stands first. So each pair is shown in both
orders, and only a preference that survives the exchange counts; anything else is a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cmdp_fast.errors import InputError
from cmdp_fast.imports import import_function
from cmdp_fast.messages import as_completion, text_of
from cmdp_fast.own_code import errors_named
from cmdp_fast.reward_functions import name_of, own_copy, returned
from cmdp_fast.time_limits import told_of
from cmdp_fast.unchanged import unchanged

from ..settings.config import TrainConfig
from .data import Problem
from .rewards import call_rewards, load_rewards, trainer_state
from .step_verifiers import call_step_verifier, load_step_verifier

Verdict = Literal["first", "second", "tie"]
Judge = Callable[..., Verdict]

BUILT_IN = ("programmatic",)
_EXCHANGED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}


@dataclass(frozen=True)
class Preferences:
    """How often the one was preferred to the other: rates that add up to 1, and how often the two orders disagreed."""

    win: float
    tie: float
    loss: float
    disagreement: float


def load_judge(spec: str, config: TrainConfig, example: Problem) -> Judge:
    """The judge that a name, ``module:function`` or ``path/file.py:function`` stands for. Raises InputError if none."""
    return programmatic(config, example) if spec in BUILT_IN else import_function("--judge", spec, BUILT_IN)


def programmatic(config: TrainConfig, example: Problem) -> Judge:
    """The judge that needs no model: the right answer first, then sound steps, then brevity.

    The configuration's `accuracy_reward` says whether a completion is right, its step verifier whether it is sound
    (without a verifier, and where it finds nothing to check, none is); the shorter text wins where both are equal in
    these.
    Rewards are shown the texts and no token ids.
    """
    rewards, verifier = load_rewards(config, example), load_step_verifier(config, example)

    def rank(row: Problem, completion: Any) -> tuple[bool, bool, int]:
        text = text_of(completion)
        values = call_rewards(rewards, [row], [text], [[]], trainer_state(config)).rewards
        right = values[config.accuracy_reward or next(iter(values))][0] >= config.correct_at
        sound = verifier is not None and call_step_verifier(verifier, [row], [text]) == [1.0]
        return right, sound, -len(text)

    def judge(prompt: Any, first: Any, second: Any, **columns: Any) -> Verdict:
        row = {"prompt": prompt, **columns}
        one, other = rank(row, first), rank(row, second)
        return "tie" if one == other else "first" if one > other else "second"

    return judge


def compare_pairs(judge: Judge, rows: Sequence[Problem], ours: Sequence[str], theirs: Sequence[str]) -> Preferences:
    """How often ``judge`` prefers our completion of a problem to theirs; texts, one per row each. The process is left
    as it was (`unchanged`), and the rows too: a judge has copies of their lists and dicts. It may take any time, since
    it may ask a person; the log says where it waits.

    Raises InputError, which names the judge, if it raises, or its verdict is not one.
    """
    counts = {"win": 0, "tie": 0, "loss": 0, "disagreement": 0}
    with unchanged(f"the judge {name_of(judge)}"):
        for row, our, their in zip(rows, ours, theirs, strict=True):
            prompt = row["prompt"]
            columns = {name: value for name, value in row.items() if name not in ("prompt", "first", "second")}
            our_text, their_text = as_completion(prompt, our), as_completion(prompt, their)
            straight = _asked(judge, prompt, our_text, their_text, columns)
            exchanged = _EXCHANGED[_asked(judge, prompt, their_text, our_text, columns)]
            agreed = straight if straight == exchanged else "tie"
            counts[{"first": "win", "second": "loss", "tie": "tie"}[agreed]] += 1
            counts["disagreement"] += straight != exchanged
    return Preferences(**{name: count / len(rows) for name, count in counts.items()})


def _asked(judge: Judge, prompt: Any, first: Any, second: Any, columns: dict[str, Any]) -> Verdict:
    what = f"the judge {name_of(judge)}"
    with told_of(what), errors_named(what, judge):
        verdict: Any = judge(*map(own_copy, (prompt, first, second)), **own_copy(columns))
    chosen: Any = str.__str__(verdict) if issubclass(type(verdict), str) else None  # numpy's texts, too
    if chosen not in _EXCHANGED:
        raise InputError(f"{what} returned {returned(verdict)}: expected 'first', 'second' or 'tie'")
    return chosen

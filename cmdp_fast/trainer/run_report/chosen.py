"""The samples that are shown: prompts drawn by a seed, and one completion of each by every policy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cmdp_fast.errors import InputError, readable

from .groups import Group
from .runs import Run
from .samples import Policy, Sample, read_samples

MOST_SHOWN = 1000  # completions on a page


@dataclass(frozen=True)
class Voice:
    """A column: a policy in a run. `method` is the number of its method, None for the student before."""

    name: str
    run: Run
    who: str
    method: int | None

    @property
    def policy(self) -> Policy:
        return self.run.samples[self.who]


@dataclass(frozen=True)
class Chosen:
    """Samples by prompt, one of each voice, and how they were drawn: out of `among` prompts, by `seed`."""

    voices: tuple[Voice, ...]
    rows: tuple[tuple[Sample, ...], ...]
    among: int
    with_costs: bool
    """Whether only prompts were drawn from of which the costs of tokens were kept."""
    seed: int


def choose(groups: Sequence[Group], count: int, seed: int) -> Chosen:
    """``count`` prompts, or all, of those that every voice has a completion of, in the order of the first voice's file.

    If the costs of tokens were kept, for a part of the prompts, it is one of that part. Raises InputError if the voices
    have no prompt in common, or more completions than `MOST_SHOWN` would be shown.
    """
    voices = _voices(groups)
    if not voices:
        return Chosen((), (), 0, False, seed)
    common = [key for key in voices[0].policy.first if all(key in voice.policy.first for voice in voices)]
    if not common:
        names = readable("; ".join(f"{voice.name} ({voice.run.folder})" for voice in voices), 600)
        raise InputError(f"no prompt has completions of all of these, which a page could compare: {names}")
    telling = [voice.policy.with_costs for voice in voices if voice.policy.with_costs]
    told = [key for key in common if telling and all(key in keys for keys in telling)]
    among = told or common
    drawn = sorted(random.Random(seed).sample(range(len(among)), min(count, len(among))))
    if len(drawn) * len(voices) > MOST_SHOWN:
        shown = f"{len(drawn)} prompts with {len(voices)} completions each"
        raise InputError(f"{shown} are more than the {MOST_SHOWN:,} of a page: fewer --prompts, or fewer runs")
    columns = [
        read_samples(voice.run.folder / "samples.jsonl", [voice.policy.first[among[place]] for place in drawn])
        for voice in voices
    ]
    return Chosen(tuple(voices), tuple(zip(*columns, strict=True)), len(among), bool(told), seed)


def budget_of(sample: Sample, run: Run) -> float | None:
    """The nats that a completion may spend; None where its teacher may have a budget of its own."""
    if run.settings["teacher_budgets"]:
        return None
    return run.budget * sample.length if run.per_token else run.budget


def _voices(groups: Sequence[Group]) -> list[Voice]:
    before = next(filter(None, (group.sampled("student_before") for group in groups)), None)
    voices = [Voice("before", before, "student_before", None)] if before else []
    for number, group in enumerate(groups):
        if (run := group.sampled("student_after")) is not None:
            voices.append(Voice(group.label, run, "student_after", number))
    return voices

"""The samples in a run's `samples.jsonl`: what each holds, and where those stand that a page may show.

A file of samples may be large, so it is read twice. The first time every line is checked, and what is kept of it is
its reward and where the first completion of each prompt begins. The second time the chosen lines are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cmdp_fast.errors import shown

from .reading import LONGEST_LINE, Place, as_json_text, as_number, number, of_type, opened, table, tables

MOST_TOKENS, MOST_CHARACTERS = 1000, 4000  # that are kept, and shown, of a completion; the latter also of a prompt
MOST_MESSAGES, LONGEST_ROLE = 100, 60  # of a prompt
WHO = ("teacher", "student_before", "student_after")


class Part(NamedTuple):
    """The beginning of a text, and how many characters stand behind it."""

    text: str
    left_out: int


class Message(NamedTuple):
    """A message of a prompt; a prompt that is a text is one, without a role."""

    role: str
    text: Part


class Token(NamedTuple):
    """A token's text and its cost in nats; None: not a finite number."""

    text: str
    cost: float | None


@dataclass(frozen=True)
class Sample:
    """A completion, and what was measured of it. Costs are in nats; None: no teacher was asked, or nobody judged."""

    prompt: tuple[Message, ...]
    more_messages: int
    """Behind those of `prompt`."""
    completion: Part
    reward: float | None
    length: int
    finished: bool
    cumulative: float | None
    feasible: bool | None
    certified: bool | None
    """Of a teacher that gives bounds alone, whose costs here are the lower ones: whether the upper ones keep the budget
    too; None where costs are exact."""
    tokens: tuple[Token, ...] | None
    """The first ones; None where their costs were not kept."""
    more_tokens: int
    """Behind those of `tokens`."""
    crossing: int | None
    """The first token with which the budget is exceeded."""
    misspelt: bool
    """Whether there are tokens that do not spell the completion: they are not shown."""


@dataclass
class Policy:
    """The samples of one policy: the mean of its rewards, and where each prompt's first completion begins."""

    total: float = 0.0
    judged: int = 0
    first: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """(byte, line) by prompt."""
    with_costs: set[bytes] = field(default_factory=set)

    @property
    def reward(self) -> float | None:
        """The mean over completions on which a reward had an opinion."""
        return self.total / self.judged if self.judged else None


def index_of(path: Path) -> dict[str, Policy]:
    """The samples of a file by policy. Raises InputError for a line that is no sample."""
    policies: dict[str, Policy] = {}
    for place, start, values in tables(path):
        who, sample = of_type(values, "who", str, place), sample_of(values, place)
        if who not in WHO:
            raise place.wrong(f"who is {shown(who)}, expected one of {', '.join(WHO)}")
        policy = policies.setdefault(who, Policy())
        if sample.reward is not None:
            policy.total += sample.reward
            policy.judged += 1
        key = _key(values["prompt"], place)
        if key not in policy.first:
            policy.first[key] = (start, place.line)
            if sample.tokens is not None:
                policy.with_costs.add(key)
    return policies


def read_samples(path: Path, places: Iterable[tuple[int, int]]) -> list[Sample]:
    """The samples that begin at these places of a file."""
    found = []
    with opened(path) as file:
        for start, line in places:
            file.seek(start)
            place = Place(path, line)
            found.append(sample_of(table(file.readline(LONGEST_LINE + 1), place), place))
    return found


def sample_of(values: dict[str, Any], place: Place) -> Sample:
    """The sample in a line. Raises InputError if there is none."""
    completion = of_type(values, "completion", str, place)
    tokens = _tokens(values, place)
    spelt = tokens is None or "".join(token.text for token in tokens) == completion
    first = _first(tokens) if tokens is not None and spelt else None
    prompt, more_messages = _prompt(values, place)
    crossing = of_type(values, "crossing", int, place, None)
    if crossing is not None and not 0 <= crossing < len(tokens or ()):
        raise place.wrong(f"crossing is {crossing}, expected one of the {len(tokens or ())} tokens")
    length = of_type(values, "length", int, place)
    if not 0 <= length < 1 << 53:
        raise place.wrong(f"length is {shown(length)}, expected a number of tokens")
    return Sample(
        prompt=prompt,
        more_messages=more_messages,
        completion=_part(completion, MOST_CHARACTERS),
        reward=number(values, "reward", place),
        length=length,
        finished=of_type(values, "finished", bool, place),
        cumulative=number(values, "cumulative", place),
        feasible=of_type(values, "feasible", bool, place, None),
        certified=of_type(values, "certified", bool, place, None),
        tokens=None if first is None else tuple(first),
        more_tokens=len(tokens or ()) - len(first or ()),
        crossing=crossing if spelt else None,
        misspelt=not spelt,
    )


def _tokens(values: dict[str, Any], place: Place) -> tuple[Token, ...] | None:
    texts = of_type(values, "tokens", list, place, None)
    costs = of_type(values, "costs", list, place, None)
    if texts is None and costs is None:
        return None
    if texts is None or costs is None or len(texts) != len(costs):
        counts = " and ".join("none" if some is None else str(len(some)) for some in (texts, costs))
        raise place.wrong(f"tokens and costs are {counts}, expected as many of both")
    for text in texts:
        if type(text) is not str:
            raise place.wrong(f"a token is {shown(text)}, expected text")
    return tuple(Token(text, as_number(cost, "a cost", place)) for text, cost in zip(texts, costs, strict=True))


def _first(tokens: Sequence[Token]) -> list[Token]:
    """The first tokens that have so many characters at most, of which the last one may be cut."""
    found, left = list[Token](), MOST_CHARACTERS
    for token in tokens[:MOST_TOKENS]:
        if left == 0:
            break
        found.append(Token(token.text[:left], token.cost))
        left -= len(found[-1].text)
    return found


def _part(text: str, most: int) -> Part:
    return Part(text[:most], max(0, len(text) - most))


def _prompt(values: dict[str, Any], place: Place) -> tuple[tuple[Message, ...], int]:
    """Its first messages, and how many there are behind them."""
    prompt = values.get("prompt")
    if type(prompt) is str:
        return (Message("", _part(prompt, MOST_CHARACTERS)),), 0
    if type(prompt) is not list or not all(type(message) is dict for message in prompt):
        raise place.wrong(f"prompt is {shown(prompt)}, expected text or a list of messages")
    messages, left = list[Message](), MOST_CHARACTERS
    for message in prompt:
        role, text = of_type(message, "role", str, place, ""), _content(message, place)
        if len(messages) < MOST_MESSAGES:
            messages.append(Message(role[:LONGEST_ROLE], _part(text, left)))
            left -= len(messages[-1].text.text)
    return tuple(messages), max(0, len(prompt) - MOST_MESSAGES)


def _content(message: dict[str, Any], place: Place) -> str:
    """The text of a message, that of its parts, or what it holds instead as JSON."""
    content = message.get("content")
    parts = content if type(content) is list else [content]
    texts = [part.get("text") if type(part) is dict else part for part in parts]
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    known = [text for text in texts if isinstance(text, str)]
    if len(known) == len(texts) and not rest:
        return "".join(known)
    return as_json_text({**({"content": content} if content is not None else {}), **rest}, place)


def _key(prompt: Any, place: Place) -> bytes:
    return hashlib.sha256(as_json_text(prompt, place).encode("utf-8", "surrogatepass")).digest()[:16]

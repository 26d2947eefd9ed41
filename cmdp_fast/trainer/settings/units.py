"""What stands behind an option on the command line, and the unit of its number: ``Annotated[float, NATS]`` beside the
field."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """``given``: the word for what is given, as help shows it. ``one`` and ``many``: the unit of a number; empty for a
    text, and for a number that has none."""

    given: str
    one: str = ""
    many: str = ""

    def of(self, number: float) -> str:
        """A number with its unit."""
        unit = self.one if number == 1 else self.many
        return f"{_short(number)}{unit and f' {unit}'}"


def _short(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


NATS = Unit("NATS", "nat", "nats")
NATS_PER_TOKEN = Unit("NATS", "nat per token", "nats per token")
STEPS = Unit("STEPS", "step", "steps")
TOKENS = Unit("TOKENS", "token", "tokens")
PROMPTS = Unit("PROMPTS", "prompt", "prompts")
PROBLEMS = Unit("PROBLEMS", "problem", "problems")
COMPLETIONS = Unit("COMPLETIONS", "completion", "completions")
ROWS = Unit("ROWS", "row", "rows")
PASSES = Unit("PASSES", "pass", "passes")
SECONDS = Unit("SECONDS", "second", "seconds")
MIB = Unit("MIB", "MiB", "MiB")
CHECKPOINTS = Unit("CHECKPOINTS", "checkpoint", "checkpoints")
PROCESSES = Unit("PROCESSES", "process", "processes")
RUNS = Unit("RUNS", "run", "runs")
LOGPROBS = Unit("N", "log-probability", "log-probabilities")
REWARD = Unit("REWARD", "in the reward's own unit", "in the reward's own unit")
REWARDS = Unit("REWARD", "reward unit", "reward units")  # what `reward_unit` says
PRICE = Unit("PRICE", "reward unit per nat", "reward units per nat")
GAINS = Unit("P I D", "", "reward units per nat of cost, and per nat of its excess")
FRACTION = Unit("FRACTION")
NUMBER = Unit("X")
WHOLE = Unit("N")

MODEL = Unit("MODEL")
FOLDER = Unit("FOLDER")
FILE = Unit("FILE")
COLUMN = Unit("COLUMN")
NAME = Unit("NAME")
PATTERN = Unit("PATTERN")
METHOD = Unit("METHOD")
FUNCTION = Unit("FUNCTION")
RUN = Unit("RUN")
ADDRESS = Unit("ADDRESS")
DATA = Unit("DATA")
NAMED_NATS = Unit("NAME=NATS", "", "nats each")

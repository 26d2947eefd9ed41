"""What is learned from the completions of a step, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from ..methods import METHODS
from .ranges import ABOVE_0_UP_TO_1, FROM_0_TO_1, POSITIVE
from .units import COMPLETIONS, FRACTION, NUMBER, PASSES, STEPS

if TYPE_CHECKING:
    Algorithm = str  # a type checker reads no choices out of a table
else:
    Algorithm = Literal[tuple(METHODS)]


@dataclass(frozen=True)
class StepSettings:
    """What is learned from the completions of a step, and how often."""

    algorithm: Algorithm = "ppo"
    """ppo: the modified reward, by policy gradient and through the divergence; kl_loss: the task's reward, with k3 in
    the loss. The others distil without a reward: gkd by a divergence on the student's own text, minillm by the policy
    gradient of reverse KL, sft and kd on the teacher's text by likelihood and by forward KL."""
    steps: Annotated[int, POSITIVE, STEPS] = 200
    """How many times to roll out and update."""
    baseline: Literal["rloo", "grpo", "position_rloo", "gae"] = "rloo"
    """The comparison that an action's advantage comes from: with the mean return of the group's other completions
    (`rloo`; `position_rloo` compares the returns-to-go at each position), or of the whole group and in units of its
    deviation (`grpo`, whose divisor the direct term shares), or with the prediction of a value head (`gae`)."""
    gae_lambda: Annotated[float, FROM_0_TO_1, FRACTION] = 1.0
    """Lambda of generalised advantage estimation: 1 trusts the returns, 0 the value head. A reward reaches a token that
    is n tokens before it times lambda to the n: with 0.95, and 1000 tokens, as 6e-23 of itself."""
    bootstrap_truncated: bool = False
    """Whether the value head says what was still to come where `max_new_tokens` cut a completion off. If not, nothing
    was, as in TRL, verl and OpenRLHF: rewards, costs, budgets and evaluations end there, and no return ever corrects
    what the head says of the rest. With it for a limit that there is in training alone."""
    value_learning_rate: Annotated[float, POSITIVE, NUMBER] = 1e-3
    """Learning rate of the value head, a linear layer on the student's hidden states (which it does not change)."""
    gamma: Annotated[float, ABOVE_0_UP_TO_1, FRACTION] = 1.0
    """Discount of the modified reward."""
    epochs: Annotated[int, POSITIVE, PASSES] = 2
    """PPO passes over the completions of a step."""
    minibatch_size: Annotated[int, POSITIVE, COMPLETIONS] = 32
    """Completions per optimizer step, of each process; the most where it does not divide their number, which is then
    split as equally as can be."""
    clip_low: Annotated[float, POSITIVE, NUMBER] = 0.2
    """PPO's clip below 1."""
    clip_high: Annotated[float, POSITIVE, NUMBER] = 0.2
    """PPO's clip above 1."""

"""Rewards of a completion, and the judges that are asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .ranges import POSITIVE
from .units import FUNCTION, NAME, NUMBER, PATTERN, REWARD, SECONDS


@dataclass(frozen=True)
class RewardSettings:
    """Rewards of a completion, and the judges that are asked."""

    rewards: Annotated[tuple[str, ...], FUNCTION] = ("exact_answer",)
    """What a completion earns, by name, or your `module:function` or `path/file.py:function`. There are `exact_answer`,
    `math_verify`, `reasoning_gym` (the task's own judge), `brevity` (a small bonus for short right answers),
    `colour_words` and `questions`. Several are added up. A completion on which none has an opinion (None
    or NaN) is left out of its group's baseline, and only the constraint acts on it."""
    reward_weights: Annotated[tuple[float, ...], NUMBER] = ()
    """The weight of each reward in the sum, in the order of `rewards`. Empty: 1 each. A reward of weight 0 is logged,
    and is no opinion on a completion."""
    accuracy_reward: Annotated[str, NAME] = ""
    """The one reward, by its name, that says whether a completion is right: see `correct_at`. Its weight has no part in
    that. Empty: the first of `rewards`."""
    answer_pattern: Annotated[str, PATTERN] = ""
    """Regular expression whose first group is the final answer; the last match in the completion counts. Empty: the
    whole completion is the answer, in which `math_verify` looks for one: it takes a sum that is only repeated for its
    result."""
    judge_timeout: Annotated[float, POSITIVE, SECONDS] = 3.0
    """Seconds that `math_verify` or `reasoning_gym` may take per completion. One that takes longer has no reward from
    it, as where the judge raises or dies: counted as `rewards/…/failed`."""
    reward_timeout: Annotated[float, POSITIVE, SECONDS] = 1500.0
    """Seconds that a call of your own function in `rewards` or `step_verifier` may take. A reward function is called
    with all completions of a step, or with as many of an evaluation's. One that takes longer ends the run with a line
    that says where it is; the run can be resumed, with another limit too."""
    unisolated_judges: bool = False
    """Run the judges of `reasoning_gym` where they cannot be isolated (they are on Linux, with Landlock and
    libseccomp). Many of them evaluate an answer as Python, so a completion can then do all that you can."""
    correct_at: Annotated[float, REWARD] = 1.0
    """A completion counts as right in `accuracy` when its `accuracy_reward` is at least this; not where that has no
    opinion."""
    step_verifier: Annotated[str, FUNCTION] = ""
    """The checker of a solution's steps, for `reasoning_success`: `arithmetic_chain` (the built-in models' sums),
    `equations` (every equation between numbers in free text), or your function as for `rewards`. Empty: nothing."""

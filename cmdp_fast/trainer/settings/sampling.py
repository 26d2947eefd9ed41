"""What is sampled in a step, and what samples it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .ranges import ABOVE_0_UP_TO_1, AT_LEAST_1, FROM_0_BELOW_1, NOT_NEGATIVE, POSITIVE, TEMPERATURE, TEMPERATURE_OR_0
from .units import COMPLETIONS, FRACTION, FUNCTION, NUMBER, PROMPTS, TOKENS


@dataclass(frozen=True)
class SamplingSettings:
    """What is sampled in a step, and what samples it."""

    prompts_per_step: Annotated[int, POSITIVE, PROMPTS] = 16
    """Prompts rolled out per step, by each process."""
    num_generations: Annotated[int, COMPLETIONS] = 8
    """Completions per prompt: the group whose members are compared with one another."""
    max_new_tokens: Annotated[int, POSITIVE, TOKENS] = 256
    """Longest completion. The end-of-sequence token counts; one without it is counted as clipped."""
    temperature: Annotated[float, TEMPERATURE, NUMBER] = 1.0
    """Temperature of the policy that is sampled, trained, measured and evaluated; the teacher has the same, if it has
    none of its own (`teacher_temperature`)."""
    teacher_temperature: Annotated[float, TEMPERATURE_OR_0, NUMBER] = 0.0
    """Temperature of the teacher, as it is compared with in costs and losses, sampled and evaluated. 0: the student's.
    At a `temperature` of 0.7 the cost is KL(student at 0.7 ‖ teacher at 0.7); with 1 here KL(student at 0.7 ‖ teacher
    at 1)."""
    top_k: Annotated[int, NOT_NEGATIVE, TOKENS] = 0
    """Sample from the so many most likely tokens. 0: from all. Anything but the whole softmax is sampled off-policy."""
    top_p: Annotated[float, ABOVE_0_UP_TO_1, FRACTION] = 1.0
    """Sample from the most likely tokens of this total probability. The same warning holds."""
    teacher_mix: Annotated[float, FROM_0_BELOW_1, FRACTION] = 0.2
    """Share of the teacher in the policy that minillm samples from."""
    rollout: Annotated[str, FUNCTION] = ""
    """What samples instead of `generate`: `vllm`, or a function of yours, as `module:function` or
    `path/file.py:function`; see user_rollout.py. Its log-probabilities say how far it is from the student, for which
    there is a correction."""
    sampler_correction: Literal["auto", "token", "sequence", "off"] = "auto"
    """The importance weights of completions that another sampler than the student has drawn, by the log-probabilities
    that it reports (cmdp_fast/sampler_correction.py). token: a weight of each token, in the policy gradient alone;
    sequence: one of each completion, in all of the gradient, exact and noisier with the length. Both weigh the
    estimates of the budget, `cmdp/…` and the cost that `pid` sees, by completions. auto: token where the sampler
    reports log-probabilities. off: what it draws is taken for the student's."""
    sampler_clip: Annotated[float, AT_LEAST_1, NUMBER] = 2.0
    """The largest of these weights: a larger one is truncated to it."""
    rollout_batch_size: Annotated[int, NOT_NEGATIVE, PROMPTS] = 0
    """Prompts that are sampled at once, sorted by length. 0: all of a step."""

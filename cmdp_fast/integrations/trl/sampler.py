"""Completions that vLLM has drawn for the student, by TRL's settings of their importance sampling.

TRL multiplies each token's term of its loss by a weight, `importance_sampling_ratio` of its batch. What TRL does not
have is weighed here: the direct term, and estimates for the student.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from torch import Tensor

from cmdp_fast import objective

OURS = ("sampling/importance_sampling_ratio/clipped_ratio", "sampling/effective_sample_ratio")
"""The names of `objective.sampler_metrics` that TRL does not log itself."""


class Drawn(NamedTuple):
    """What of some completions depends on their sampler."""

    log_ratio: Tensor  # [B, T] of `objective.sampler_log_ratio`
    mode: Literal["token", "sequence"]
    clip: float

    def weight(self, mask: Tensor) -> Tensor:
        """`objective.estimate_weight` [B]. In TRL's ``*_mask`` modes as well: leaving a completion out of an estimate
        biases it more than truncating its weight does."""
        return objective.estimate_weight(self.log_ratio, mask=mask, clip=self.clip)

    def metrics(self, mask: Tensor) -> dict[str, Tensor]:
        """The figures of `OURS`."""
        found = objective.sampler_metrics(self.log_ratio, mask=mask, mode=self.mode, clip=self.clip)
        return {name: found[name] for name in OURS}


def drawn(args: Any, batch: dict[str, Any], logprob: Tensor, mask: Tensor) -> Drawn | None:
    """That of TRL's ``batch``, whose tokens have this ``logprob`` for the student; None where it has drawn them itself
    or TRL's correction is off.

    A bound that only keeps weights from being too small (``vllm_importance_sampling_clip_min``) truncates none here.
    """
    if "importance_sampling_ratio" not in batch:
        return None
    ratio = objective.sampler_log_ratio(logprob, batch["sampling_per_token_logps"], mask=mask)
    most = args.vllm_importance_sampling_clip_max
    return Drawn(ratio, mode_of(args), math.inf if most is None else float(most))


def mode_of(args: Any) -> Literal["token", "sequence"]:
    """Whether TRL's weights are those of tokens or of completions."""
    return "sequence" if args.vllm_importance_sampling_mode.startswith("sequence") else "token"


def weighed(direct: Tensor, args: Any, batch: dict[str, Any]) -> Tensor:
    """The weights [B, T] of the direct term times those that TRL gives to completions; those of tokens are of the score
    term alone (`cmdp_fast.sampler_correction`)."""
    if "importance_sampling_ratio" not in batch or mode_of(args) == "token":
        return direct
    return direct * batch["importance_sampling_ratio"]

"""The correction of a step for completions that another sampler than the student has drawn, as the settings ask for it;
its mathematics are those of `cmdp_fast.sampler_correction`."""

from __future__ import annotations

import torch
from torch import Tensor

from cmdp_fast import objective
from cmdp_fast.errors import InputError

from .rollout import Rollout
from .settings.config import TrainConfig


def check_reported(rollout: Rollout, config: TrainConfig) -> None:
    """Raises InputError for a sampler without log-probabilities where the settings ask for weights made of them."""
    asked = config.sampler_correction
    if rollout.sampler_logprob is None and asked in ("token", "sequence") and config.has_sampler:
        raise InputError(
            f"--sampler-correction {asked} needs the log-probabilities of the sampler, but --rollout {config.rollout} "
            "returned completions without logprobs"
        )


def log_ratio(logprob: Tensor, rollout: Rollout) -> Tensor | None:
    """log pi/mu [B, T] of the student, with the ``logprob`` that it had when it was scored, and of what has drawn the
    completions; None if that is the student, or says nothing."""
    drawn = rollout.sampler_logprob
    return None if drawn is None else objective.sampler_log_ratio(logprob, drawn, mask=rollout.mask)


def weighed(targets: dict[str, Tensor], ratio: Tensor | None, config: TrainConfig) -> dict[str, Tensor]:
    """The ``targets`` of a loss by the weights of their completions: ``advantage``, and with weights of whole
    completions ``direct`` as well, the weights of what is a function of the state."""
    if ratio is None or config.correction is None:
        return targets
    weight = objective.sampler_weight(ratio, config.correction, clip=config.sampler_clip)
    names = ("advantage", "direct") if config.correction == "sequence" else ("advantage",)
    return targets | {name: torch.where(weight != 0, weight * targets[name], 0.0) for name in names if name in targets}


def estimate_weight(ratio: Tensor | None, config: TrainConfig) -> Tensor | None:
    """The weight [B] of each completion, of all processes, in an estimate for the student; None: all the same.

    Raises InputError where the student excludes every completion, from which nothing follows for it.
    """
    if ratio is None or config.correction is None:
        return None
    if bool(torch.isneginf(ratio).any(1).all()):
        raise InputError(
            f"none of the {len(ratio)} completions that --rollout {config.rollout} drew is possible for the student: "
            "each has a token that it excludes; expected completions of the student as it is"
        )
    return objective.estimate_weight(ratio, clip=config.sampler_clip)

"""The place of the constraint in verl's configuration, and the other settings there that have to agree with it.

`algorithm.cmdp` is a new section; workers see the actor's section alone, so `actor_rollout_ref.actor.policy_loss`
refers to it, in a dataclass of ours that hydra makes because ``_target_`` names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import PolicyLossConfig

from cmdp_fast.constraint import Constraint
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.constraint import SAMPLED_COSTS, constraint_from_settings
from cmdp_fast.objective import PIDController

TOPK_LOSS, SAMPLED_LOSS = "cmdp", "cmdp_sampled"
CONSTANT_NORMALIZERS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm")
CORRECTION = ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize", "rollout_rs", "rollout_rs_threshold")


@dataclass
class PolicyLoss(PolicyLossConfig):
    """verl's section `policy_loss` with the constraint's settings beside its own."""

    cmdp: dict[str, Any] = field(default_factory=dict)


def constraint_of(section: Mapping[str, Any] | None, where: str) -> Constraint:
    """The constraint that the entry ``cmdp`` of a section states; costs are those that verl can carry.

    Raises InputError for ``reverse_kl`` (verl's teacher sends its own k tokens, whose masses give forward KL) too.
    """
    settings = (None if section is None else section.get("cmdp")) or {}
    ours = {name: value for name, value in settings.items() if name != "pid_gains"}
    constraint = constraint_from_settings(ours, f"{where}.cmdp", keeps_multiplier=True)
    if constraint.cost == "reverse_kl":
        raise InputError(f"{where}.cmdp.cost=reverse_kl, expected forward_kl, {', '.join(SAMPLED_COSTS)}")
    return constraint


def multiplier_of(algorithm: Mapping[str, Any]) -> PIDController | None:
    """The controller of lambda that `algorithm.cmdp` states, for ``kind: pid``: ``pid_gains`` are its three gains, and
    its integral starts from ``coefficient``. Raises InputError for gains that are not three numbers, or of no use."""
    constraint, gains = constraint_of(algorithm, "algorithm"), algorithm["cmdp"].get("pid_gains")
    if constraint.kind != "pid":
        if gains is not None:
            raise InputError(f"algorithm.cmdp.pid_gains={gains} with kind={constraint.kind}, which has no controller")
        return None
    if gains is None:
        return PIDController(initial_integral=constraint.price)
    if not isinstance(gains, Sequence) or len(gains) != 3 or not all(map(_is_number, gains)):
        raise InputError(
            f"algorithm.cmdp.pid_gains={gains}, expected three numbers: proportional, integral, derivative"
        )
    kp, ki, kd = gains
    return PIDController(kp=kp, ki=ki, kd=kd, initial_integral=constraint.price)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_config(config: Any) -> Constraint:
    """The constraint of a whole configuration, once all other settings are as it needs them.

    Raises InputError, which names the key, its value and the expected one.
    """
    constraint = constraint_of(config.algorithm, "algorithm")
    actor, distillation = config.actor_rollout_ref.actor, config.distillation
    mirrored = constraint_of(actor.policy_loss, "actor_rollout_ref.actor.policy_loss")
    if mirrored != constraint:
        raise InputError(
            "actor_rollout_ref.actor.policy_loss.cmdp differs from algorithm.cmdp, expected ${algorithm.cmdp}"
        )
    loss = distillation.distillation_loss
    expected = {
        "algorithm.adv_estimator": (config.algorithm.adv_estimator, "cmdp"),
        # both would charge for the divergence a second time
        "algorithm.use_kl_in_reward": (config.algorithm.use_kl_in_reward, False),
        "actor_rollout_ref.actor.use_kl_loss": (actor.use_kl_loss, False),
        "actor_rollout_ref.actor.policy_loss.loss_mode": (actor.policy_loss.loss_mode, "cmdp"),
        # the teacher's log-probabilities are those of temperature 1
        "actor_rollout_ref.rollout.temperature": (config.actor_rollout_ref.rollout.temperature, 1.0),
        # costs are those of the policy that is trained, not of the rollout engine
        "algorithm.rollout_correction.bypass_mode": (config.algorithm.rollout_correction.bypass_mode, False),
        # completions of groups with one reward have costs too, which the budget and pid's lambda are about
        "algorithm.filter_groups.enable": (config.algorithm.filter_groups.enable, False),
        "distillation.enabled": (distillation.enabled, True),
        "distillation.distillation_loss.loss_mode": (
            loss.loss_mode,
            SAMPLED_LOSS if constraint.action_dependent else TOPK_LOSS,
        ),
        # so that verl adds the direct term to the policy loss, as it stands and for its gradient
        "distillation.distillation_loss.use_task_rewards": (loss.use_task_rewards, True),
        "distillation.distillation_loss.use_policy_gradient": (loss.use_policy_gradient, False),
        "distillation.distillation_loss.distillation_loss_coef": (loss.distillation_loss_coef, 1.0),
        "distillation.distillation_loss.loss_max_clamp": (loss.loss_max_clamp, None),
        "distillation.distillation_loss.log_prob_min_clamp": (loss.log_prob_min_clamp, None),
    }
    if not constraint.action_dependent:  # the cost is made of the logits, and the fused kernel has none
        expected["actor_rollout_ref.model.use_fused_kernels"] = (
            config.actor_rollout_ref.model.use_fused_kernels,
            False,
        )
    for key, (given, right) in expected.items():
        if given != right:
            raise InputError(f"{key}={given}, the trainer 'cmdp' expects {right}")
    _check_correction(config)
    if not constraint.action_dependent and actor.strategy not in ("fsdp", "fsdp2"):
        raise InputError(
            f"actor_rollout_ref.actor.strategy={actor.strategy} with cost=forward_kl, expected fsdp or fsdp2: others "
            f"do not have a token's logits in one process; the costs {', '.join(SAMPLED_COSTS)} do not need them"
        )
    if not actor.clip_ratio_c > 1:
        raise InputError(f"actor_rollout_ref.actor.clip_ratio_c={actor.clip_ratio_c}, expected a number above 1")
    if actor.loss_agg_mode not in CONSTANT_NORMALIZERS:
        raise InputError(
            f"actor_rollout_ref.actor.loss_agg_mode={actor.loss_agg_mode}, expected {', '.join(CONSTANT_NORMALIZERS)}"
        )
    return constraint


def _check_correction(config: Any) -> None:
    """Raises InputError for a correction of verl's that would change what a completion has spent, or not be made."""
    correction, rollout = config.algorithm.rollout_correction, config.actor_rollout_ref.rollout
    settings = {name: correction[name] for name in CORRECTION}
    alike = torch.zeros(2, 2)  # verl looks at these settings in the first step, after its rollouts
    try:
        compute_rollout_correction_and_rejection_mask(alike, alike, torch.ones(2, 2), **settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"algorithm.rollout_correction: {error}") from error
    weighed, rejected = settings["rollout_is"], settings["rollout_rs"]
    if weighed and settings["rollout_is_threshold"] is None:
        raise InputError(
            f"algorithm.rollout_correction.rollout_is={weighed} makes no weights without a rollout_is_threshold, "
            "expected a number, or a lower and an upper one"
        )
    if rejected is not None and any(option.strip().startswith("token_") for option in rejected.split(",")):
        raise InputError(
            f"algorithm.rollout_correction.rollout_rs={rejected} takes tokens out of a completion, and their cost with "
            "them; expected options seq_*, which take whole completions"
        )
    if (weighed or rejected) and not rollout.calculate_log_probs:
        raise InputError(
            "algorithm.rollout_correction without the rollout's log-probabilities corrects nothing, "
            "expected actor_rollout_ref.rollout.calculate_log_probs=True"
        )

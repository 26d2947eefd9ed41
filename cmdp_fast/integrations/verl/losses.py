"""The score term as verl's policy loss `cmdp`, the direct term as its distillation losses `cmdp` and `cmdp_sampled`.

verl hands a policy loss log-probabilities and advantages, and a distillation loss the whole batch; it adds the two. So
the direct term, which needs a differentiable cost, is a distillation loss with the weight of each token in it. The cost
is made of the logits, which only an actor's worker has: `actor_loss` is what it calls.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

import cmdp_fast as cf
from cmdp_fast import objective
from cmdp_fast.errors import InputError

from .config import CONSTANT_NORMALIZERS, SAMPLED_LOSS, TOPK_LOSS, constraint_of
from .costs import COST, COST_UPPER, cost_of_logits, sampled_cost

COEFFICIENT, SEQUENCE_WEIGHTS = "cmdp_coefficient", "cmdp_sequence_weights"
"""What the trainer sends along with a batch: the lambda of this step, and whether verl's ``rollout_is_weights`` are
those of whole completions."""

LOG_RATIO_LIMIT = 20.0  # as verl's own losses: a policy that has run away gives no infinite ratio


@register_policy_loss("cmdp")
def compute_policy_loss_cmdp(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """PPO's clipped surrogate over tokens [B, T], `objective.ppo_loss` without its direct term, and metrics.

    Loss and metrics are those of verl's `vanilla`, its second clip included: where the advantage is negative the ratio
    counts as no more than ``clip_ratio_c``. ``actor/pg_clipfrac`` and ``actor/pg_clipfrac_lower`` are the shares of
    real tokens that the first and the second clip bound, ``actor/ppo_kl`` is their mean of old - new log-probability
    (nats). ``loss_agg_mode`` is any that divides all tokens by one number. Raises InputError for another: weighing the
    tokens of a completion by its length would make a mean of the sum over the trajectory, which the budget is for.
    """
    mask = response_mask.bool()
    clip_low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    clip_high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    log_ratio = (log_prob - old_log_prob.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # -c A for negative A is what the ratio c gives, without a gradient
    highest = torch.where(advantages < 0, math.log(config.clip_ratio_c), LOG_RATIO_LIMIT)
    loss, _ = objective.ppo_loss(
        old_log_prob.detach() + log_ratio.minimum(highest),
        old_log_prob,
        # min(w rho A, w clip(rho) A) = w min(rho A, clip(rho) A) for weights that are not negative
        advantages if rollout_is_weights is None else advantages * rollout_is_weights,
        mask=mask,
        clip_low=clip_low,
        clip_high=clip_high,
        normalizer=_normalizer(loss_agg_mode, mask, **config.global_batch_info),
    )
    with torch.no_grad():
        ratio = log_ratio.exp()
        clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
        figures = {
            "actor/pg_clipfrac": clipped,
            "actor/ppo_kl": -log_ratio,
            "actor/pg_clipfrac_lower": (ratio > config.clip_ratio_c) & (advantages < 0),
        }
        real = mask.sum().clamp(min=1)
        return loss, {name: (torch.where(mask, x, 0.0).sum() / real).item() for name, x in figures.items()}


def _normalizer(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> float | Tensor:
    """The divisor of verl's `agg_loss` for a sum over tokens."""
    if mode not in CONSTANT_NORMALIZERS:
        raise InputError(f"loss_agg_mode={mode}, the loss 'cmdp' expects one of {', '.join(CONSTANT_NORMALIZERS)}")
    if mode == "token-sum":
        return 1.0 / dp_size
    if mode == "token-mean":
        return (mask.sum().clamp(min=1) if batch_num_tokens is None else max(batch_num_tokens, 1)) / dp_size
    sequences = mask.any(1).sum().clamp(min=1) if global_batch_size is None else global_batch_size
    horizon = 1
    if mode == "seq-mean-token-sum-norm":
        horizon = mask.shape[-1] if loss_scale_factor is None else loss_scale_factor
    return sequences * horizon / dp_size


@register_distillation_loss(DistillationLossSettings(names=[TOPK_LOSS], use_topk=True))
def compute_cmdp_direct_term(
    config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: TensorDict
) -> tuple[Tensor, dict[str, float]]:
    """k_t c_t for each token [B, T], c the forward KL to the teacher's k tokens with a bucket for the rest.

    k is `objective.direct_coefficient` of the budget that completions spend under the policy that is trained. So a
    whole completion has to be in the micro-batch, as it is in verl. The lambda of ``pid`` is the one that the trainer
    sends.

    verl's importance weights of the rollout are the score term's, of each token. Here they count where one weight
    stands for a whole completion (``rollout_is: sequence``): the expectation of everything in it is then corrected. A
    token's own weight corrects the choice of that token, on which its divergence does not depend.

    Differentiable through c. Metrics are means of the
    micro-batch: ``distillation/cmdp_cost`` per token and ``distillation/cmdp_spent`` per completion, in nats,
    ``distillation/student_mass`` and ``distillation/teacher_mass`` of the k tokens, and the shares of completions of
    which the bounds of the exact forward KL prove that they keep the budget (``distillation/cmdp_certified``) or that
    they do not (``distillation/cmdp_refuted``). Raises InputError where the workers are not those of the trainer
    `cmdp`, which make the cost of the logits.
    """
    constraint = constraint_of(config.policy_loss, "actor_rollout_ref.actor.policy_loss")
    if COST not in model_output:
        raise InputError(
            "distillation.distillation_loss.loss_mode=cmdp has no cost that was made of the logits, "
            "expected trainer.v1.trainer_mode=cmdp"
        )
    if constraint.kind == "pid":
        if (coefficient := tu.get(data, COEFFICIENT, default=None)) is None:
            raise InputError("kind=pid has no lambda of this step, expected trainer.v1.trainer_mode=cmdp")
        constraint = replace(constraint, coefficient=coefficient)
    mask = _padded(data["response_mask"]).bool()
    cost, upper, student_mass, teacher_mass = (
        torch.where(mask, no_padding_2_padding(model_output[name], data).float(), 0.0)
        for name in (COST, COST_UPPER, "student_mass", "teacher_mass")
    )
    trace = cf.budget_trace(cost.detach(), constraint=constraint, mask=mask)
    weight = objective.direct_coefficient(trace, constraint, mask=mask)
    if tu.get(data, SEQUENCE_WEIGHTS, default=False):
        weight = weight * _padded(data["rollout_is_weights"])
    verdict = cf.budget_verdict(cost.detach(), upper, constraint=constraint, mask=mask)
    completions = mask.any(1)
    per_token, per_completion = mask.sum().clamp(min=1), completions.sum().clamp(min=1)
    metrics = {
        "cmdp_cost": cost.detach().sum() / per_token,
        "cmdp_spent": cost.detach().sum() / per_completion,
        "cmdp_certified": (verdict.certified & completions).sum() / per_completion,
        "cmdp_refuted": verdict.refuted.sum() / per_completion,
        "student_mass": student_mass.sum() / per_token,
        "teacher_mass": teacher_mass.sum() / per_token,
    }
    # 0 * inf: a cost that is infinite where its weight is 0 is not part of the objective
    figures = {f"distillation/{name}": figure.item() for name, figure in metrics.items()}
    return torch.where(weight != 0, weight * cost, 0.0), figures


@register_distillation_loss(DistillationLossSettings(names=[SAMPLED_LOSS], use_estimator=True))
def compute_cmdp_sampled(
    config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: TensorDict
) -> tuple[Tensor, dict[str, float]]:
    """Zeros [B, T]: a cost of the sampled token has no direct term. Metric: its mean, ``distillation/cmdp_cost``."""
    constraint = constraint_of(config.policy_loss, "actor_rollout_ref.actor.policy_loss")
    mask = _padded(data["response_mask"]).bool()
    logprob = no_padding_2_padding(model_output["log_probs"], data).detach().float()
    teacher_logprob = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1).float()
    cost = torch.where(mask, sampled_cost(logprob, teacher_logprob, constraint), 0.0)
    return torch.zeros_like(cost), {"distillation/cmdp_cost": (cost.sum() / mask.sum().clamp(min=1)).item()}


def actor_loss(training_loss: partial[Any], student_logits: Tensor | None = None, **given: Any) -> Any:
    """verl's loss function of a worker, `distillation_ppo_loss` with both configurations, as the actor needs it.

    The engine calls it twice per micro-batch: with logits, of which it keeps `cost_of_logits`, and with what it has
    kept, for the loss. A micro-batch without a token, which verl makes when it fills up a batch, has the policy's loss
    alone; verl would take the smallest of its no distillation losses, which is an error.
    """
    if student_logits is not None:
        return cost_of_logits(student_logits, given["data"])
    mask = given["data"]["response_mask"]
    if (mask.values() if mask.is_nested else mask).any():
        return training_loss(**given)
    loss, metrics = ppo_loss(training_loss.keywords["config"], **given)
    # verl adds up metrics of all processes position by position, so there has to be one for each micro-batch
    nothing = {
        "loss": (AggregationType.SUM, 0.0),
        "loss_min": (AggregationType.MIN, math.inf),
        "loss_max": (AggregationType.MAX, -math.inf),
    }
    return loss, metrics | {f"distillation/{name}": Metric(*kind_and_value) for name, kind_and_value in nothing.items()}


def _padded(mask: Tensor) -> Tensor:
    return mask.to_padded_tensor(0) if mask.is_nested else mask

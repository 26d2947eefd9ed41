"""Eager PyTorch: the formulas written with `log_softmax`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.ops.budget_trace import BUDGET
from cmdp_fast.bench.ops.constrained_reward import budget
from cmdp_fast.bench.ops.linear_token_stats import both_logits
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, LOGITS, Inputs, Values, Variant, differentiable

OPS = ("token_stats", "divergence", "budget_trace", "constrained_reward", "linear_token_stats", "linear_divergence")
NO_FIRST = "no first violation"
LACKS_FIVE = "one divergence: no log-probabilities, entropies, forward KL"


def reverse_kl(inputs: Inputs) -> Values:
    """KL(p‖w) of the logits, in float32."""
    p, w = (torch.log_softmax(inputs[name].float(), -1) for name in ("student", "teacher"))
    return {"reverse_kl": (p.exp() * (p - w)).sum(-1)}


def jsd(inputs: Inputs) -> Values:
    """The Jensen-Shannon divergence with beta 1/2, in float32."""
    p, w = (torch.log_softmax(inputs[name].float(), -1) for name in ("student", "teacher"))
    m = torch.logaddexp(p, w) - math.log(2)
    return {"jsd": ((p.exp() * (p - m)).sum(-1) + (w.exp() * (w - m)).sum(-1)) / 2}


def budget_trace(inputs: Inputs) -> Values:
    """The account of a budget from a cumulative sum, in float64 as ours."""
    mask, cost = inputs["mask"], torch.where(inputs["mask"], inputs["cost"].double(), 0.0)
    cumulative = cost.cumsum(-1)
    over = (cumulative - BUDGET).clamp(min=0.0)
    violated = ((cumulative > BUDGET) & mask).cummax(-1).values
    return {
        "cumulative": cumulative.float(),
        "remaining": (BUDGET - cumulative).float(),
        "violated": violated,
        "excess": (over - F.pad(over, (1, 0))[..., :-1]).float(),
    }


def constrained_reward(inputs: Inputs) -> Values:
    """The default modified reward and its ingredients, in float32."""
    p, w = (torch.log_softmax(inputs[name].float(), -1) for name in ("student", "teacher"))
    logprob = p.gather(-1, inputs["tokens"].unsqueeze(-1)).squeeze(-1)
    cost = torch.where(inputs["mask"], (p.exp() * (p - w)).sum(-1), 0.0)
    cumulative, limit = cost.cumsum(-1), budget(inputs)
    violated = cumulative > limit
    over = (cumulative - limit).clamp(min=0.0)
    before = F.pad(violated, (1, 0))[..., :-1]
    excess = over - F.pad(over, (1, 0))[..., :-1]
    reward = inputs["reward"] * ~violated - (violated & ~before).float() - excess
    return {"logprob": logprob, "reverse_kl": cost, "cumulative": cumulative, "modified_reward": reward}


def linear_reverse_kl(inputs: Inputs) -> Values:
    """KL(p‖w) of logits made in full."""
    student, teacher = both_logits(inputs)
    return reverse_kl({"student": student, "teacher": teacher})


def linear_jsd(inputs: Inputs) -> Values:
    """The Jensen-Shannon divergence of logits made in full."""
    student, teacher = both_logits(inputs)
    return jsd({"student": student, "teacher": teacher})


def variants(case: Case) -> list[Variant]:
    if case.op == "budget_trace":
        return [Variant("eager", budget_trace, lacks=NO_FIRST, peer="eager")]
    if case.op == "constrained_reward":
        lacks = "no entropies, no log-probability of the teacher's, no forward KL"
        return [Variant("eager", constrained_reward, lacks=lacks, peer="eager")]
    if case.op == "divergence":
        return [differentiable(case.mode, "eager", jsd, ("jsd",), LOGITS, peer="eager")]
    if case.op == "linear_divergence":
        name = "logits in full, eager"
        return [differentiable(case.mode, name, linear_jsd, ("jsd",), HIDDEN_AND_HEAD, peer="eager")]
    if case.op == "linear_token_stats":
        name, function, leaves = "logits in full, eager", linear_reverse_kl, HIDDEN_AND_HEAD
    else:
        name, function, leaves = "eager", reverse_kl, LOGITS
    return [differentiable(case.mode, name, function, ("reverse_kl",), leaves, lacks=LACKS_FIVE, peer="eager")]

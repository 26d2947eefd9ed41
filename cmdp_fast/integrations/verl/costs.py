"""Token costs from verl's batch, which carries log-probabilities of sampled tokens, or masses of k tokens."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.workers.utils.padding import no_padding_2_padding

import cmdp_fast as cf
from cmdp_fast.constraint import Constraint
from cmdp_fast.integrations.topk import with_tail

SAMPLED_FIELDS = ("prompts", "responses", "old_log_probs", "teacher_logprobs")
TOPK_FIELDS = ("prompts", "responses", "distillation_losses", "student_mass", "teacher_mass")


def sampled_cost(logprob: Tensor, teacher_logprob: Tensor, kind: str) -> Tensor:
    """`cf.token_cost` of the costs k1, k3 and nll, which need these two statistics of a token and no others."""
    absent = torch.full_like(logprob, torch.nan)
    return cf.token_cost(cf.TokenStats(logprob, teacher_logprob, absent, absent, absent, absent), kind)


def cost_of_rollouts(data: TensorDict, constraint: Constraint) -> Tensor:
    """The cost [B, T] of each response token in nats, from nested fields: `SAMPLED_FIELDS` for a cost that depends on
    the action, else `TOPK_FIELDS`. Columns beyond a response's end hold anything finite."""
    if constraint.action_dependent:
        teacher_logprob = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
        old_log_prob = data["old_log_probs"].to_padded_tensor(0.0)
        return sampled_cost(old_log_prob.float(), teacher_logprob.float(), constraint.cost)
    head, student_mass, teacher_mass = (no_padding_2_padding(data[name], data).float() for name in TOPK_FIELDS[2:])
    return with_tail(head, teacher_mass, student_mass)

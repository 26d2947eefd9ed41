"""Token costs in verl: of the actor's logits, or of the log-probabilities of sampled tokens that a batch carries."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
from verl.workers.utils.padding import no_padding_2_padding

import cmdp_fast as cf
from cmdp_fast.constraint import Constraint

COST = "cmdp_cost"
COST_UPPER = "cmdp_cost_upper"
SAMPLED_FIELDS = ("prompts", "responses", "old_log_probs", "teacher_logprobs")
TOPK_FIELDS = ("prompts", "responses", COST)


def cost_of_logits(student_logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
    """What verl's engine keeps of a micro-batch's logits [1, N, V]: `COST`, the forward KL from the teacher's k tokens
    and a bucket for the rest, in nats and differentiable, `COST_UPPER`, which the exact one does not exceed, and both
    masses of the k tokens; [1, N] in float32 each.

    In the place of verl's `compute_topk_loss`, whose masses come rounded to the dtype of the logits
    (``use_chunked_topk``) or to float32: a bucket that is made of them counts rounding as divergence. Whole rows of
    logits are needed, as FSDP has them.
    """
    logprob, ids = (data[name].values()[None] for name in ("teacher_logprobs", "teacher_ids"))  # [1, N, k]
    if get_ulysses_sequence_parallel_world_size() > 1:  # a process has the logits of its part of the N tokens
        logprob, ids = slice_input_tensor(logprob, dim=1), slice_input_tensor(ids, dim=1)
    if student_logits.requires_grad:
        # the backward pass of flash-attn's cross-entropy, which verl takes of the same logits, writes over them
        student_logits = student_logits.clone()
    # the statistics of tokens are verl's affair: any token will do
    stats = cf.topk_stats(student_logits, ids, logprob, torch.zeros_like(ids[..., 0]))
    return {
        COST: stats.forward_kl,
        COST_UPPER: stats.forward_kl_upper,
        "student_mass": stats.student_mass,
        "teacher_mass": stats.teacher_mass,
    }


def sampled_cost(logprob: Tensor, teacher_logprob: Tensor, constraint: Constraint) -> Tensor:
    """`cf.token_cost` of the costs k1, k3 and nll, which need these two statistics of a token and no others."""
    absent = torch.full_like(logprob, torch.nan)
    stats = cf.TokenStats(logprob, teacher_logprob, absent, absent, absent, absent)
    return cf.token_cost(stats, constraint.cost, clamp=constraint.cost_clamp)


def cost_of_rollouts(data: TensorDict, constraint: Constraint) -> Tensor:
    """The cost [B, T] of each response token in nats, from nested fields: `SAMPLED_FIELDS` for a cost that depends on
    the action, else `TOPK_FIELDS`. Columns beyond a response's end hold anything finite."""
    if constraint.action_dependent:
        teacher_logprob = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
        old_log_prob = data["old_log_probs"].to_padded_tensor(0.0)
        return sampled_cost(old_log_prob.float(), teacher_logprob.float(), constraint)
    return no_padding_2_padding(data[COST], data).float()

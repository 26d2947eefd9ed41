"""verl's way from logits to a reward with a KL penalty, padded, no budget: our equivalent, modelled on verl 0.9.1.

After `logprobs_from_logits_v2`, `entropy_from_logits` and `apply_kl_penalty`: one log-sum-exp per completion in a loop
(half precision: a log-softmax), a softmax for the entropy, and the difference of log-probabilities, by which the
reward at each token is reduced. On a GPU verl takes log-probabilities from flash-attn's cross-entropy where that is
installed; here they are always PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.peers.trl_pipeline import LACKS, WEIGHT, checked
from cmdp_fast.bench.variant import Inputs, Values, Variant

OPS = ("constrained_reward",)


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(a) [B, T] of logits [B, T, V], one completion at a time."""
    index = tokens.unsqueeze(-1)
    if logits.dtype in (torch.float32, torch.float64):
        normalizer = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        return logits.gather(-1, index).squeeze(-1) - normalizer
    rows = [torch.log_softmax(row, -1).gather(-1, i).squeeze(-1) for row, i in zip(logits, index, strict=True)]
    return torch.stack(rows)


def entropy_of(logits: Tensor) -> Tensor:
    """The entropy [B, T] of logits [B, T, V], in nats."""
    return torch.logsumexp(logits, -1) - (torch.softmax(logits, -1) * logits).sum(-1)


def pipeline(inputs: Inputs) -> Values:
    tokens, mask = inputs["tokens"], inputs["mask"]
    logprob = log_probability(inputs["student"], tokens)
    teacher_logprob = log_probability(inputs["teacher"], tokens)
    kl = (logprob - teacher_logprob) * mask
    return {
        "logprob": logprob,
        "teacher_logprob": teacher_logprob,
        "entropy": entropy_of(inputs["student"]),
        "penalised": inputs["reward"] - WEIGHT * kl,
    }


def variants(case: Case) -> list[Variant]:
    return [Variant("verl pipeline", pipeline, values=checked, lacks=LACKS, peer="verl_pipeline")]

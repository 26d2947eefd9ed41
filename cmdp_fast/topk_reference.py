"""`cmdp_fast.topk_stats` in plain PyTorch, of whole rows that autograd differentiates; in float64 it is the truth.

Bounds and proofs stand in `cmdp_fast.topk_bounds`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmdp_fast import topk_bounds
from cmdp_fast.reference import compute_dtype
from cmdp_fast.topk_bounds import StudentTerms, TopkStats


def topk_stats(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    top_k: int | None = None,
    min_logprob: Tensor | float | None = None,
) -> TopkStats:
    """Arguments and returns as `cmdp_fast.topk_stats`."""
    width = student_logits.shape[-1] if vocab_size is None else vocab_size
    ids, teacher = topk_bounds.teacher_terms(
        topk_ids, topk_logprobs, vocab=width, top_k=top_k, min_logprob=min_logprob, mask=mask
    )
    x = student_logits[..., :width].double() / temperature
    if mask is not None:
        x = torch.where(mask[..., None], x, 0.0)
        tokens = tokens.masked_fill(~mask, 0)
    log_p = x.log_softmax(-1)
    absent = ids < 0
    outside = torch.ones(*x.shape[:-1], width + 1, dtype=torch.bool, device=x.device)
    outside = outside.scatter(-1, ids.masked_fill(absent, width), False)[..., :width]
    # Of the logits, less the largest of the tail: log_p far below the listed ones has lost what tells columns apart.
    used = outside & ~torch.isneginf(x)
    in_tail = x.masked_fill(~outside, -torch.inf)
    top, peak = x.detach().amax(-1), in_tail.detach().amax(-1)
    above_peak = in_tail - peak.masked_fill(torch.isneginf(peak), 0.0)[..., None]
    of_tail = above_peak.logsumexp(-1)
    tail = of_tail + (peak - top) - (x - top[..., None]).logsumexp(-1)
    within = (above_peak - of_tail[..., None]).masked_fill(~used, 0.0)
    share = torch.where(used, above_peak - of_tail[..., None], -torch.inf).exp()
    student = StudentTerms(
        log_p.gather(-1, ids.clamp(min=0)).masked_fill(absent, -torch.inf),
        tail,
        -(share * within).sum(-1),
        log_p.detach().masked_fill(~outside, torch.inf).amin(-1),
        topk_bounds.student_rounding(compute_dtype(student_logits), width),
    )
    logprob = log_p.gather(-1, tokens.long()[..., None])[..., 0]
    stats = topk_bounds.statistics(student, teacher, logprob, compute_dtype(student_logits, topk_logprobs))
    return stats if mask is None else TopkStats(*(torch.where(mask, value, 0.0) for value in stats))


def forward_kl_upper(student_logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor) -> Tensor:
    """The least upper bound of KL(w‖p) over all teachers with these k most likely tokens ``[..., k]``, in float64.

    The tail's part, sum w (log w - log p) under 0 <= w <= c and sum w = W, is convex in w, so an extreme point has its
    largest value: c on as many tokens as W allows, and the rest on one. Among those the one whose tokens are least
    likely to the student is the largest. It takes the tail in sorted order; `topk_stats` takes one pass, and
    `topk_bounds` says what that adds. Of exact log-probabilities, without rounding.
    """
    log_p, listed = student_logits.double().log_softmax(-1), topk_logprobs.double()
    head = (listed.exp() * (listed - log_p.gather(-1, topk_ids))).sum(-1)
    least_likely, _ = log_p.scatter(-1, topk_ids, torch.inf).sort(-1)
    cap = listed.exp().amin(-1, keepdim=True)
    before = cap * torch.arange(log_p.shape[-1], dtype=torch.float64, device=log_p.device)
    left = (1 - listed.exp().sum(-1, keepdim=True) - before).clamp(min=0)
    w = torch.minimum(cap, left)
    used = w > 0
    return head + (w * (w.log() - least_likely).masked_fill(~used, 0.0)).sum(-1)

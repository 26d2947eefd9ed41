"""Divergences from the teacher's k most likely tokens and one bucket for all others: the message of a teacher that runs
elsewhere.

Let S be the k tokens, T the tail, W = w(T) and P = p(T) the tail masses of teacher w and student p. The bucket stands
for the tail:

    D_k = sum_S w log(w/p) + W log(W/P)                                                          (forward KL)

**It never counts too much.** By the chain rule D(w‖p) - D_k = W D(w(.|T) ‖ p(.|T)), a divergence, hence >= 0. That is
the log-sum inequality for the terms of T, or the data-processing inequality for the map that merges T into one token.
It misses how the two differ *within* the tail, so a student can hide its divergence there: **a budget that D_k
meets may be exceeded by the true KL.** A larger k splits the bucket and D_k grows, up to the KL at k = V.

**By how much at most.** Let R be the spread of log(w/p) over T, its largest less its smallest value. Then

    0 <= D(w‖p) - D_k <= W min(R, R²/8).

With X = log of the ratio of the two conditional distributions, D(w(.|T)‖p(.|T)) = E_w X. X has the spread R, and
E_p e^X = 1 puts 0 between its smallest and largest value, so E_w X <= max X <= R. And E_w e^-X = 1, so Hoeffding's
lemma gives 0 = log E_w e^-X <= -E_w X + R²/8. A teacher knows W, and k can be chosen for it; R takes the whole of both
rows. Where log(w/p) stays within +-L on the tail, R <= 2L; with no such bound nothing bounds the error. Over a
completion the errors of its tokens add up.

The reverse KL from the same k tokens behaves alike with the roles exchanged: D(p‖w) less its bucketed form is
P D(p(.|T)‖w(.|T)), at most P min(R, R²/8), where P is the mass that the *student* has outside the teacher's k tokens.

Without the bucket sum_S w log(w/p) alone is no divergence: it can be negative, and bounds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_divergence(student_logprob: Tensor, teacher_logprob: Tensor, kind: str = "forward_kl") -> Tensor:
    """KL between the distributions over k tokens and a bucket for the rest, [...], in nats; a lower bound of the KL.

    Args: the log-probabilities [..., k] of the same k tokens under both models, over the whole vocabulary, in any
    floating dtype; ``kind`` is ``forward_kl`` (teacher‖student) or ``reverse_kl``. Returns float32 (float64 if an
    argument is), differentiable with respect to the student; the teacher gets no gradient. Raises ValueError for
    another kind or shapes that differ.
    """
    if kind not in ("forward_kl", "reverse_kl"):
        raise ValueError(f"kind={kind!r}, expected 'forward_kl' or 'reverse_kl'")
    if student_logprob.shape != teacher_logprob.shape:
        raise ValueError(
            f"shapes {tuple(student_logprob.shape)} and {tuple(teacher_logprob.shape)}, expected equal ones"
        )
    dtype = torch.promote_types(torch.promote_types(student_logprob.dtype, teacher_logprob.dtype), torch.float32)
    first, second = teacher_logprob.detach().to(dtype), student_logprob.to(dtype)
    if kind == "reverse_kl":
        first, second = second, first
    # 0 log(0/anything) = 0
    terms = first.exp() * (first - second).masked_fill(torch.isneginf(first), 0.0)
    return with_tail(terms.sum(-1), first.exp().sum(-1), second.exp().sum(-1))


def with_tail(head: Tensor, mass: Tensor, other_mass: Tensor) -> Tensor:
    """D_k from its first part: ``head`` = sum_S a log(a/b), plus the bucket, from the masses a(S) and b(S); all [...].

    Differentiable. Never negative, which rounding might make it. A tail mass below the dtype's epsilon is a rounding
    error of 1 - (the mass of the k tokens) and counts as epsilon, which in float32 raises no value by over 2e-6 nats.
    """
    floor = torch.finfo(mass.dtype).eps
    tail, other_tail = (1.0 - mass).clamp(min=floor), (1.0 - other_mass).clamp(min=floor)
    return (head + tail * (tail.log() - other_tail.log())).clamp(min=0.0)

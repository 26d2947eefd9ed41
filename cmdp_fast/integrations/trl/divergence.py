"""Jensen-Shannon divergences from hidden states and heads.

They need both normalisers before the mixture's logarithm, two passes over the logits, which `cf.linear_token_stats`
does not make. So the logits of both models are made for some rows at a time, and again in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import cmdp_fast as cf

NUMBERS = 2**25  # of a model's logits that exist at once: 220 rows of a vocabulary of 152,064


def tiled_divergence(
    student: cf.Head,
    student_hidden: Tensor,
    teacher: cf.Head,
    teacher_hidden: Tensor,
    mask: Tensor,
    *,
    beta: float,
    temperature: float,
    vocab_size: int,
) -> Tensor:
    """beta KL(q‖M) + (1-beta) KL(p‖M), M = (1-beta) p + beta q, of the rows of hidden states [B, T, H] where ``mask``
    [B, T] is True: [B, T] in nats, 0 elsewhere; `cf.divergence` of kind ``jsd`` of the logits.

    Differentiable with respect to the student's hidden states and head, where these are parameters.
    """
    ours, theirs = _in(student, student_hidden), _in(teacher, teacher_hidden)
    rows = mask.flatten().nonzero()[:, 0]
    x, y = (hidden.flatten(0, 1)[rows] for hidden in (student_hidden, teacher_hidden))

    def divergence(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return cf.divergence(
                ours.logits(x),
                theirs.logits(y),
                "jsd",
                beta=beta,
                temperature=temperature,
                vocab_size=vocab_size,
            )

    size = max(1, NUMBERS // max(student.weight.shape[0], teacher.weight.shape[0]))
    parts = [
        checkpoint(divergence, *pair, use_reentrant=False) for pair in zip(x.split(size), y.split(size), strict=True)
    ]
    values = torch.cat(parts)
    return values.new_zeros(mask.numel()).index_copy(0, rows, values).view(mask.shape)


def _in(head: cf.Head, hidden: Tensor) -> cf.Head:
    """The head, whole, in the dtype of the hidden states, as autocast would have it."""
    weight, bias = (None if p is None else _whole(p).to(hidden.dtype) for p in (head.weight, head.bias))
    assert weight is not None
    return head._replace(weight=weight, bias=bias)


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

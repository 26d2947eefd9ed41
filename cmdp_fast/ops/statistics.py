"""The six statistics as the operators make them, and their gradient with respect to the student's logits.

The one place that says which outputs there are and which of them are differentiable: `TokenStats` and `Upstream`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast.cpu import in_huge_pages
from cmdp_fast.layout import SAVED, Pair, Upstream, addressable, can_overwrite, unit_stride
from cmdp_fast.ops import backends
from cmdp_fast.ops.onlookers import backward_is_compiled
from cmdp_fast.ops.operator import Backward, operator
from cmdp_fast.reference import TokenStats, compute_dtype

DIFFERENTIABLE = tuple(f"stats_{name}" for name in Upstream._fields)  # outputs of an operator that makes a `Scored`


class Scored(NamedTuple):
    """What an operator makes of rows of logits."""

    stats: TokenStats  # [...] each
    saved: Tensor  # [..., SAVED] float64: what the backward pass needs of each row


def scored(values: Sequence[Tensor], saved: Tensor) -> Scored:
    """The six statistics, in the order of `TokenStats`, and the saved scalars."""
    return Scored(TokenStats(*values), saved)


def room(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Scored:
    """As much of it as there is before anything is computed: shapes and dtypes."""
    return scored(
        [like.new_empty(shape, dtype=dtype) for _ in TokenStats._fields],
        like.new_empty((*shape, SAVED), dtype=torch.float64),
    )


def room_of(pair: Pair) -> Scored:
    """`room` for a pair of logits."""
    return room(pair.student, pair.student.shape[:-1], compute_dtype(pair.student, pair.teacher))


class Kept(NamedTuple):
    """What the gradient needs of a forward pass."""

    pair: Pair
    saved: Tensor
    inplace: bool
    backend: str


def gradient_of_logits(backward: Backward[Kept]) -> dict[str, Tensor]:
    """The gradient of ``pair_student``, in memory of its own or over the logits.

    Over the logits only where autograd compares versions, so that others who saved them raise.
    """
    if getattr(backward.context, "spent", False):
        raise RuntimeError(
            "token_stats(inplace_backward=True) was differentiated a second time, but the first backward pass has "
            "overwritten the student's logits with their gradient; use inplace_backward=False to keep them"
        )
    kept = backward.kept
    upstream = Upstream(*backward.upstream)
    if not kept.inplace or torch.compiler.is_compiling() or backward_is_compiled():
        return {"pair_student": _token_stats_backward(_Upward(kept.pair, kept.saved, upstream, kept.backend))}
    backward.context.spent = True
    memory = kept.pair.student.detach()
    _token_stats_backward_(_Upward(kept.pair._replace(student=memory), kept.saved, upstream, kept.backend))
    return {"pair_student": memory}


class _Upward(NamedTuple):
    pair: Pair
    saved: Tensor
    upstream: Upstream
    backend: str


@operator("token_stats_backward")
def _token_stats_backward(given: _Upward) -> Tensor:
    out = in_huge_pages(given.pair.student.new_empty(given.pair.student.shape))
    backends.get(given.backend).token_stats_backward(given.pair, given.saved, given.upstream, out)
    return out


@_token_stats_backward.shapes
def _(given: _Upward) -> Tensor:
    return given.pair.student.new_empty(given.pair.student.shape)


@operator("token_stats_backward_", mutates="pair_student")
def _token_stats_backward_(given: _Upward) -> None:
    pair, backend = given.pair, backends.get(given.backend)
    here = writable(pair.student, pair.teacher, given.backend)  # a graph brings logits of its own
    out = pair.student if here else torch.empty_like(pair.student, memory_format=torch.contiguous_format)
    backend.token_stats_backward(pair, given.saved, given.upstream, out)
    if not here:
        pair.student.copy_(out)


def writable(student: Tensor, teacher: Tensor, backend: str) -> bool:
    """Whether a kernel may write the gradient over the student's logits while it reads both."""
    if student._is_zerotensor() or teacher._is_zerotensor():  # no memory yet
        return False
    if unit_stride(student) is not student or (backend in backends.ON_GPU and not addressable(student)):
        return False
    return can_overwrite(student, teacher)


@_token_stats_backward_.shapes
def _(given: _Upward) -> None:
    return None

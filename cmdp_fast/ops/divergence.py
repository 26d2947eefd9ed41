"""Divergences between teacher and student: both KLs, Jensen-Shannon and the skewed ones. Native: csrc/cpu/mixture.h."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cmdp_fast import checks, reference
from cmdp_fast.cpu import in_huge_pages
from cmdp_fast.layout import SAVED, Mixture, Pair, unit_stride
from cmdp_fast.ops import backends
from cmdp_fast.ops.operator import Backward, operator
from cmdp_fast.ops.token_stats import token_stats
from cmdp_fast.reference import DIVERGENCES, DivergenceName, compute_dtype, divergence_weights

NO_SKEW = 2.0**-54  # 1 - beta is 1 up to this beta: a mixture of the teacher alone


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: DivergenceName = "jsd",
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: backends.BackendName | None = None,
) -> Tensor:
    """A divergence between the next-token distributions of student p and teacher w, in nats.

    | kind                | value                                                    |
    | ------------------- | -------------------------------------------------------- |
    | ``reverse_kl``      | KL(p‖w)                                                  |
    | ``forward_kl``      | KL(w‖p)                                                  |
    | ``jsd``             | beta KL(w‖M) + (1-beta) KL(p‖M), M = (1-beta) p + beta w |
    | ``skew_forward_kl`` | KL(w ‖ beta w + (1-beta) p)                              |
    | ``skew_reverse_kl`` | KL(p ‖ beta p + (1-beta) w)                              |

    Of ``jsd`` beta = 0 means the forward KL and beta = 1 the reverse KL, the convention of GKD and TRL; of the skewed
    ones beta is the alpha of DistiLLM. A mixture needs both normalisers before its logarithm, hence two passes over the
    logits.

    Args:
        student_logits, teacher_logits, mask, temperature, vocab_size, backend: as `token_stats`.
        kind: one of the names above.
        beta: in [0, 1], below 1 for the skewed ones (a skew of 0 is the plain KL); ignored for the two KLs. The share
            of p in ``skew_reverse_kl`` is 1 - (1 - beta), in float64 a multiple of 1.1e-16: up to a beta of 5.5e-17 it
            is 0, the plain KL.

    Returns:
        ``[...]`` float32 (float64 if either model's logits are float64), differentiable with respect to the
        student; the teacher receives no gradient. Masked rows are 0 with zero gradient.

    Raises:
        TypeError, ValueError: as `token_stats`, and for an unknown kind or a beta outside [0, 1].

    Source: Agarwal et al. 2024 (GKD), Ko et al. 2024 (DistiLLM).
    """
    vocab = checks.logits(student_logits, teacher_logits, vocab_size)
    shape = student_logits.shape[:-1]
    checks.mask(mask, student_logits, shape, "student_logits without its last axis")
    checks.positive("temperature", temperature)
    check_kind(kind, beta)
    plain = plain_kl(kind, beta)
    operation = "divergence" if plain is None else "token_stats"
    computed = compute_dtype(student_logits, teacher_logits)
    chosen = backends.choose_for_logits(backend, student_logits, computed, operation)
    if plain is not None:
        tokens = torch.zeros(shape, dtype=torch.int64, device=student_logits.device)
        stats = token_stats(
            student_logits,
            teacher_logits,
            tokens,
            mask=mask,
            temperature=temperature,
            vocab_size=vocab,
            backend=chosen,
        )
        return stats.reverse_kl if plain == "reverse_kl" else stats.forward_kl
    if chosen == "torch":
        return reference.divergence(
            student_logits, teacher_logits, kind, beta=beta, mask=mask, temperature=temperature, vocab_size=vocab
        )
    student, teacher = unit_stride(student_logits), unit_stride(teacher_logits.detach())
    pair = Pair(student, teacher, None, mask, float(temperature), vocab)
    return _mixture(_Given(pair, Mixture(*divergence_weights(kind, float(beta))), chosen)).value


def check_kind(kind: DivergenceName, beta: float) -> None:
    checks.choice("kind", kind, DIVERGENCES)
    checks.share("beta", beta)
    if kind.startswith("skew") and beta == 1:
        raise ValueError(f"{kind} with beta=1 compares a model with itself and is always 0; beta must be below 1")


def plain_kl(kind: DivergenceName, beta: float) -> Literal["reverse_kl", "forward_kl"] | None:
    """The KL that a divergence reduces to at the end of beta's range, or None."""
    if kind == "reverse_kl" or kind == "forward_kl":
        return kind
    if beta == 0 or (kind == "skew_reverse_kl" and beta <= NO_SKEW):
        return "reverse_kl" if kind == "skew_reverse_kl" else "forward_kl"
    return "reverse_kl" if kind == "jsd" and beta == 1 else None


# --------------------------------------------------------------------------------------------------------------
# The operators that torch sees


class _Given(NamedTuple):
    pair: Pair
    weights: Mixture
    backend: str


class Mixed(NamedTuple):
    """What an operator makes of rows of logits and their mixture."""

    value: Tensor  # [...]
    saved: Tensor  # [..., SAVED] float64: what the backward pass needs of each row
    mean: Tensor  # [...] float64, likewise


def mixed_room(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Mixed:
    """As much of it as there is before anything is computed: shapes and dtypes."""
    return Mixed(
        like.new_empty(shape, dtype=dtype),
        like.new_empty((*shape, SAVED), dtype=torch.float64),
        like.new_empty(shape, dtype=torch.float64),
    )


@operator("mixture_divergence")
def _mixture(given: _Given) -> Mixed:
    return Mixed(*backends.get(given.backend).mixture(given.pair, given.weights))


@_mixture.shapes
def _(given: _Given) -> Mixed:
    student, teacher = given.pair.student, given.pair.teacher
    return mixed_room(student, student.shape[:-1], compute_dtype(student, teacher))


class _Kept(NamedTuple):
    given: _Given
    saved: Tensor
    mean: Tensor


@_mixture.gradient(
    of=("value",),
    keep=lambda given, made: _Kept(given, made.saved, made.mean),
    operation="divergence",
    instead="divergence(backend='torch')",
)
def _(backward: Backward[_Kept]) -> dict[str, Tensor]:
    (upstream,) = backward.upstream
    assert upstream is not None
    return {"pair_student": _mixture_backward(_Upward(backward.kept, upstream))}


class _Upward(NamedTuple):
    kept: _Kept
    upstream: Tensor


@operator("mixture_divergence_backward")
def _mixture_backward(given: _Upward) -> Tensor:
    (pair, weights, backend), saved, mean = given.kept
    out = in_huge_pages(pair.student.new_empty(pair.student.shape))
    backends.get(backend).mixture_backward(pair, saved, mean, given.upstream, weights, out)
    return out


@_mixture_backward.shapes
def _(given: _Upward) -> Tensor:
    student = given.kept.given.pair.student
    return student.new_empty(student.shape)

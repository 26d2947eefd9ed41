"""Divergences between teacher and student: both KLs, Jensen-Shannon and the skewed ones. Native: csrc/cpu/mixture.h."""

from __future__ import annotations

import torch
from torch import Tensor

from cmdp_fast import checks, reference
from cmdp_fast.layout import SAVED, address, flat
from cmdp_fast.ops import backends
from cmdp_fast.ops.native import in_huge_pages, matrix, threads, unit_stride
from cmdp_fast.ops.token_stats import token_stats
from cmdp_fast.reference import DIVERGENCES, compute_dtype, divergence_weights


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str = "jsd",
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: str | None = None,
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
        beta: in [0, 1], below 1 for the skewed ones (a skew of 0 is the plain KL); ignored for the two KLs.

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
    plain = _plain_kl(kind, beta)
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
    weights = divergence_weights(kind, float(beta))
    value, _, _ = _mixture(
        unit_stride(student_logits),
        unit_stride(teacher_logits.detach()),
        mask,
        float(temperature),
        vocab,
        *weights,
        chosen,
    )
    return value


def check_kind(kind: str, beta: float) -> None:
    checks.choice("kind", kind, DIVERGENCES)
    checks.number("beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    if kind.startswith("skew") and beta == 1:
        raise ValueError(f"{kind} with beta=1 compares a model with itself and is always 0; beta must be below 1")


def _plain_kl(kind: str, beta: float) -> str | None:
    """The KL that a divergence reduces to at the end of beta's range, or None."""
    if kind in ("reverse_kl", "forward_kl"):
        return kind
    if kind == "jsd":
        return {0: "forward_kl", 1: "reverse_kl"}.get(beta)  # type: ignore[call-overload]
    return kind.removeprefix("skew_") if beta == 0 else None


@torch.library.custom_op("cmdp_fast::mixture_divergence", mutates_args=())
def _mixture(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    vocab_size: int,
    b: float,
    c_teacher: float,
    c_student: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        return backends.kernels.mixture(student, teacher, mask, temperature, vocab_size, (b, c_teacher, c_student))
    shape, dtype = student.shape[:-1], compute_dtype(student, teacher)
    saved = torch.empty((*shape, SAVED), dtype=torch.float64)
    value, mean = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    keep = flat(mask, torch.bool)
    pair = matrix(student), matrix(teacher)
    backends.native.token_stats(
        *pair, 0, address(keep), vocab_size, temperature, [0] * 6, True, address(saved), threads()
    )
    backends.native.mixture(
        *pair,
        address(keep),
        vocab_size,
        temperature,
        b,
        c_teacher,
        c_student,
        address(saved),
        address(value),
        address(mean),
        threads(),
    )
    return value.to(dtype), saved, mean


@_mixture.register_fake
def _(student, teacher, mask, temperature, vocab_size, b, c_teacher, c_student, backend):
    shape, dtype = student.shape[:-1], compute_dtype(student, teacher)
    wide = student.new_empty(shape, dtype=torch.float64)
    return student.new_empty(shape, dtype=dtype), student.new_empty((*shape, SAVED), dtype=torch.float64), wide


@torch.library.custom_op("cmdp_fast::mixture_divergence_backward", mutates_args=())
def _mixture_backward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    mean: Tensor,
    upstream: Tensor,
    temperature: float,
    vocab_size: int,
    b: float,
    c_teacher: float,
    c_student: float,
    backend: str,
) -> Tensor:
    out = in_huge_pages(student.new_empty(student.shape))
    if backend == "triton":
        weights = (b, c_teacher, c_student)
        backends.kernels.mixture_backward(
            student, teacher, mask, saved, mean, upstream, temperature, vocab_size, weights, out
        )
        return out
    keep, flowing = flat(mask, torch.bool), flat(upstream, torch.float64)
    backends.native.mixture_backward(
        matrix(student),
        matrix(teacher),
        address(keep),
        vocab_size,
        temperature,
        b,
        c_teacher,
        c_student,
        address(saved),
        address(mean),
        address(flowing),
        matrix(out),
        threads(),
    )
    return out


@_mixture_backward.register_fake
def _(student, *args):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, mask, *ctx.settings = inputs
    _, saved, mean = output
    ctx.mark_non_differentiable(saved, mean)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, mask, saved, mean)


def _backward(ctx, grad_value, _saved, _mean):
    nothing = (None,) * 8
    if not ctx.needs_input_grad[0] or grad_value is None:
        return (None, *nothing)
    student, teacher, mask, saved, mean = ctx.saved_tensors
    return (_mixture_backward(student, teacher, mask, saved, mean, grad_value, *ctx.settings), *nothing)


_mixture.register_autograd(_backward, setup_context=_setup_context)

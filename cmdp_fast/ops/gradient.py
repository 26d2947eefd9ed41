"""The gradient of student logits, of whole rows or a tile, from the saved scalars of whole rows, on every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmdp_fast.layout import address, flat
from cmdp_fast.ops import backends
from cmdp_fast.ops.native import matrix, threads

Upstream = Sequence[Tensor | None]  # of logprob, entropy, reverse_kl, forward_kl


def write_gradient(
    student: Tensor,  # [..., C]
    teacher: Tensor,  # [..., C], read only if reverse_kl or forward_kl has an upstream gradient
    tokens: Tensor,  # [...] indices into the whole vocabulary
    mask: Tensor | None,  # [...]
    saved: Tensor,  # [..., SAVED] of whole rows
    upstream: Upstream,  # [...] each, of logprob, entropy, reverse_kl, forward_kl
    temperature: float,
    width: int,  # columns that count; those beyond get 0
    out: Tensor,  # [..., C] of the student's dtype; may be the student's logits themselves
    backend: str,
    first_column: int = 0,
) -> None:
    """Writes d/d(student) of sum of upstream times statistics; the table of gradients is in cmdp_fast/reference.py."""
    if backend in backends.GPU:
        backends.GPU[backend].token_stats_backward(
            student, teacher, tokens, mask, saved, upstream, temperature, width, out, first_column
        )
        return
    if backend == "torch":
        counted = student[..., :width], teacher[..., :width]
        out[..., :width] = _gradient(*counted, tokens, mask, saved, upstream, first_column, temperature)
        out[..., width:] = 0
        return
    index, keep = flat(tokens, torch.int64), flat(mask, torch.bool)
    flowing = [flat(g, torch.float64) for g in upstream]
    backends.native.token_stats_backward(
        matrix(student),
        matrix(teacher),
        address(index),
        address(keep),
        width,
        temperature,
        [address(g) for g in flowing],
        address(saved),
        matrix(out),
        threads(),
        first_column,
    )


def _gradient(student, teacher, tokens, mask, saved, upstream, first_column, temperature) -> Tensor:
    m, n, log_z, log_u, entropy, reverse, _ = saved.unsqueeze(-2).unbind(-1)
    g_l, g_h, g_r, g_f = (None if g is None else g.double().unsqueeze(-1) for g in upstream)
    log_p = (student.double() / temperature - m) - log_z
    log_w = (teacher.double() / temperature - n) - log_u
    p = log_p.exp()
    used = p != 0  # true of a NaN
    total = torch.zeros_like(p)
    if g_l is not None:
        own = (tokens.long() - first_column).unsqueeze(-1) == torch.arange(student.shape[-1], device=student.device)
        total += g_l * (own.double() - p)
    if g_h is not None:
        total -= g_h * (p * (log_p + entropy)).where(used, 0.0)
    if g_r is not None:
        # Where R is infinite so is its gradient, which would poison the step: it passes none.
        finite = used & ~torch.isposinf(reverse)
        total += g_r * (p * (log_p - log_w - reverse)).where(finite, 0.0)
    if g_f is not None:
        total += g_f * (p - log_w.exp())
    total /= temperature
    return total if mask is None else total.where(mask.unsqueeze(-1), 0.0)

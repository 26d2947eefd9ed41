"""`token_stats` of logits whose columns lie on several ranks: each folds its own, and the states are reduced."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cmdp_fast import checks
from cmdp_fast.layout import SAVED
from cmdp_fast.ops import backends, parallel
from cmdp_fast.ops.gradient import write_gradient
from cmdp_fast.ops.native import in_huge_pages, unit_stride
from cmdp_fast.ops.token_state import TokenState, all_reduced, fold_tile, saved_scalars, statistics
from cmdp_fast.reference import TokenStats, compute_dtype


def sharded_token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    vocab_size: int | None,
    process_group: dist.ProcessGroup | None,
    first_column: int,
    backend: str | None,
) -> TokenStats:
    """`token_stats` with ``process_group``: the arguments are described there."""
    student, teacher = (
        t.shape[-1] if isinstance(t, Tensor) and t.dim() else 0 for t in (student_logits, teacher_logits)
    )
    checks.logits(student_logits, teacher_logits, None if vocab_size is None else min(student, teacher))
    checks.tokens(tokens, student_logits)
    checks.mask(mask, tokens, tokens.shape, "tokens")
    checks.positive("temperature", temperature)
    computed = compute_dtype(student_logits, teacher_logits)
    chosen = backends.choose_for_logits(backend, student_logits, computed, "token_stats(process_group=...)")
    width, vocab = parallel.columns(student, teacher, vocab_size, process_group, first_column, tokens, mask)
    outputs = _sharded_token_stats(
        unit_stride(student_logits),
        unit_stride(teacher_logits.detach()),
        tokens,
        mask,
        float(temperature),
        width,
        vocab,
        first_column,
        parallel.name_of(process_group),
        chosen,
    )
    return TokenStats(*outputs[:6])


@torch.library.custom_op("cmdp_fast::sharded_token_stats", mutates_args=())
def _sharded_token_stats(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    width: int,
    vocab_size: int,
    first_column: int,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if tokens.device.type == "cpu":
        checks.token_range(tokens, mask, vocab_size)
    index, keep = tokens.flatten().long(), None if mask is None else mask.flatten()
    fields = TokenState.empty(len(index), device=tokens.device).fields
    if width > 0:
        x, y = student[..., :width], teacher[..., :width]
        fold_tile(fields, x, y, index, first_column, temperature, backend, keep)
    fields = all_reduced(fields, parallel.group_named(group))
    stats = statistics(fields)
    values = (*(value.to(compute_dtype(student, teacher)) for value in stats), saved_scalars(fields, stats))
    if keep is not None:
        values = tuple(v.where(keep.view(-1, *[1] * (v.dim() - 1)), 0.0) for v in values)
    return tuple(v.reshape((*tokens.shape, *v.shape[1:])) for v in values)  # type: ignore[return-value]


@_sharded_token_stats.register_fake
def _(student, teacher, tokens, *settings):
    dtype = compute_dtype(student, teacher)
    statistics = [student.new_empty(tokens.shape, dtype=dtype) for _ in range(6)]
    return (*statistics, student.new_empty((*tokens.shape, SAVED), dtype=torch.float64))


@torch.library.custom_op("cmdp_fast::sharded_token_stats_backward", mutates_args=())
def _sharded_token_stats_backward(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_reverse_kl: Tensor | None,
    grad_forward_kl: Tensor | None,
    temperature: float,
    width: int,
    first_column: int,
    backend: str,
) -> Tensor:
    out = in_huge_pages(student.new_empty(student.shape))
    if width == 0:  # a rank beyond the common prefix
        return out.zero_()
    upstream = (grad_logprob, grad_entropy, grad_reverse_kl, grad_forward_kl)
    write_gradient(student, teacher, tokens, mask, saved, upstream, temperature, width, out, backend, first_column)
    return out


@_sharded_token_stats_backward.register_fake
def _(student, *args):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, tokens, mask, temperature, width, _, first_column, _, backend = inputs
    _, teacher_logprob, _, teacher_entropy, _, _, saved = output
    ctx.mark_non_differentiable(teacher_logprob, teacher_entropy, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, tokens, mask, saved)
    ctx.settings = (temperature, width, first_column, backend)


def _backward(ctx, grad_logprob, _teacher_logprob, grad_entropy, _teacher_entropy, grad_reverse, grad_forward, _saved):
    upstream = (grad_logprob, grad_entropy, grad_reverse, grad_forward)
    if not ctx.needs_input_grad[0] or all(g is None for g in upstream):
        return (None,) * 10
    return (_sharded_token_stats_backward(*ctx.saved_tensors, *upstream, *ctx.settings), *(None,) * 9)


_sharded_token_stats.register_autograd(_backward, setup_context=_setup_context)

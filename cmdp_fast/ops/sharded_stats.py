"""`token_stats` of logits whose columns lie on several ranks: each folds its own, and the states are reduced."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from cmdp_fast import checks, states
from cmdp_fast.cpu import in_huge_pages
from cmdp_fast.layout import Pair, Upstream, unit_stride
from cmdp_fast.ops import backends, parallel
from cmdp_fast.ops.operator import Backward, operator
from cmdp_fast.ops.statistics import DIFFERENTIABLE, Scored, room_of, scored
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
    alike = parallel.Alike(float(temperature), computed)
    width, vocab = parallel.columns(student, teacher, vocab_size, process_group, first_column, tokens, mask, alike)
    pair = Pair(
        unit_stride(student_logits), unit_stride(teacher_logits.detach()), tokens, mask, float(temperature), width
    )
    group = parallel.name_of(process_group)
    return _sharded_token_stats(_Given(pair, vocab, first_column, group, chosen)).stats


class _Given(NamedTuple):
    pair: Pair
    vocab_size: int  # columns of all ranks
    first_column: int
    group: str
    backend: str


@operator("sharded_token_stats")
def _sharded_token_stats(given: _Given) -> Scored:
    pair = given.pair
    assert pair.tokens is not None
    if pair.tokens.device.type == "cpu":
        checks.token_range(pair.tokens, pair.mask, given.vocab_size)
    index, counted = pair.tokens.flatten().long(), None if pair.mask is None else pair.mask.flatten()
    fields = states.empty(len(index), pair.tokens.device)
    if pair.width > 0:
        x, y = pair.student[..., : pair.width], pair.teacher[..., : pair.width]
        tile = Pair(x, y, index, counted, pair.temperature, pair.width)
        backends.get(given.backend).update_states(tile, given.first_column, fields)
    fields = parallel.all_reduced(fields, parallel.group_named(given.group))
    stats = states.statistics(fields)
    dtype = compute_dtype(pair.student, pair.teacher)
    values = [*(value.to(dtype) for value in stats), states.saved_scalars(fields, stats)]
    if counted is not None:
        values = [v.where(counted.view(-1, *[1] * (v.dim() - 1)), 0.0) for v in values]
    *six, saved = (v.reshape((*pair.tokens.shape, *v.shape[1:])) for v in values)
    return scored(six, saved)


@_sharded_token_stats.shapes
def _(given: _Given) -> Scored:
    return room_of(given.pair)


class _Kept(NamedTuple):
    pair: Pair
    saved: Tensor
    first_column: int
    backend: str


@_sharded_token_stats.gradient(
    of=DIFFERENTIABLE,
    keep=lambda given, made: _Kept(given.pair, made.saved, given.first_column, given.backend),
    operation="token_stats",
)
def _(backward: Backward[_Kept]) -> dict[str, Tensor]:
    return {"pair_student": _sharded_token_stats_backward(_Upward(backward.kept, Upstream(*backward.upstream)))}


class _Upward(NamedTuple):
    kept: _Kept
    upstream: Upstream


@operator("sharded_token_stats_backward")
def _sharded_token_stats_backward(given: _Upward) -> Tensor:
    pair, saved, first_column, backend = given.kept
    out = in_huge_pages(pair.student.new_empty(pair.student.shape))
    if pair.width == 0:  # a rank beyond the common prefix
        return out.zero_()
    backends.get(backend).token_stats_backward(pair, saved, given.upstream, out, first_column)
    return out


@_sharded_token_stats_backward.shapes
def _(given: _Upward) -> Tensor:
    return given.kept.pair.student.new_empty(given.kept.pair.student.shape)

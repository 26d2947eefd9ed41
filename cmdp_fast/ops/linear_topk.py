"""Statistics from a teacher's k most likely tokens, of hidden states and a head: the logits exist a tile at a time.

    for columns of the vocabulary, for rows:     x = the tile of the student's logits
        forward:   fold x into the rows' tails, and pick the listed columns
        backward:  x <- the gradient of x;   hidden gradient += x W;   head gradient[columns] += x^T hidden

Everything but the operators is that of `topk_stats`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from cmdp_fast import checks, tails
from cmdp_fast.heads import Head
from cmdp_fast.layout import ListedRows, TailGradient
from cmdp_fast.ops import backends, gemm, head_gradient, projection
from cmdp_fast.ops.head_gradient import Gradients, Needed, Tile, by_name, finished, sum_over_tiles
from cmdp_fast.ops.linear_divergence import check_whole
from cmdp_fast.ops.linear_tiles import StudentRows, Tiles, computed_dtype
from cmdp_fast.ops.operator import Backward, operator
from cmdp_fast.ops.projection import Factors, StudentHeadSettings, head_given
from cmdp_fast.ops.topk_stats import (
    DIFFERENTIABLE,
    FoldedTail,
    Settings,
    TailUpstream,
    check_topk,
    folded,
    received,
    statistics,
    tail_gradient,
    tail_room,
)
from cmdp_fast.tails import Tail, TailState
from cmdp_fast.topk_bounds import TopkStats


def linear_topk_stats(
    student_hidden: Tensor,
    student_weight: Tensor | Head,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    top_k: int | None = None,
    min_logprob: Tensor | float | None = None,
    backend: backends.BackendName | None = None,
    **head: Unpack[StudentHeadSettings],
) -> TopkStats:
    """`topk_stats` of the logits that the student's head would give, without the logits.

    They exist a tile at a time, and are made again in the backward pass: four products of rows x V x H, and memory
    that does not grow with rows x V. ``CMDP_FAST_TILE_BYTES`` as in `linear_token_stats`.

    Args:
        student_hidden: ``[..., H]`` the last hidden states (after the final norm): float32, bfloat16, float16, float64.
        student_weight: the head: a `Head` (from `head_of`), or its weight ``[V, H]``, whole: of a DTensor pass
            ``weight.full_tensor(grad_placements=[Partial("avg")])``.
        topk_ids, topk_logprobs, tokens, temperature, top_k, min_logprob, backend: as `topk_stats`.
        student_bias, student_softcap, student_scale: as `linear_token_stats`.
        mask: ``[...]`` bool, False = the row is left out of every product; its statistics and gradient are exactly 0.
            Finding the rows that count makes the host wait for a GPU.
        vocab_size: the columns that both models have. Rows of the head beyond it get a gradient of 0.

    Returns:
        `TopkStats` of tensors ``[...]`` in nats: float32, or float64 if hidden states, head or log-probabilities are.
        ``logprob, entropy, forward_kl, reverse_kl`` are differentiable with respect to ``student_hidden``,
        ``student_weight`` and ``student_bias``, together, in one backward pass; what needs no gradient costs nothing.
        The bounds are those for the logits as they come out of the product.

    Precision and autocast: as `linear_token_stats`. NaN in a row of hidden states makes that row NaN, and the whole
    gradient of the head.

    Raises:
        TypeError, ValueError: as `linear_token_stats` and `topk_stats`; for a head that is a DTensor.

    Source: as `topk_stats`.
    """
    unknown = sorted(set(head) - set(StudentHeadSettings.__annotations__))
    if unknown:
        raise TypeError(f"linear_topk_stats() got an unexpected keyword argument {unknown[0]!r}")
    student = Factors(student_hidden, head_given("student", student_weight, head))
    check_whole("linear_topk_stats", student.head, student.head)
    projection.check_model("student", student)
    check_topk(topk_ids, topk_logprobs, tokens, student_hidden, "student_hidden")
    columns = student.head.weight.shape[0]
    width = columns if vocab_size is None else vocab_size
    checks.prefix(width, columns, columns)
    rows = StudentRows(student.settled(), mask, width, gemm.autocast_dtype(student_hidden.device))
    computed = computed_dtype(rows.student, rows.student)  # no property of `rows`: torch 2.8 traces into none
    chosen = backends.choose_for_logits(backend, student_hidden, computed, "linear_topk_stats")
    settings = Settings(mask, temperature, width, top_k, min_logprob)
    message = received(topk_ids, topk_logprobs, tokens, settings)
    return statistics(_linear_tail(_Given(rows, message.ids, tokens, float(temperature), chosen)), message, computed)


# --------------------------------------------------------------------------------------------------------------
# The operators that torch sees


class _Given(NamedTuple):
    rows: StudentRows
    ids: Tensor
    tokens: Tensor
    temperature: float
    backend: str


class _Listed(NamedTuple):
    """The rows that count, as `ListedRows` of a tile need them."""

    ids: Tensor
    tokens: Tensor

    def of(self, logits: Tensor, rows: slice, temperature: float) -> ListedRows:
        return ListedRows(logits, self.ids[rows], self.tokens[rows], None, temperature, logits.shape[-1])


def _listed(given: _Given, tiles: Tiles) -> _Listed:
    return _Listed(tiles.compact(given.ids, 1).contiguous(), tiles.compact(given.tokens).long().contiguous())


@operator("linear_tail")
def _linear_tail(given: _Given) -> Tail:
    tokens = given.tokens
    if tokens.device.type == "cpu":
        checks.token_range(tokens, given.rows.mask, given.rows.width)
    with torch.autocast(tokens.device.type, enabled=False):
        tiles = Tiles(given.rows)
        listed = _listed(given, tiles)
        state = tails.empty(tiles.count, given.ids.shape[-1], tokens.device)
        for columns in tiles.columns:
            tiles.student.select(columns)
            for rows in tiles.rows:
                tile = listed.of(tiles.student.logits(rows), rows, given.temperature)
                part = TailState(*(t[rows] for t in state))
                backends.get(given.backend).update_tails(tile, columns.start, part)
        return Tail(*(tiles.spread(t) for t in tails.finished(state)))


@_linear_tail.shapes
def _(given: _Given) -> Tail:
    return tail_room(given.ids)


class _Kept(NamedTuple):
    given: _Given
    tail: FoldedTail


@_linear_tail.gradient(
    of=DIFFERENTIABLE, keep=lambda given, made: _Kept(given, folded(made)), operation="linear_topk_stats"
)
def _(backward: Backward[_Kept]) -> dict[str, Tensor]:
    kept, upstream = backward.kept, TailUpstream(*backward.upstream)
    return by_name(
        "rows_student", backward.needed, lambda needed: _linear_tail_backward(_Upward(kept, upstream, needed))
    )


class _Upward(NamedTuple):
    kept: _Kept
    upstream: TailUpstream
    needed: Needed


@operator("linear_tail_backward")
def _linear_tail_backward(given: _Upward) -> Gradients:
    """Gradients of hidden states, head and bias."""
    (inputs, tail), upstream, needed = given
    student = inputs.rows.student
    with torch.autocast(student.hidden.device.type, enabled=False):
        tiles = Tiles(inputs.rows)
        listed = _listed(inputs, tiles)
        tail = FoldedTail(*(tiles.compact(t) for t in tail))
        arrived = [
            None if g is None else tiles.compact(g, 1 if name == "listed" else 0) for name, g in _named(upstream)
        ]
        factor = tiles.student.upstream_scale / inputs.temperature
        gradient = tail_gradient(listed.ids, listed.tokens, tail, TailUpstream(*arrived), factor)

        def write(tile: Tile) -> None:
            rows = listed.of(tile.student, tile.rows, inputs.temperature)
            part = TailGradient(*(t[tile.rows] for t in gradient))
            backends.get(inputs.backend).tail_backward(rows, part, tile.out, tile.columns.start)

        return finished(sum_over_tiles(tiles, student.head.weight, needed, write, alone=True), tiles, student)


def _named(upstream: TailUpstream) -> list[tuple[str, Tensor | None]]:
    return list(zip(TailUpstream._fields, upstream, strict=True))


@_linear_tail_backward.shapes
def _(given: _Upward) -> Gradients:
    return head_gradient.room(given.kept.given.rows.student, given.needed)

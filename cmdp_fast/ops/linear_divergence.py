"""Divergences from hidden states and heads: the logits of both models exist for some rows, or a tile, at a time.

    forward, for rows:                       x, y = both models' logits of all columns; value and normalisers
    backward, for columns, for rows:         x, y = a tile of both models' logits;  x <- the gradient of x
                                             hidden gradient += x W;   head gradient[columns] += x^T hidden

A mixture's logarithm needs both normalisers first, so the forward pass reads whole rows twice. The backward pass has
the normalisers, 8 numbers per row, and goes through columns as that of `linear_token_stats` does: the float32 sum of
the head's gradient is never wider than a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from cmdp_fast import checks
from cmdp_fast.heads import Head
from cmdp_fast.layout import Mixture, Pair
from cmdp_fast.ops import backends, gemm, head_gradient, parallel, projection
from cmdp_fast.ops.divergence import Mixed, check_kind, mixed_room, plain_kl
from cmdp_fast.ops.head_gradient import Gradients, Needed, Tile, by_name, finished, sum_over_tiles
from cmdp_fast.ops.linear import linear_token_stats
from cmdp_fast.ops.linear_tiles import Rows, Tiles, computed_dtype
from cmdp_fast.ops.operator import Backward, operator
from cmdp_fast.ops.projection import Factors, HeadSettings, head_given
from cmdp_fast.reference import DivergenceName, divergence_weights

SERVES_SHARDS = "linear_token_stats has reverse_kl and forward_kl of heads whose columns lie on several ranks"


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | Head,
    kind: DivergenceName = "jsd",
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: backends.BackendName | None = None,
    **heads: Unpack[HeadSettings],
) -> Tensor:
    """`divergence` of the logits that two language-model heads would give, without the logits of all rows.

    The two KLs, and the ends of beta's range that mean one, are those of `linear_token_stats`. Every other kind has six
    products of rows x V x H, as `linear_token_stats` has. Its forward pass holds both models' logits of some rows, at
    most 256 MiB of them on a CPU and 1 GiB on a GPU, or ``CMDP_FAST_TILE_BYTES``; the backward pass holds a tile, and
    8 numbers per row are kept for it. (The ``torch`` backend adds temporaries in float64, some 400 MB.) Neither memory
    grows with rows x V, nor the sums of the head's gradient in float32 with its width.

    Args:
        student_hidden: ``[..., H]`` the last hidden states (after the final norm): float32, bfloat16, float16, float64.
        student_weight: the head: a `Head` (from `head_of`), or its weight ``[V, H]``. For a mixture it
            must be whole: of a DTensor pass ``weight.full_tensor(grad_placements=[Partial("avg")])``, whose gradient is
            the mean of the ranks', whether each has rows of its own (FSDP) or all have the same (tensor parallelism).
        teacher_hidden, teacher_weight: ``[..., H']``, and a `Head` or ``[V', H']``, of their own width and dtypes;
            V' = V unless ``vocab_size`` is given.
        kind, beta: as `divergence`.
        student_bias, teacher_bias, student_softcap, teacher_softcap: as `linear_token_stats`.
        student_scale, teacher_scale, temperature, backend: as `linear_token_stats`.
        mask: ``[...]`` bool, False = the row is left out of every product; its value and gradient are exactly 0.
            Finding the rows that count makes the host wait for a GPU.
        vocab_size: the divergence over the common prefix of this width. Rows of the head beyond it get a gradient of 0.

    Returns:
        ``[...]`` in nats: float32, or float64 if a hidden state or head is float64. Differentiable with respect to
        ``student_hidden``, ``student_weight`` and ``student_bias``, together in one backward pass; what needs no
        gradient costs nothing. The teacher never receives one. Reverse mode only, no second derivative.

    Precision and autocast: as `linear_token_stats`. NaN in a row of hidden states makes that row NaN, and the whole
    gradient of the head.

    Raises:
        TypeError, ValueError: as `linear_token_stats` and `divergence`; for a mixture, a head that is a DTensor.

    Source: Agarwal et al. 2024 (GKD), Ko et al. 2024 (DistiLLM).
    """
    unknown = sorted(set(heads) - set(HeadSettings.__annotations__))
    if unknown:
        serves = f"; {SERVES_SHARDS}" if unknown[0] in ("first_column", "process_group") else ""
        raise TypeError(f"linear_divergence() got an unexpected keyword argument {unknown[0]!r}{serves}")
    student = Factors(student_hidden, head_given("student", student_weight, heads))
    teacher = Factors(teacher_hidden, head_given("teacher", teacher_weight, heads))
    shape = checks.tensor("student_hidden", student_hidden).shape[:-1]
    checks.mask(mask, student_hidden, shape, "student_hidden without its last axis")
    check_kind(kind, beta)
    plain = plain_kl(kind, beta)
    if plain is not None:
        stats = linear_token_stats(
            student_hidden,
            student.head,
            teacher_hidden,
            teacher.head,
            torch.zeros(shape, dtype=torch.int64, device=student_hidden.device),
            mask=mask,
            temperature=temperature,
            vocab_size=vocab_size,
            backend=backend,
        )
        return stats.reverse_kl if plain == "reverse_kl" else stats.forward_kl
    check_whole(f"linear_divergence(kind={kind!r})", student.head, teacher.head)
    projection.check(student, teacher)
    checks.positive("temperature", temperature)
    chosen = backends.choose_for_logits(backend, student_hidden, computed_dtype(student, teacher), "linear_divergence")
    width = projection.common_width(student.head.weight.shape[0], teacher.head.weight.shape[0], vocab_size)
    autocast = gemm.autocast_dtype(student_hidden.device)
    rows = Rows(student.settled(), teacher.detached().settled(), mask, width, autocast)
    weights = Mixture(*divergence_weights(kind, float(beta)))
    return _linear_divergence(_Given(rows, float(temperature), weights, chosen)).value


def check_whole(name: str, student: Head, teacher: Head) -> None:
    """Raises ValueError for a head that lies on several ranks."""
    if parallel.any_sharded(student, teacher):
        raise ValueError(
            f"{name} takes whole heads, got a DTensor: pass weight.full_tensor(grad_placements=[Partial('avg')]); "
            f"{SERVES_SHARDS}"
        )


# --------------------------------------------------------------------------------------------------------------
# The operators that torch sees


class _Given(NamedTuple):
    rows: Rows
    temperature: float
    weights: Mixture
    backend: str


@operator("linear_divergence")
def _linear_divergence(given: _Given) -> Mixed:
    with torch.autocast(given.rows.student.hidden.device.type, enabled=False):
        tiles = Tiles(given.rows)
        made = _room(given, torch.Size([tiles.count]))
        for rows in tiles.whole_rows():
            x, y = (model.whole(rows, tiles.columns) for model in (tiles.student, tiles.teacher))
            pair = Pair(x, y, None, None, given.temperature, tiles.width)
            for total, part in zip(made, backends.get(given.backend).mixture(pair, given.weights), strict=True):
                total[rows] = part
        return Mixed(*(tiles.spread(t) for t in made))


@_linear_divergence.shapes
def _(given: _Given) -> Mixed:
    return _room(given, given.rows.student.hidden.shape[:-1])


def _room(given: _Given, shape: torch.Size) -> Mixed:
    student, teacher = given.rows.student, given.rows.teacher
    return mixed_room(student.hidden, shape, computed_dtype(student, teacher))


class _Kept(NamedTuple):
    given: _Given
    saved: Tensor
    mean: Tensor


@_linear_divergence.gradient(
    of=("value",),
    keep=lambda given, made: _Kept(given, made.saved, made.mean),
    instead="divergence(backend='torch') of the logits",
)
def _(backward: Backward[_Kept]) -> dict[str, Tensor]:
    (upstream,) = backward.upstream
    assert upstream is not None
    kept = backward.kept
    return by_name(
        "rows_student", backward.needed, lambda needed: _linear_divergence_backward(_Upward(kept, upstream, needed))
    )


class _Upward(NamedTuple):
    kept: _Kept
    upstream: Tensor
    needed: Needed


@operator("linear_divergence_backward")
def _linear_divergence_backward(given: _Upward) -> Gradients:
    (inputs, saved, mean), upstream, needed = given
    student = inputs.rows.student
    with torch.autocast(student.hidden.device.type, enabled=False):
        tiles = Tiles(inputs.rows)
        saved, mean = tiles.compact(saved, 1).contiguous(), tiles.compact(mean).contiguous()
        arriving = tiles.student.upstream_scale * tiles.compact(upstream).double()

        def write(tile: Tile) -> None:
            rows, width = tile.rows, tile.columns.stop - tile.columns.start
            pair = Pair(tile.student, tile.teacher, None, None, inputs.temperature, width)
            backend = backends.get(inputs.backend)
            backend.mixture_backward(pair, saved[rows], mean[rows], arriving[rows], inputs.weights, tile.out)

        gradient = sum_over_tiles(tiles, student.head.weight, needed, write)
        return finished(gradient, tiles, student)


@_linear_divergence_backward.shapes
def _(given: _Upward) -> Gradients:
    return head_gradient.room(given.kept.given.rows.student, given.needed)

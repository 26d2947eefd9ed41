"""Token statistics from hidden states and heads: the logits of both models exist a tile at a time.

    for columns of the vocabulary:            (a piece of either head, converted once)
        for rows:
            x, y = the tile of both models' logits          two GEMMs into memory that is reused
            forward:   fold x, y into the rows' states
            backward:  x <- the gradient of x;   hidden gradient += x W;   head gradient[columns] += x^T hidden

Columns are the outer loop, so that a piece of the head's gradient is complete, and can be cast and left, once the rows
have passed: its float32 accumulator is never wider than a tile. One loop serves every device; tile_size.py says how
large a tile is, gemm.py in what dtype it is multiplied, and kept_logits.py which logits the backward pass finds where
the forward pass left them.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from cmdp_fast import checks, states
from cmdp_fast.compiling import replaced
from cmdp_fast.cpu import in_huge_pages
from cmdp_fast.heads import Head
from cmdp_fast.layout import Pair, Upstream
from cmdp_fast.ops import backends, gemm, head_gradient, kept_logits, parallel, projection
from cmdp_fast.ops.head_gradient import Gradients, Needed, Tile, by_name, finished, sum_over_tiles
from cmdp_fast.ops.kept_logits import Logits
from cmdp_fast.ops.linear_tiles import Batch, Tiles, computed_dtype, kept_dtypes, room_for_logits
from cmdp_fast.ops.operator import Backward, operator
from cmdp_fast.ops.projection import Factors, HeadSettings, head_given
from cmdp_fast.ops.statistics import DIFFERENTIABLE, Scored, room, scored
from cmdp_fast.reference import TokenStats


class LinearSettings(HeadSettings, total=False):
    """The settings of `linear_token_stats` that `linear_constrained_reward` hands on, as keywords."""

    temperature: float
    vocab_size: int | None
    process_group: dist.ProcessGroup | None
    first_column: int
    reduce_hidden_grad: bool
    saved: kept_logits.Saved


def linear_token_stats(
    student_hidden: Tensor,
    student_weight: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | Head,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    first_column: int = 0,
    reduce_hidden_grad: bool = True,
    saved: kept_logits.Saved = "recompute",
    backend: backends.BackendName | None = None,
    **heads: Unpack[HeadSettings],
) -> TokenStats:
    """`token_stats` of the logits that two language-model heads would give, without the logits.

    A model's logits are ``scale * (hidden W^T + bias)``, then ``softcap * tanh(logits / softcap)`` if it has a softcap
    (the order of Cohere, Granite and Gemma in transformers), then divided by the temperature. They exist a tile at a
    time, and are made again in the backward pass: six products of rows x V x H instead of four, and memory that does
    not grow with rows x V. Where there is memory for logits, ``saved`` keeps the teacher's or both models' and saves
    one product or two.

    A pair of tiles is sized for the last-level cache of a CPU. On a GPU it takes up to 1 GiB, less than an eighth of
    what is free, with the gradient's tile and the pieces of the heads less than half of it. ``CMDP_FAST_TILE_BYTES``
    sets the bytes of a pair. The size changes results by no more than rounding. A GPU with less than 8 GiB free gets
    smaller tiles, so set it where the last bits must not depend on what else is in memory.

    ``logprob, entropy, reverse_kl, forward_kl`` are differentiable with respect to ``student_hidden``,
    ``student_weight`` and ``student_bias``; what needs no gradient costs nothing. The teacher never receives one.
    Reverse mode only, no second derivative.

    Args:
        student_hidden: ``[..., H]`` the last hidden states (after the final norm): float32, bfloat16, float16, float64.
        student_weight: the head: a `Head` (from `head_of`), which is right for every model, or its weight ``[V, H]``,
            of any of these dtypes. With ``process_group``, this rank's rows of it. Or a DTensor sharded over its rows
            (``Shard(0)`` of a one-dimensional mesh), likewise the bias: then group and columns are those of the
            DTensor, and so is the gradient.
        teacher_hidden, teacher_weight: ``[..., H']``, and a `Head` or ``[V', H']``, of their own width and dtypes;
            V' = V unless ``vocab_size`` is given.
        tokens: ``[...]`` integers in [0, vocab_size). Masked tokens may hold anything.
        student_bias, teacher_bias: ``[V]``, ``[V']``. A bias of -inf excludes a column of a model
            without a softcap; with one the column's logit is -softcap. Bias, softcap and scale come with a `Head` and
            are refused beside one.
        mask: ``[...]`` bool, False = the row is left out of every product; its statistics and gradient are exactly 0.
            Finding the rows that count makes the host wait for a GPU.
        temperature, student_softcap, teacher_softcap, student_scale, teacher_scale: as above.
        vocab_size: statistics over the common prefix of this width. Rows of the head beyond it get a gradient of 0.
        process_group: ranks that hold columns [first_column, first_column + V) of the vocabulary each, and the same
            hidden states, tokens, mask and settings (tensor parallelism). For a head that is sharded to save memory
            while each rank has its own rows (FSDP) pass the whole head,
            ``weight.full_tensor(grad_placements=[Partial("avg")])``: without the placements its gradient would be that
            of some ranks' rows alone. A few numbers are exchanged and looked at first, so that ranks that do not fit
            raise instead of waiting for each other; then two all-reduces of 13 numbers per row. Every rank gets the
            statistics. Not under ``torch.compile``.
        first_column: where this rank's columns begin.
        reduce_hidden_grad: whether ``student_hidden``'s gradient is summed over the ranks. Each rank's columns give a
            part of it, and autograd expects the whole, hence True. False for hidden states that went through an
            operation whose backward pass sums them itself, such as Megatron's copy to the tensor-parallel region or
            the gather of a sequence-parallel region: they would be summed twice.
        saved: what the backward pass has of the forward pass. ``recompute``: a few numbers per row; both models' logits
            are made again. ``teacher``: the teacher's logits, rows x V numbers of the dtype that its hidden states and
            head are multiplied in (2 bytes in half precision on a GPU, 4 on a CPU). Both passes read these rounded
            logits, so the gradient is that of the statistics returned. ``tiles``: both models' logits, 4 bytes each (8
            in float64). ``auto``: the last of these that takes no more than half of the memory that is free at the
            call (under ``torch.compile``: while the graph is made), ``recompute`` where the system does not tell; the
            logger ``cmdp_fast`` says at level INFO what was chosen and why. The gradient of the logits exists a tile at
            a time in any case. Nothing is kept where no gradient is asked for. Where neither divergence has an upstream
            gradient, the backward pass neither makes nor reads the teacher's logits.
        backend: None chooses: ``cpu`` (native) for CPU tensors, ``triton`` on a GPU (not float64), else ``torch``; a
            name forces it. GEMMs are PyTorch's.

    Returns:
        `TokenStats` of tensors ``[...]``: float32, or float64 if a hidden state or head is float64.

    Precision: products are summed in float32 (float64 if any of the above is float64) for inputs of every dtype, and so
    are all gradients, which are cast once, at the end. Under autocast hidden states and heads are rounded to its dtype,
    so that the factors are those that ``torch.nn.functional.linear`` would multiply, while the logits are not rounded
    afterwards; biases and inputs of float64 are left as they are, and one float64 among hidden states and heads
    makes all of it float64. The backward pass has the factors of the forward pass, whatever is on then. On a CPU
    factors in half precision are widened to float32 a piece at a time. On a GPU hidden states and head are multiplied
    in their common dtype, or in that of autocast; a float32 head is then converted a piece at a time and its gradient
    summed in float32. The logits come out in float32; the gradient of a tile of them is rounded to the factors' dtype
    once, by the kernel that writes it, a head's scale included (with a softcap: after its chain rule in float32).
    Without autocast a float32 head makes the products of bfloat16 hidden states float32, which on a GPU are
    12 to 15 times slower. PyTorch before 2.8, and devices without float32 products of half-precision factors, round
    logits and every tile's share of a gradient to the factors' dtype; a RuntimeWarning says so.

    Special values: as `token_stats`, of the logits. NaN in a row of hidden states makes that row NaN, and the whole
    gradient of the head.

    Raises:
        TypeError, ValueError: as `token_stats`; widths that do not fit; ranks that hold different tokens, or columns
            that overlap or leave a gap, or another vocab_size, temperature, reduce_hidden_grad or dtype of the
            statistics: every rank raises.

    Source: the states merge as in csrc/token_state.h; tiles of a head as in Wijmans et al. 2024, arXiv 2411.09009
    (cut cross-entropy), for one model and one statistic.
    """
    unknown = sorted(set(heads) - set(HeadSettings.__annotations__))
    if unknown:
        raise TypeError(f"linear_token_stats() got an unexpected keyword argument {unknown[0]!r}")
    student = Factors(student_hidden, head_given("student", student_weight, heads))
    teacher = Factors(teacher_hidden, head_given("teacher", teacher_weight, heads))
    sharded = parallel.shards(student.head, teacher.head)
    if sharded is not None:
        if process_group is not None or first_column != 0:
            raise ValueError("a DTensor head brings its own process group and columns; do not pass them as well")
        (student_head, teacher_head), process_group, first_column = sharded
        student, teacher = replaced(student, head=student_head), replaced(teacher, head=teacher_head)
    projection.check(student, teacher)
    checks.tokens(tokens, student_hidden, "student_hidden")
    checks.mask(mask, tokens, tokens.shape, "tokens")
    checks.positive("temperature", temperature)
    checks.choice("saved", saved, get_args(kept_logits.Saved))
    computed = computed_dtype(student, teacher)
    chosen = backends.choose_for_logits(backend, student_hidden, computed, "linear_token_stats")
    widths = student.head.weight.shape[0], teacher.head.weight.shape[0]
    alike = parallel.Alike(float(temperature), computed, bool(reduce_hidden_grad))
    width, vocab = parallel.columns(*widths, vocab_size, process_group, first_column, tokens, mask, alike)
    batch = Batch(
        student.settled(),
        teacher.detached().settled(),
        tokens,
        mask,
        float(temperature),
        width,
        first_column,
        gemm.autocast_dtype(student_hidden.device),
        saved if _differentiates(student) else "recompute",
        chosen,
    )
    if batch.saved == "auto":
        dtypes = kept_dtypes(replaced(batch, saved="teacher"))
        batch = replaced(batch, saved=kept_logits.choose(tokens.device, tokens.numel(), width, dtypes))
    given = _Given(batch, vocab, parallel.name_of(process_group), reduce_hidden_grad)
    return _linear_token_stats(given).scored.stats


def _differentiates(student: Factors) -> bool:
    """Whether there will be a backward pass."""
    weight, bias = student.head.weight, student.head.bias
    needs = student.hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return needs and torch.is_grad_enabled()


# --------------------------------------------------------------------------------------------------------------
# The operators that torch sees


class _Given(NamedTuple):
    batch: Batch
    vocab_size: int  # columns of all ranks
    group: str
    reduce_hidden_grad: bool


class _Made(NamedTuple):
    scored: Scored
    logits: Logits


@operator("linear_token_stats")
def _linear_token_stats(given: _Given) -> _Made:
    batch = given.batch
    tokens, dtype = batch.tokens, computed_dtype(batch.student, batch.teacher)
    logits = Logits(*(in_huge_pages(t) for t in room_for_logits(batch)))
    if tokens.device.type == "cpu":
        checks.token_range(tokens, batch.mask, given.vocab_size)
    with torch.autocast(tokens.device.type, enabled=False):
        tiles = Tiles(batch.rows, logits)
        tokens = tiles.compact(tokens).long().contiguous()
        student, teacher = tiles.student, tiles.teacher
        for t in logits:  # an operator's results must not hang on what happened to stand in memory
            t[tiles.count :] = 0
            t[:, batch.width :] = 0
        fields = states.empty(tiles.count, tokens.device)
        for columns in tiles.columns:
            student.select(columns)
            teacher.select(columns)
            first, width = batch.first_column + columns.start, columns.stop - columns.start
            for rows in tiles.rows:
                x, y = student.logits(rows), teacher.logits(rows)
                tile = Pair(x, y, tokens[rows], None, batch.temperature, width)
                backends.get(batch.backend).update_states(tile, first, fields[rows])
        if given.group:
            fields = parallel.all_reduced(fields, parallel.group_named(given.group))
        stats = states.statistics(fields)
        values = [tiles.spread(value.to(dtype)) for value in stats]
        return _Made(scored(values, tiles.spread(states.saved_scalars(fields, stats))), logits)


@_linear_token_stats.shapes
def _(given: _Given) -> _Made:
    batch = given.batch
    dtype = computed_dtype(batch.student, batch.teacher)
    return _Made(room(batch.student.hidden, batch.tokens.shape, dtype), room_for_logits(batch))


class _Kept(NamedTuple):
    batch: Batch
    saved: Tensor
    logits: Logits
    group: str  # that sums the gradient of the hidden states; empty for none


def _keep(given: _Given, made: _Made) -> _Kept:
    return _Kept(given.batch, made.scored.saved, made.logits, given.group if given.reduce_hidden_grad else "")


@_linear_token_stats.gradient(
    of=[f"scored_{name}" for name in DIFFERENTIABLE], keep=_keep, instead="token_stats(backend='torch') of the logits"
)
def _(backward: Backward[_Kept]) -> dict[str, Tensor]:
    kept, upstream = backward.kept, Upstream(*backward.upstream)
    return by_name(
        "batch_student", backward.needed, lambda needed: _linear_token_stats_backward(_Upward(kept, upstream, needed))
    )


class _Upward(NamedTuple):
    kept: _Kept
    upstream: Upstream
    needed: Needed


@operator("linear_token_stats_backward")
def _linear_token_stats_backward(given: _Upward) -> Gradients:
    """Gradients of hidden states, head and bias. A group sums the first."""
    (batch, scalars, logits, group), upstream, needed = given
    with torch.autocast(batch.tokens.device.type, enabled=False):
        tiles = Tiles(batch.rows, logits, known=True)
        tokens = tiles.compact(batch.tokens).long().contiguous()
        # Log-probability and entropy are the student's own affair: without the other two the teacher's tile is not
        # read and need not be made.
        alone = upstream.reverse_kl is None and upstream.forward_kl is None
        scalars = tiles.compact(scalars, 1).contiguous()
        scale = tiles.student.upstream_scale
        arriving = Upstream(*(None if g is None else scale * tiles.compact(g).double() for g in upstream))

        def write(tile: Tile) -> None:
            rows, width = tile.rows, tile.columns.stop - tile.columns.start
            pair = Pair(tile.student, tile.teacher, tokens[rows], None, batch.temperature, width)
            here = Upstream(*(None if g is None else g[rows] for g in arriving))
            first = batch.first_column + tile.columns.start
            backends.get(batch.backend).token_stats_backward(pair, scalars[rows], here, tile.out, first)

        gradient = sum_over_tiles(tiles, batch.student.head.weight, needed, write, alone=alone)
        if group and needed.hidden:
            dist.all_reduce(gradient.hidden, group=parallel.group_named(group))
        return finished(gradient, tiles, batch.student)


@_linear_token_stats_backward.shapes
def _(given: _Upward) -> Gradients:
    return head_gradient.room(given.kept.batch.student, given.needed)

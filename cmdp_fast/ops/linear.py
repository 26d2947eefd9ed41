"""Token statistics from hidden states and heads: the logits of both models exist a tile at a time.

    for columns of the vocabulary:            (a piece of either head, converted once)
        for rows:
            x, y = the tile of both models' logits          two GEMMs into memory that is reused
            forward:   fold x, y into the rows' states
            backward:  x <- the gradient of x;   hidden gradient += x W;   head gradient[columns] += x^T hidden

Columns are the outer loop, so that a piece of the head's gradient is complete, and can be cast and left, once the rows
have passed: its float32 accumulator is never wider than a tile. One loop serves every device; tile_size.py says how
large a tile is. The backward pass makes the logits again: keeping them would take the memory that is to be saved.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cmdp_fast import checks
from cmdp_fast.layout import SAVED
from cmdp_fast.ops import backends, parallel, projection
from cmdp_fast.ops.gradient import write_gradient
from cmdp_fast.ops.head_gradient import HeadGradient
from cmdp_fast.ops.native import in_huge_pages
from cmdp_fast.ops.projection import Model, Projection
from cmdp_fast.ops.tile_size import tile_shape
from cmdp_fast.ops.token_state import TokenState, all_reduced, fold_tile, saved_scalars, statistics
from cmdp_fast.reference import TokenStats, compute_dtype


def linear_token_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    tokens: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    vocab_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    first_column: int = 0,
    reduce_hidden_grad: bool = True,
    saved: str = "recompute",
    backend: str | None = None,
) -> TokenStats:
    """`token_stats` of the logits that two language-model heads would give, without the logits.

    A model's logits are ``scale * (hidden W^T + bias)``, then ``softcap * tanh(logits / softcap)`` if it has a softcap
    (the order of Cohere, Granite and Gemma in transformers), then divided by the temperature. They exist a tile at a
    time, sized for the last-level cache (``CMDP_FAST_TILE_BYTES`` overrides the size), and are made again in the
    backward pass: six products of rows x V x H instead of four, and memory that does not grow with rows x V. Where
    there is memory for the logits, ``saved="tiles"`` keeps them and saves the two.

    ``logprob, entropy, reverse_kl, forward_kl`` are differentiable with respect to ``student_hidden``,
    ``student_weight`` and ``student_bias``; what needs no gradient costs nothing. The teacher never receives one.
    Reverse mode only, no second derivative.

    Args:
        student_hidden: ``[..., H]`` the last hidden states (after the final norm): float32, bfloat16, float16, float64.
        student_weight: ``[V, H]`` the head, of any of these dtypes. With ``process_group``, this rank's rows of it.
            Or a DTensor sharded over its rows (``Shard(0)`` of a one-dimensional mesh), likewise the bias: then group
            and columns are those of the DTensor, and so is the gradient.
        teacher_hidden, teacher_weight: ``[..., H']``, ``[V', H']``, of their own width and dtypes; V' = V unless
            ``vocab_size`` is given.
        tokens: ``[...]`` integers in [0, vocab_size). Masked tokens may hold anything.
        student_bias, teacher_bias: ``[V]``, ``[V']``. A bias of -inf excludes a column.
        mask: ``[...]`` bool, False = the row is left out of every product; its statistics and gradient are exactly 0.
            Finding the rows that count makes the host wait for a GPU.
        temperature, student_softcap, teacher_softcap, student_scale, teacher_scale: as above.
        vocab_size: statistics over the common prefix of this width. Rows of the head beyond it get a gradient of 0.
        process_group: ranks that hold columns [first_column, first_column + V) of the vocabulary each, and the same
            hidden states, tokens and mask (tensor parallelism). For a head that is sharded to save memory while each
            rank has its own rows (FSDP) pass the whole head,
            ``weight.full_tensor(grad_placements=[Partial("avg")])``: without the placements its gradient would be that
            of some ranks' rows alone. A few numbers are exchanged and looked at first, so that ranks that do not fit
            raise instead of waiting for each other; then two all-reduces of 13 numbers a row. Every rank gets the
            statistics. Not under ``torch.compile``.
        first_column: where this rank's columns begin.
        reduce_hidden_grad: whether ``student_hidden``'s gradient is summed over the ranks. Each rank's columns give a
            part of it, and autograd expects the whole, hence True. False for hidden states that went through an
            operation whose backward pass sums them itself, such as Megatron's copy to the tensor-parallel region or
            the gather of a sequence-parallel region: they would be summed twice.
        saved: what the backward pass has of the forward pass. ``recompute``: a few numbers a row; the logits are made
            again. ``tiles``: both models' logits, rows x V numbers each, for who has the memory: two products of six
            are saved, and the gradient still exists a tile at a time only.
        backend: None chooses: ``cpu`` (native) for CPU tensors, ``triton`` on a GPU (not float64), else ``torch``; a
            name forces it. GEMMs are PyTorch's.

    Returns:
        `TokenStats` of tensors ``[...]``: float32, or float64 if a hidden state or head is float64.

    Precision: products are summed in float32 (float64 if any of the above is float64) whatever the inputs are, and so
    are all gradients, which are cast once, at the end. On a CPU half-precision inputs are widened a piece at a time.
    Autocast changes nothing here: cast hidden states and head to compute in half precision on a GPU.

    Special values: as `token_stats`, of the logits. NaN in a row of hidden states makes that row NaN, and the whole
    gradient of the head.

    Raises:
        TypeError, ValueError: as `token_stats`; widths that do not fit; ranks that hold different tokens, or columns
            that overlap or leave a gap.

    Source: the states merge as in csrc/token_state.h; tiles of a head as in Wijmans et al. 2024, arXiv 2411.09009
    (cut cross-entropy), for one model and one statistic.
    """
    sharded = parallel.shards(student_weight, student_bias, teacher_weight, teacher_bias)
    if sharded is not None:
        if process_group is not None or first_column != 0:
            raise ValueError("a DTensor head brings its own process group and columns; do not pass them as well")
        local, process_group, first_column = sharded
        student_weight, student_bias, teacher_weight, teacher_bias = local  # type: ignore[assignment]
    projection.check("student", Model(student_hidden, student_weight, student_bias, student_scale, student_softcap))
    projection.check("teacher", Model(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap))
    checks.same_device("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "student_hidden and teacher_hidden must agree in all but the last axis, got "
            f"{list(student_hidden.shape)} and {list(teacher_hidden.shape)}"
        )
    checks.tokens(tokens, student_hidden, "student_hidden")
    checks.mask(mask, tokens, tokens.shape, "tokens")
    checks.positive("temperature", temperature)
    checks.choice("saved", saved, ("recompute", "tiles"))
    computed = compute_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    chosen = backends.choose_for_logits(backend, student_hidden, computed, "linear_token_stats")
    width, vocab = parallel.columns(
        student_weight.shape[0], teacher_weight.shape[0], vocab_size, process_group, first_column, tokens, mask
    )
    outputs = _linear_token_stats(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        tokens,
        mask,
        float(temperature),
        float(student_scale),
        student_softcap,
        float(teacher_scale),
        teacher_softcap,
        width,
        vocab,
        first_column,
        parallel.name_of(process_group),
        reduce_hidden_grad,
        saved == "tiles" and torch.is_grad_enabled(),
        chosen,
    )
    return TokenStats(*outputs[:6])


# --------------------------------------------------------------------------------------------------------------
# The loop


class _Tiles:
    """Both heads over the rows that count, and how they are cut into tiles."""

    def __init__(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        student: Model,
        teacher: Model,
        width: int,
        kept: tuple[Tensor, Tensor] | None = None,
        known: bool = False,
    ):
        """``kept``, ``known``: both models' logits, as `Projection` takes them."""
        self.kept = None if mask is None else mask.flatten().nonzero()[:, 0]
        self.shape = tokens.shape
        self.tokens = self.compact(tokens).long().contiguous()
        dtype = compute_dtype(student.hidden, student.weight, teacher.hidden, teacher.weight)
        self.student, self.teacher = (
            Projection(m._replace(hidden=self.compact(m.hidden, 1), weight=m.weight[:width]), dtype, logits, known)
            for m, logits in zip((student, teacher), kept or (None, None), strict=True)
        )
        pair = self.student.dtype.itemsize + self.teacher.dtype.itemsize
        count = len(self.tokens)
        height, breadth = tile_shape(count, width, pair, tokens.device)
        self.rows = [slice(i, min(i + height, count)) for i in range(0, count, height)]
        self.columns = [slice(i, min(i + breadth, width)) for i in range(0, width, breadth)]

    def compact(self, value: Tensor, trailing: int = 0) -> Tensor:
        """``[..., *]`` to ``[rows that count, *]``, ``trailing`` axes being kept."""
        rows = value.reshape((self.shape.numel(), *value.shape[value.dim() - trailing :]))
        return rows if self.kept is None else rows[self.kept]

    def spread(self, value: Tensor) -> Tensor:
        """``[rows that count, *]`` to ``[..., *]``, zero elsewhere."""
        if self.kept is not None:
            value = value.new_zeros(self.shape.numel(), *value.shape[1:]).index_copy_(0, self.kept, value)
        return value.reshape((*self.shape, *value.shape[1:]))


@torch.library.custom_op("cmdp_fast::linear_token_stats", mutates_args=())
def _linear_token_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    student_scale: float,
    student_softcap: float | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    width: int,
    vocab_size: int,
    first_column: int,
    group: str,
    reduce_hidden_grad: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    x, y = _room(student_hidden, tokens, width if keep else 0, dtype)
    kept = in_huge_pages(x), in_huge_pages(y)
    if tokens.device.type == "cpu":
        checks.token_range(tokens, mask, vocab_size)
    with torch.autocast(tokens.device.type, enabled=False):
        tiles = _Tiles(
            tokens,
            mask,
            Model(student_hidden, student_weight, student_bias, student_scale, student_softcap),
            Model(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap),
            width,
            kept if keep else None,
        )
        student, teacher = tiles.student, tiles.teacher
        for logits in kept:  # an operator's results must not hang on what happened to stand in memory
            logits[len(tiles.tokens) :] = 0
        fields = TokenState.empty(len(tiles.tokens), device=tokens.device).fields
        for columns in tiles.columns:
            student.select(columns)
            teacher.select(columns)
            first = first_column + columns.start
            for rows in tiles.rows:
                x, y = student.logits(rows), teacher.logits(rows)
                fold_tile(fields[rows], x, y, tiles.tokens[rows], first, temperature, backend)
        if group:
            fields = all_reduced(fields, parallel.group_named(group))
        stats = statistics(fields)
        values = [tiles.spread(value.to(dtype)) for value in stats]
        return (*values, tiles.spread(saved_scalars(fields, stats)), *kept)  # type: ignore[return-value]


def _room(like: Tensor, tokens: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for both models' logits ``[rows, width]``. Rows are not compacted: their number would depend on data."""
    shape = (tokens.numel(), width)
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype)


@_linear_token_stats.register_fake
def _(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, tokens, *settings):
    dtype = compute_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    width, keep = settings[6], settings[11]
    values = [student_hidden.new_empty(tokens.shape, dtype=dtype) for _ in range(6)]
    scalars = student_hidden.new_empty((*tokens.shape, SAVED), dtype=torch.float64)
    return (*values, scalars, *_room(student_hidden, tokens, width if keep else 0, dtype))


@torch.library.custom_op("cmdp_fast::linear_token_stats_backward", mutates_args=())
def _linear_token_stats_backward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_reverse_kl: Tensor | None,
    grad_forward_kl: Tensor | None,
    needed: list[bool],
    temperature: float,
    student_scale: float,
    student_softcap: float | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    width: int,
    first_column: int,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, head and bias: an empty tensor for one that is not needed. A group sums the first."""
    keep = student_logits.shape[1] > 0
    with torch.autocast(tokens.device.type, enabled=False):
        tiles = _Tiles(
            tokens,
            mask,
            Model(student_hidden, student_weight, student_bias, student_scale, student_softcap),
            Model(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap),
            width,
            (student_logits, teacher_logits) if keep else None,
            known=True,
        )
        student, teacher = tiles.student, tiles.teacher
        # Log-probability and entropy are the student's own affair: without the other two the teacher's tile is not
        # read and need not be made.
        alone = grad_reverse_kl is None and grad_forward_kl is None
        kept = tiles.compact(saved, 1).contiguous()
        upstream = [
            None if g is None else tiles.compact(g).double()
            for g in (grad_logprob, grad_entropy, grad_reverse_kl, grad_forward_kl)
        ]
        gradient = HeadGradient(student, student_weight, needed)
        for columns in tiles.columns:
            student.select(columns)
            if not alone:
                teacher.select(columns)
            for rows in tiles.rows:
                x = student.logits(rows)
                out = student.gradient_tile(x)
                write_gradient(
                    x,
                    x if alone else teacher.logits(rows),
                    tiles.tokens[rows],
                    None,
                    kept[rows],
                    [None if g is None else g[rows] for g in upstream],
                    temperature,
                    x.shape[1],
                    out,
                    backend,
                    first_column + columns.start,
                )
                student.chain(out, x)
                gradient.add(out, rows, columns)
            gradient.leave(columns)
        if group and needed[0]:
            dist.all_reduce(gradient.hidden, group=parallel.group_named(group))
        return (
            tiles.spread(gradient.hidden).to(student_hidden.dtype) if needed[0] else gradient.hidden,
            gradient.weight,
            gradient.bias if student_bias is None else gradient.bias.to(student_bias.dtype),
        )


@_linear_token_stats_backward.register_fake
def _(student_hidden, student_weight, student_bias, *rest):
    needed = rest[12]
    given = (student_hidden, student_weight, student_bias)
    return tuple(t.new_empty(t.shape) if n else student_hidden.new_empty(0) for t, n in zip(given, needed, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, temperature, s_scale, s_softcap, t_scale, t_softcap, width, _, first, group, reduce, _, backend = inputs
    _, teacher_logprob, _, teacher_entropy, _, _, *saved = output
    ctx.mark_non_differentiable(teacher_logprob, teacher_entropy, *saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)
    ctx.settings = (temperature, s_scale, s_softcap, t_scale, t_softcap, width, first, group if reduce else "", backend)


def _backward(ctx, grad_logprob, _teacher_logprob, grad_entropy, _teacher_entropy, grad_reverse, grad_forward, *_):
    upstream = (grad_logprob, grad_entropy, grad_reverse, grad_forward)
    needed = list(ctx.needs_input_grad[:3])
    if not any(needed) or all(g is None for g in upstream):
        return (None,) * 20
    gradients = _linear_token_stats_backward(*ctx.saved_tensors, *upstream, needed, *ctx.settings)
    return (*(g if n else None for g, n in zip(gradients, needed, strict=True)), *(None,) * 17)


_linear_token_stats.register_autograd(_backward, setup_context=_setup_context)

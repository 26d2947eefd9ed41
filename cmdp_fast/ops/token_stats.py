"""Six statistics of every token from one pass over both models' logits, with one shared backward pass.

The formulas and the table of gradients stand in `cmdp_fast.reference`; the native kernels behind this file are
csrc/cpu/forward.h and csrc/cpu/backward.h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cmdp_fast import checks, reference
from cmdp_fast.layout import Pair, unit_stride
from cmdp_fast.ops import backends
from cmdp_fast.ops.onlookers import saves_through_hooks, transformed
from cmdp_fast.ops.operator import operator
from cmdp_fast.ops.sharded_stats import sharded_token_stats
from cmdp_fast.ops.statistics import DIFFERENTIABLE, Kept, Scored, gradient_of_logits, room_of, scored, writable
from cmdp_fast.reference import TokenStats, below_the_largest, compute_dtype


def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    process_group: dist.ProcessGroup | None = None,
    first_column: int = 0,
    backend: backends.BackendName | None = None,
) -> TokenStats:
    """Log-probabilities, entropies and both KL divergences of every token, from one pass over both rows of logits.

    With p = softmax(student / temperature) and w = softmax(teacher / temperature), in nats:
    ``logprob`` log p(a), ``teacher_logprob`` log w(a), ``entropy`` -sum p log p, ``teacher_entropy`` -sum w log w,
    ``reverse_kl`` KL(p‖w), ``forward_kl`` KL(w‖p).

    ``logprob, entropy, reverse_kl, forward_kl`` are differentiable with respect to the student, together, in one
    backward pass that stores nothing as wide as the vocabulary. The teacher never receives a gradient. Reverse mode
    only, with `torch.func.grad`, ``vjp`` and ``jacrev`` too: forward mode (`torch.func.jvp`) and a second derivative
    raise NotImplementedError, unless ``backend="torch"``, which has all derivatives.

    Args:
        student_logits: ``[..., V]`` float32, bfloat16, float16 or float64. Any strides; where the last
            axis is not contiguous, or more than 8 others lie scattered, they are copied.
        teacher_logits: ``[..., V']``, likewise, of its own dtype; V' = V unless ``vocab_size`` is given.
        tokens: ``[...]`` integers in [0, vocab_size): the actions a. Masked tokens may hold anything.
        mask: ``[...]`` bool, False = the row is not read; its statistics and its gradient are exactly 0.
        temperature: divides both models' logits.
        vocab_size: statistics over the common prefix of this width; columns beyond it count as -inf for both
            models. `dropped_teacher_mass` tells how much of the teacher that leaves out.
        inplace_backward: write the gradient into the memory of ``student_logits``. The logits are gone after the
            backward pass. An operation that saved them, or anything that shares their memory (the tanh that made them,
            a slice), and runs its backward pass later raises RuntimeError, as does a second backward pass through this
            call. If the logits are a leaf their ``.grad`` is that same memory, and a hook on them finds it there.
            Logits whose rows share memory with one another or with other rows of the teacher's are copied first. Has no
            effect where the gradient is allocated: with ``process_group``, on the torch backend, under
            ``torch.compile`` or compiled autograd, and where hooks take what autograd saves at the call (checkpointing
            that is not reentrant, offloaded activations), since PyTorch notices no overwriting through a hook. So do
            not overwrite logits that hooks around another operation alone keep as they are, that the function of a
            checkpoint reads from its closure, that an `autograd.Function` keeps without ``save_for_backward``, or that
            are used through ``.data``: there nothing raises.
        process_group: ranks that hold columns [first_column, first_column + V) of the same rows each (tensor
            parallelism), with the same tokens, mask and settings. Every rank gets the statistics of whole rows, and the
            gradient of its own columns. ``vocab_size`` counts the columns of all ranks. A few numbers are exchanged and
            looked at first: ranks that do not fit all raise. Not under ``torch.compile``.
        first_column: where this rank's columns begin.
        backend: None chooses: ``cpu`` (native) for CPU tensors, ``triton`` or ``cuda`` (`cmdp_fast.ops.backends`) for
            tensors on a GPU (not float64), else ``torch``; a name forces it.

    Returns:
        `TokenStats` of tensors ``[...]``: float32, or float64 if either model's logits are float64.

    Special values: a column with -inf has probability 0 and 0 · anything = 0. Where only the student uses a
    column, ``reverse_kl`` is +inf and passes no gradient; where only the teacher does, ``forward_kl`` is +inf and
    passes its usual gradient p - w. NaN or +inf in either row, or a row of -inf only, makes all six statistics and
    the gradient of that row NaN, and of no other row. On a GPU a gradient through ``reverse_kl`` may be infinite where
    the one that arrives, times log p - log w, over the temperature, is above the largest float32 in a column.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes, devices, widths or a temperature that do not fit, or a token outside the vocabulary (on the
            CPU; the first offender is named. On a GPU, where looking would stall the device, its log-probabilities are
            NaN, and so is a loss of them: mask what does not count).

    Source: the token-level KL of arXiv 2509.22921; the streaming state is this project's (csrc/token_state.h).
    """
    checks.flag("inplace_backward", inplace_backward)
    if process_group is not None or first_column != 0:
        settings = (temperature, vocab_size, process_group, first_column, backend)
        return sharded_token_stats(student_logits, teacher_logits, tokens, mask, *settings)
    vocab = checks.logits(student_logits, teacher_logits, vocab_size)
    checks.tokens(tokens, student_logits)
    checks.mask(mask, tokens, tokens.shape, "tokens")
    checks.positive("temperature", temperature)
    computed = compute_dtype(student_logits, teacher_logits)
    chosen = backends.choose_for_logits(backend, student_logits, computed, "token_stats")
    if chosen == "torch":
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            checks.token_range(tokens, mask, vocab)
        return reference.token_stats(
            student_logits, teacher_logits, tokens, mask=mask, temperature=temperature, vocab_size=vocab
        )
    student, teacher, inplace = kernel_memory(student_logits, teacher_logits, inplace_backward, chosen)
    pair = Pair(student, teacher, tokens, mask, float(temperature), vocab)
    return _token_stats(_Given(pair, inplace, chosen)).stats


def kernel_memory(
    student_logits: Tensor, teacher_logits: Tensor, inplace_backward: bool, backend: str
) -> tuple[Tensor, Tensor, bool]:
    """Both logits as the kernels read them, and whether the student's memory takes the gradient."""
    inplace = inplace_backward and not (torch.compiler.is_compiling() or transformed() or saves_through_hooks())
    student, teacher = unit_stride(student_logits), unit_stride(teacher_logits.detach())
    if inplace and not writable(student, teacher, backend):
        student = student.clone(memory_format=torch.contiguous_format)
    return student, teacher, inplace


def dropped_teacher_mass(
    teacher_logits: Tensor, vocab_size: int, *, temperature: float = 1.0, rows_at_once: int = 64
) -> Tensor:
    """The teacher's probability on columns that ``vocab_size`` leaves out.

    Args:
        teacher_logits: ``[..., V]`` float32, bfloat16, float16 or float64.
        vocab_size: columns kept, 1 to V.
        temperature: divides the logits.
        rows_at_once: bounds the temporary memory.

    Returns:
        ``[...]`` float32 (float64 for float64 logits) in [0, 1]; not differentiable.

    Raises:
        TypeError, ValueError: as `token_stats`.
    """
    checks.integer("vocab_size", vocab_size)
    checks.logits(teacher_logits, teacher_logits, vocab_size)
    checks.positive("temperature", temperature)
    checks.machine_integer("rows_at_once", rows_at_once)
    if rows_at_once < 1:
        raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
    dtype = compute_dtype(teacher_logits)
    rows = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])
    mass = [rows.new_empty(0, dtype=dtype)]
    for start in range(0, len(rows), rows_at_once):
        piece = rows[start : start + rows_at_once].to(dtype)
        weight = below_the_largest(piece, temperature).exp()  # torch.softmax adds in sequence on a CPU
        mass.append(weight[:, vocab_size:].sum(-1) / weight.sum(-1))
    return torch.cat(mass).reshape(teacher_logits.shape[:-1])


# --------------------------------------------------------------------------------------------------------------
# The operator that torch sees


class _Given(NamedTuple):
    pair: Pair
    inplace: bool
    backend: str


@operator("token_stats")
def _token_stats(given: _Given) -> Scored:
    tokens = given.pair.tokens
    if tokens is not None and tokens.device.type == "cpu":
        checks.token_range(tokens, given.pair.mask, given.pair.width)
    return scored(*backends.get(given.backend).token_stats(given.pair))


@_token_stats.shapes
def _(given: _Given) -> Scored:
    return room_of(given.pair)


_token_stats.gradient(
    of=DIFFERENTIABLE,
    keep=lambda given, made: Kept(given.pair, made.saved, given.inplace, given.backend),
    instead="token_stats(backend='torch')",
)(gradient_of_logits)

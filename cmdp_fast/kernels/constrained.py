"""Statistics, budget and modified reward in two launches: the pass over the logits, then one program a sequence that
finishes the statistics of its tokens and scans them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import finish, launch, scan
from cmdp_fast.kernels.finish import finish_rows
from cmdp_fast.kernels.scan import bounds, scan_sequence
from cmdp_fast.kernels.token_stats import fold_rows
from cmdp_fast.layout import empty_statistics

# A cost as a difference of statistics (plus, minus), which is how `reference.token_cost` rounds it too.
COSTS: dict[str, tuple[str | None, str | None]] = {
    "reverse_kl": ("reverse_kl", None),
    "forward_kl": ("forward_kl", None),
    "k1": ("logprob", "teacher_logprob"),
    "nll": (None, "teacher_logprob"),
}


# If the compiler knew that every sequence begins at a multiple of 16 tokens, it would give a thread 8 of them, and the
# scan would add in another order than that of packed sequences and of `scan.trace_kernel`.
@triton.jit(do_not_specialize=["width"])
def sequence_kernel(
    student,
    teacher,
    tokens,
    mask,
    partial,
    statistics,
    saved,
    x_strides,
    y_strides,
    vocab,
    segments,
    scale,
    width,
    offsets,
    token_count,
    budgets,
    budget_stride,
    budget: tl.float64,
    plus,
    minus,
    trace,
    task_reward,
    reward,
    gamma_octaves: tl.float64,
    penalty: tl.float64,
    weight: tl.float64,
    coefficient: tl.float64,
    slope: tl.float64,
    PER_TOKEN: tl.constexpr,
    DISCOUNTED: tl.constexpr,
    MEAN: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    KIND: tl.constexpr,
    AT_CROSSING: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    sequence = tl.program_id(0)
    if offsets is None:
        begin = sequence.to(tl.int64) * width
        stop = begin + width
    else:
        begin, stop = bounds(offsets, sequence, token_count)
    kept = tl.zeros([ROWS], tl.int64)
    for first in range(begin, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        finish_rows(
            row,
            stop,
            student,
            teacher,
            tokens,
            mask,
            partial,
            statistics,
            saved,
            x_strides,
            y_strides,
            vocab,
            segments,
            scale,
            PARTS,
        )
        if PER_TOKEN:
            counts = row < stop
            if mask is not None:
                counts = counts & (tl.load(mask + row, mask=counts, other=0) != 0)
            kept += counts.to(tl.int64)
    # The scan reads statistics that other threads of this program have written.
    tl.debug_barrier()
    limit = tl.zeros([], tl.float64) + budget
    if budgets is not None:
        limit = tl.load(budgets + sequence.to(tl.int64) * budget_stride).to(tl.float64)
    if PER_TOKEN:
        count = tl.sum(kept, 0).to(tl.float64)
        limit = tl.where(count > 0, limit * count, 0.0)
    limit = limit.to(tl.float32).to(tl.float64)  # as the costs are rounded: a cost of 0.3 is within a budget of 0.3
    scan_sequence(
        sequence,
        begin,
        stop - begin,
        limit,
        plus,
        minus,
        mask,
        trace,
        task_reward,
        reward,
        gamma_octaves,
        DISCOUNTED,
        MEAN,
        INCLUSIVE,
        KIND,
        AT_CROSSING,
        (penalty, weight, coefficient, slope),
        CHUNK,
    )


def constrained_pass(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    task_reward: Tensor,
    cu_seqlens: Tensor | None,
    budget: Tensor | float,
    temperature: float,
    vocab: int,
    cost: str,
    per_token: bool,
    budget_rule: tuple[float, bool, bool],
    reward_rule: tuple[str, bool, float, float, float, float],
    trace: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    reward: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Statistics ``[...]`` and saved scalars ``[..., SAVED]``; trace and reward are written where they are given.

    Tokens are ``[B, T]``, or ``[N]`` with ``cu_seqlens [B+1]``; ``cost`` is one of `COSTS`.
    """
    statistics, saved = empty_statistics(student, packed=cu_seqlens is not None)
    sequences = trace[3].shape[0]
    if sequences == 0:
        return statistics, saved
    keep = launch.flags(mask)
    names = ("logprob", "teacher_logprob", "entropy", "teacher_entropy", "reverse_kl", "forward_kl")
    by_name = dict(zip(names, statistics, strict=True))
    plus, minus = (None if name is None else by_name[name] for name in COSTS[cost])
    given = isinstance(budget, Tensor)
    with launch.on(student):
        folded = fold_rows(student, teacher, keep, temperature, vocab)
        sequence_kernel[(sequences,)](
            folded.student.tensor,
            folded.teacher.tensor,
            tokens.contiguous(),
            keep,
            folded.partial,
            tuple(statistics),
            saved,
            *folded.shape,
            tokens.shape[-1],
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            tokens.numel(),
            budget if given else None,
            budget.stride(0) if isinstance(budget, Tensor) and budget.dim() else 0,
            0.0 if given else budget,
            plus,
            minus,
            scan.room(trace),
            task_reward.contiguous(),
            reward,
            **scan.budget_settings(*budget_rule),
            **scan.reward_settings(*reward_rule),
            PER_TOKEN=per_token,
            ROWS=finish.ROWS,
            PARTS=folded.parts,
            CHUNK=scan.CHUNK,
            **launch.compiled_for(finish.WARPS),
        )
    return statistics, saved

"""Statistics, budget and modified reward in two launches: the pass over the logits, then one program per sequence that
finishes the statistics of its tokens and scans them."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import finish, launch, scan
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.finish import finish_rows, kept
from cmdp_fast.kernels.scan import Amounts, Sequences, Span, Tokens, bounds, scan_sequence
from cmdp_fast.kernels.shapes import Pointer, Results, constants
from cmdp_fast.kernels.token_stats import fold_rows, parts
from cmdp_fast.layout import Pair, Settlement, empty_statistics
from cmdp_fast.reference import TokenStats

# A cost as a difference of statistics (plus, minus), which is how `reference.token_cost` rounds it too.
DIFFERENCES: dict[str, tuple[str | None, str | None]] = {
    "reverse_kl": ("reverse_kl", None),
    "forward_kl": ("forward_kl", None),
    "k1": ("logprob", "teacher_logprob"),
    "nll": (None, "teacher_logprob"),
}
COSTS = tuple(DIFFERENCES)


class Budgets(NamedTuple):
    """The budgets of sequences, if each has its own."""

    given: Pointer | None  # [B]
    stride: int


class Settings(NamedTuple):
    """How the kernel is compiled."""

    per_token: bool  # a budget is that of one token
    rows: int  # rows per step of the statistics
    parts: int  # segments per row, rounded up to a power of two
    chunk: int  # tokens per step of the scan


# If the compiler knew that every sequence begins at a multiple of 16 tokens, it would give a thread 8 of them, and the
# scan would add in another order than that of packed sequences and of `scan.trace_kernel`. So `width` stands alone and
# is not specialised; `budget` and the amounts stand alone because they are doubles.
@direct
@triton.jit(do_not_specialize=["width"])
def sequence_kernel(
    folded,
    results,
    sequences,
    width,
    budgets,
    budget: tl.float64,
    tokens,
    trace,
    reward,
    gamma_octaves: tl.float64,
    penalty: tl.float64,
    discrepancy_weight: tl.float64,
    coefficient: tl.float64,
    barrier_slope: tl.float64,
    formula,
    settings,
):
    """One program per sequence: finishes the statistics of its tokens, then scans them.

    folded: a `Folded`. results: `Results`. sequences: `Sequences`, of `width` tokens each if there are no offsets.
    budgets: `Budgets`, or else the one `budget`. settings: `Settings`. The others: as `scan.trace_kernel`.
    """
    ROWS: tl.constexpr = settings.rows
    sequence = tl.program_id(0)
    if sequences.offsets is None:
        begin = sequence.to(tl.int64) * width
        stop = begin + width
    else:
        begin, stop = bounds(sequences, sequence)
    counted = tl.zeros([ROWS], tl.int64)
    for first in range(begin, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        finish_rows(row, stop, folded, results, settings.parts)
        if settings.per_token:
            counted += kept(row, row < stop, tokens.mask).to(tl.int64)
    # The scan reads statistics that other threads of this program have written.
    tl.debug_barrier()
    limit = tl.zeros([], tl.float64) + budget
    if budgets.given is not None:
        limit = tl.load(budgets.given + sequence.to(tl.int64) * budgets.stride).to(tl.float64)
    if settings.per_token:
        count = tl.sum(counted, 0).to(tl.float64)
        limit = tl.where(count > 0, limit * count, 0.0)
    limit = limit.to(tl.float32).to(tl.float64)  # as the costs are rounded: a cost of 0.3 is within a budget of 0.3
    span = Span(sequence, begin, stop - begin, limit)
    amounts = Amounts(penalty, discrepancy_weight, coefficient, barrier_slope)
    scan_sequence(span, tokens, trace, reward, formula, gamma_octaves, amounts, settings.chunk)


def constrained_pass(pair: Pair, settlement: Settlement) -> tuple[list[Tensor], Tensor]:
    """Statistics ``[...]`` and saved scalars ``[..., SAVED]``; trace and reward are written where they are given."""
    cu_seqlens, budget, rewarding = settlement.cu_seqlens, settlement.budget, settlement.rewarding
    statistics, saved = empty_statistics(pair.student, packed=cu_seqlens is not None)
    sequences = settlement.trace.first_violation.shape[0]
    if sequences == 0:
        return statistics, saved
    by_name = TokenStats(*statistics)
    plus, minus = (None if name is None else getattr(by_name, name) for name in DIFFERENCES[settlement.cost])
    given = budget if isinstance(budget, Tensor) else None
    with launch.on(pair.student):
        logits = launch.logits_of(pair)
        folded = fold_rows(pair, logits)
        sequence_kernel[(sequences,)](
            folded,
            Results(tuple(statistics), saved),
            Sequences(None if cu_seqlens is None else cu_seqlens.contiguous(), launch.count_rows(pair.student)),
            pair.student.shape[-2],
            Budgets(given, given.stride(0) if given is not None and given.dim() else 0),
            0.0 if isinstance(budget, Tensor) else budget,
            Tokens(plus, minus, logits.mask, rewarding.task_reward.contiguous()),
            scan.in_bytes(settlement.trace),
            rewarding.reward,
            math.log2(settlement.rule.gamma),
            *scan.amounts_of(rewarding.rule),
            scan.formula_of(settlement.rule, rewarding.rule),
            constants(Settings(settlement.per_token, finish.ROWS, parts(folded), scan.CHUNK)),
            **launch.compiled_for(finish.WARPS),
        )
    return statistics, saved

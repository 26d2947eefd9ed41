"""Statistics, budget and modified reward in three launches: the pass over the logits, the statistics of every row, then
one program per sequence that scans them."""

from __future__ import annotations

from torch import Tensor

from cmdp_fast.arrays import count_rows, settled, settled_packing, settled_rewarding
from cmdp_fast.kernels import launch
from cmdp_fast.kernels.scan import Allowance, Budgets, scan_sequences
from cmdp_fast.kernels.sequences import Sequences, Tokens
from cmdp_fast.kernels.token_stats import token_stats
from cmdp_fast.layout import Pair, Settlement
from cmdp_fast.reference import TokenStats

# A cost as a difference of statistics (plus, minus), which is how `reference.token_cost` rounds it too.
DIFFERENCES: dict[str, tuple[str | None, str | None]] = {
    "reverse_kl": ("reverse_kl", None),
    "forward_kl": ("forward_kl", None),
    "k1": ("logprob", "teacher_logprob"),
    "nll": (None, "teacher_logprob"),
}
COSTS = tuple(DIFFERENCES)


def constrained_pass(pair: Pair, settlement: Settlement) -> tuple[list[Tensor], Tensor]:
    """Statistics ``[...]`` and saved scalars ``[..., SAVED]``; trace and reward are written where they are given."""
    pair = settled(pair, None)
    assert pair.tokens is not None
    cu_seqlens, budget = settled_packing(settlement, pair.student)
    statistics, saved = token_stats(pair)
    rewarding = settled_rewarding(settlement.rewarding, statistics[0])
    by_name = TokenStats(*statistics)
    plus, minus = (None if name is None else getattr(by_name, name) for name in DIFFERENCES[settlement.cost])
    tokens = Tokens(plus, minus, launch.flags(pair.mask), None)
    total = count_rows(pair.student)
    if cu_seqlens is None:
        sequences = Sequences(None, pair.tokens.shape[-1], total)
    else:
        sequences = Sequences(cu_seqlens, 0, total)
    if isinstance(budget, Tensor):
        allowance = Allowance(Budgets(budget, 1 if budget.dim() else 0), 0.0, settlement.per_token, True)
    else:
        allowance = Allowance(Budgets(None, 0), budget, settlement.per_token, True)
    scan_sequences(sequences, allowance, tokens, settlement.rule, settlement.trace, rewarding)
    return statistics, saved

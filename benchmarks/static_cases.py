"""Every launcher of `cmdp_fast.kernels`, called as the operations call it: what `static_gpu.py` compiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from launch_plan import QWEN, tile_on_a_gpu
from machine_code import Traffic

from cmdp_fast import kernels, tails
from cmdp_fast.layout import (
    SAVED,
    Account,
    BudgetRule,
    ListedRows,
    Mixture,
    Pair,
    Rewarding,
    RewardRule,
    Settlement,
    TailGradient,
    Upstream,
)
from cmdp_fast.reference import BudgetTrace
from cmdp_fast.states import FIELDS

TILE = tile_on_a_gpu(QWEN)  # of `linear_token_stats` on a GPU


def make_pair(vocab: int, dtype: torch.dtype, *rows: int) -> Pair:
    student, teacher = (torch.empty(*rows, vocab, dtype=dtype) for _ in range(2))
    tokens, mask = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    return Pair(student, teacher, tokens, mask, 1.0, vocab)


def _statistics(vocab: int, dtype: torch.dtype) -> None:
    kernels.token_stats(make_pair(vocab, dtype, 2))


def _backward(vocab: int, dtype: torch.dtype) -> None:
    pair, upstream = make_pair(vocab, dtype, 2), Upstream(*[torch.empty(2)] * 4)
    kernels.token_stats_backward(pair, torch.empty(2, SAVED, dtype=torch.float64), upstream, pair.student)


def _mixture(vocab: int, dtype: torch.dtype) -> None:
    pair, weights = make_pair(vocab, dtype, 2), Mixture(0.5, 0.5, 0.5)
    _, saved, mean = kernels.mixture(pair, weights)
    kernels.mixture_backward(pair, saved, mean, torch.empty(2), weights, torch.empty_like(pair.student))


def _tail(vocab: int, dtype: torch.dtype) -> None:
    """Of a teacher that has listed 100 columns."""
    pair, device = make_pair(vocab, dtype, 2), torch.device("cpu")
    assert pair.tokens is not None
    rows = ListedRows(pair.student, torch.zeros(2, 100, dtype=torch.int64), pair.tokens, pair.mask, 1.0, vocab)
    state = tails.empty(2, 100, device)
    kernels.update_tails(rows, 0, state)
    numbers = [torch.empty(2, dtype=torch.float64)] * 5
    kernels.tail_backward(rows, TailGradient(*numbers, state.listed), pair.student)


def make_rewarding(*shape: int) -> Rewarding:
    rule = RewardRule("cmdp", True, penalty=1.0, discrepancy_weight=1.0, coefficient=0.0, barrier_slope=0.0)
    return Rewarding(rule, torch.empty(shape), torch.empty(shape))


def make_trace(sequences: int, tokens: int) -> BudgetTrace:
    cumulative, remaining, excess = (torch.empty(sequences, tokens) for _ in range(3))
    violated, first = torch.empty(sequences, tokens, dtype=torch.bool), torch.empty(sequences, dtype=torch.int64)
    return BudgetTrace(cumulative, remaining, violated, first, excess)


def _budget(vocab: int, dtype: torch.dtype) -> None:
    mask, offsets = torch.ones(2, 512, dtype=torch.bool), torch.tensor([0, 512, 1024])
    account, trace = Account(torch.empty(2, 512), mask, offsets), make_trace(2, 512)
    kernels.trace_budgets(account, torch.empty(2, dtype=torch.float64), BudgetRule(1.0, False, False), trace)
    kernels.modify_rewards(account, trace, make_rewarding(2, 512))


def _constrained(vocab: int, dtype: torch.dtype) -> None:
    length = 16  # a multiple of 16, like most padded batches: the compiler may know where sequences begin
    rule, trace, rewarding = BudgetRule(1.0, False, False), make_trace(1, length), make_rewarding(1, length)
    settlement = Settlement("reverse_kl", None, 2.0, False, rule, trace, rewarding)
    kernels.constrained_pass(make_pair(vocab, dtype, 1, length), settlement)


def _tile(teacher: torch.dtype = torch.float32) -> Pair:
    """Logits as a product leaves them; the memory is never touched. A teacher's that stays is in the factors' dtype,
    and a part of rows of the whole width."""
    rows, columns = TILE
    student = torch.empty(rows, columns)
    other = torch.empty(rows, columns if teacher == torch.float32 else QWEN.vocab, dtype=teacher)[:, :columns]
    return Pair(student, other, torch.zeros(rows, dtype=torch.int64), None, 1.0, columns)


def _update(pair: Pair) -> None:
    kernels.update_states(pair, 0, torch.empty(len(pair.student), len(FIELDS), dtype=torch.float64))


def _tile_backward(pair: Pair) -> None:
    rows = len(pair.student)
    upstream = Upstream(*[torch.empty(rows, dtype=torch.float64)] * 4)
    out = torch.empty(pair.student.shape, dtype=torch.bfloat16)
    kernels.token_stats_backward(pair, torch.empty(rows, SAVED, dtype=torch.float64), upstream, out, 0)


# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``launch`` takes the width and the dtype of the survey, which a case of `TILES` does not look at.

    ``moves``: what a kernel of this name moves per column, in logits. Others hold no logits.
    """

    launch: Callable[[int, torch.dtype], None]
    moves: dict[str, Traffic] = field(default_factory=dict)

    def traffic(self, name: str, place: int, size: int) -> Traffic | None:
        """Bytes per column that a kernel moves, the one launched at this place, where a logit has ``size`` bytes; None
        if it holds no logits."""
        moved = self.moves.get(name)
        return None if moved is None else Traffic(moved.read * size, moved.written * size)


@dataclass(frozen=True)
class TileCase(Case):
    """A tile of `linear_token_stats`. ``dtypes``: of student, teacher > gradient. ``bytes_a_column``: what the first
    kernel moves; a second one would merge what that has found."""

    dtypes: str = ""
    bytes_a_column: Traffic | None = None

    def traffic(self, name: str, place: int, size: int) -> Traffic | None:
        return None if place else self.bytes_a_column


FOLD, BACKWARD = "token_stats.fold_kernel", "token_stats_backward.backward_kernel"
MIXTURE, MIXTURE_BACKWARD = "mixture.mixture_kernel", "mixture.backward_kernel"
TAIL, TAIL_BACKWARD = "tail.fold_kernel", "tail_backward.backward_kernel"
READS, WRITES_TOO = Traffic(2), Traffic(2, 1)
CASES = (
    Case(_statistics, {FOLD: READS}),
    Case(_backward, {BACKWARD: WRITES_TOO}),
    Case(_mixture, {FOLD: READS, MIXTURE: READS, MIXTURE_BACKWARD: WRITES_TOO}),
    Case(_tail, {TAIL: Traffic(1), TAIL_BACKWARD: Traffic(1, 1)}),
    Case(_budget),
    Case(_constrained, {FOLD: READS}),
)


def _updates(teacher: torch.dtype, dtypes: str) -> TileCase:
    moved = Traffic(4 + teacher.itemsize)
    return TileCase(lambda *_: _update(_tile(teacher)), dtypes=dtypes, bytes_a_column=moved)


def _gradients(teacher: torch.dtype, dtypes: str) -> TileCase:
    moved = Traffic(4 + teacher.itemsize, 2)
    return TileCase(lambda *_: _tile_backward(_tile(teacher)), dtypes=dtypes, bytes_a_column=moved)


TILES = (
    _updates(torch.float32, "float32"),
    _updates(torch.bfloat16, "float32, bfloat16"),
    _gradients(torch.float32, "float32 > bfloat16"),
    _gradients(torch.bfloat16, "float32, bfloat16 > bfloat16"),
)

"""What every trainer reports: one definition of each figure, in which a completion without a token has no part."""

from __future__ import annotations

import pytest
import torch
from exact import ops
from helpers import make_logits, make_tokens

from cmdp_fast.metrics import budget_metrics, divergences


def test_completions_without_a_token_have_no_part_in_any_figure() -> None:
    """Completions that a trainer masks (TRL's truncated ones, rows that fill a batch up) between three real ones."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    real = mask.any(1)
    x, y = make_logits(5, 4, 9, dtype=torch.float64), make_logits(5, 4, 9, dtype=torch.float64, seed=1)
    modified, correct = torch.arange(5.0) + 100 * ~real, torch.tensor([1.0, 1, 0, 1, 1])
    budget = torch.tensor([1.0, 50.0, 2.0, 50.0, 3.0])

    def figures(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = mask[rows]
        stats = ops.token_stats(x[rows], y[rows], make_tokens(5, 4, vocab=9)[rows], mask=kept)
        trace = ops.budget_trace(stats.reverse_kl, budget[rows], mask=kept)
        return budget_metrics(
            *(stats.reverse_kl, trace, divergences(stats, kept)),
            mask=kept,
            budget=budget[rows],
            modified=modified[rows],
            correct=correct[rows],
        )

    everything, alone = figures(torch.arange(5)), figures(torch.arange(5)[real])
    assert everything.keys() == alone.keys() >= {"never_violated", "cumulative_kl", "modified_reward", "budget"}
    for name, value in everything.items():
        assert value.shape == () and torch.equal(value, alone[name]), name
    assert everything["budget"].item() == pytest.approx(2.0) and everything["accuracy"].item() == pytest.approx(2 / 3)

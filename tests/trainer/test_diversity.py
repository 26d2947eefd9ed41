"""Measures of how varied completions are, against their definitions spelled out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmdp_fast.trainer.diversity import distinct, repetition

BATCHES = st.lists(st.lists(st.integers(0, 3) | st.integers(150_000, 150_002), max_size=9), min_size=1, max_size=6)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The padding is a token that completions have too."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long).reshape(len(rows), width)
    return tokens, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


def ngrams(row: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


@given(rows=BATCHES, n=st.integers(1, 5))
def test_against_the_definitions(rows, n):
    every = [gram for row in rows for gram in ngrams(row, n)]
    expected = len(set(every)) / len(every) if every else math.nan
    assert distinct(*padded(rows), n).item() == pytest.approx(expected, nan_ok=True)
    repeated = [1 - len(set(grams)) / len(grams) if (grams := ngrams(row, n)) else 0.0 for row in rows]
    assert repetition(*padded(rows), n).item() == pytest.approx(sum(repeated) / len(rows), abs=1e-6)


def test_a_word_again_and_again():
    tokens, mask = padded([[5] * 8, [1, 2, 3, 4, 5, 6, 7, 8]])
    assert distinct(tokens, mask, 2).item() == pytest.approx(8 / 14)  # (5, 5), and seven others
    assert repetition(tokens, mask, 4).item() == pytest.approx((4 / 5 + 0) / 2)

"""The table of what a teacher costs: its calculation, and that each way is measured by itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import teacher_limits

cost = pytest.importorskip("teacher_cost", reason="needs transformers")


def test_the_limit_is_the_slowest_of_three():
    """By hand for 7 billion weights on one GPU: 2 FLOP a weight, 7,168 bytes a hidden state."""
    place = teacher_limits.TEACHERS[0]
    rows = {
        message: (size, teacher, student, at) for message, size, teacher, student, at in teacher_limits.limits(place)
    }
    size, teacher, student, at = rows["hidden state, bfloat16"]
    assert size == 2 * 3584
    assert teacher == pytest.approx(0.4 * 989.4e12 / (2 * 6.53e9))
    heads = 5 * 2 * 1536 * 151936 + 3 * 2 * 3584 * 152064
    assert student == pytest.approx(0.4 * 989.4e12 / (4 * 2 * 1.31e9 + heads))
    assert at["10"] == (min(teacher, student, 1.25e9 / size), "student")
    assert rows["logits, bfloat16"][3]["10"] == (1.25e9 / (2 * 152064), "wire")


def test_the_page_has_a_row_for_each_way():
    class Slow:
        def answer(self, rows, wanted):
            return type("Said", (), {"bytes": 10 * sum(wanted)})

    found = cost.measure({"one": Slow(), "other": Slow()}, [[1, 2, 3]], [2])
    assert {way["bytes_per_token"] for way in found.values()} == {10}
    assert all(way["quartiles"][0] <= way["seconds_per_1000_tokens"] <= way["quartiles"][1] for way in found.values())
    settings = {"layers": 1, "hidden": 2, "vocab": 3, "completions": 4, "length": 5, "prompt": 6}
    page = cost.page({"machine": cost.machine.describe("cpu"), "settings": settings, "ways": found})
    assert sum(line.startswith(("| one |", "| other |")) for line in page) == 2

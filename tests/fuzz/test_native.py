"""The native module refuses wrong calls, and after each of them right calls give what they always give."""

from collections import Counter

import pytest
import torch
from fuzzing import laws, running
from fuzzing.case import evaluate
from fuzzing.draws import Draw, seed_of
from fuzzing.recorded import Misused, signatures

from cmdp_fast import cpu

CASES = 250
pytestmark = pytest.mark.skipif(cpu.native is None, reason="the native module is not built")


def test_wrong_calls_are_refused_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Counter[str]()
    for number in range(CASES):
        seed = seed_of(number)
        case = running.case_of(seed)
        if case.operation.startswith("linear") and number % 4:
            continue  # of many tiles
        plain = laws.plain_tensors(case.given)
        expected = evaluate(case, plain, "cpu").everything()
        misused = Misused(Draw(seed ^ 2))
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "native", misused)
            try:
                outcome = evaluate(case, laws.plain_tensors(case.given), "cpu").everything()
            except AssertionError as error:
                pytest.fail(f"seed {seed}: {error}\n{case.describe()}", pytrace=False)
        tried.update(function for function, _ in misused.tried)
        for name, value in outcome.items():
            other = expected[name]
            assert ((value == other) | (value.isnan() & other.isnan())).all(), (seed, name)
    of_tensors = {
        name for name, parameters in signatures().items() if "threads" in parameters or "result" in parameters
    }
    assert set(tried) == of_tensors, tried


def test_a_matrix_of_random_sizes_is_refused_or_counts_its_rows() -> None:
    """Sizes, strides and widths that overflow, in any combination."""
    draw = Draw(1)
    memory = torch.zeros(64)
    for _ in range(2000):
        axes = draw.integer(0, 9)
        numbers = (-1, 0, 1, 2, 3, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1)
        sizes = [draw.random.choice(numbers) for _ in range(axes)]
        strides = [draw.random.choice(numbers) for _ in range(axes + (draw.integer(0, 19) == 0))]
        width = draw.random.choice(numbers)
        try:
            matrix = cpu.native.Matrix(memory.data_ptr(), "float32", sizes, strides, width)
        except ValueError as error:
            assert str(error)
            continue
        rows = 1
        for size in sizes:
            rows *= size
        assert matrix.rows == rows and matrix.width == width
        assert min([*sizes, *strides, width], default=0) >= 0 and len(sizes) == len(strides) <= 8
        last = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True) if n) + width
        assert 0 in sizes or last < 2**62  # elements of 4 bytes

"""Fixtures of the trainer's tests, which need the extra `train`."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_pair import PROBLEMS, tiny_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on more, and metrics are bitwise reproducible for a given number only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pair")
    problems = root / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return {
        "student": tiny_model(root / "student", seed=1),
        "teacher": tiny_model(root / "teacher", seed=2, layers=2),
        "dataset": str(problems),
    }


@pytest.fixture(scope="session")
def isolation() -> None:
    """Judges can be isolated on this machine; a test that needs it is skipped elsewhere, with the reason."""
    from cmdp_fast.judging.pool import IsolationError, Judges

    try:
        Judges("--rewards math_verify", "math_verify", seconds=1.0)
    except IsolationError as error:
        if "a process of it could" in str(error):  # it has all that isolates, and is not isolated
            raise
        pytest.skip(str(error))

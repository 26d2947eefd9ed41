"""Fixtures of the trainer's tests, which need the extra `train`."""

from __future__ import annotations

import pytest
from pair_fixtures import one_thread, pair

__all__ = ["isolation", "one_thread", "pair"]


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

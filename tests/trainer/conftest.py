"""Fixtures of the trainer's tests. Where a package of the extra `train` is missing, its files are skipped, with why."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PACKAGES = (
    *("transformers", "datasets", "accelerate", "tyro", "rich", "matplotlib", "tensorboard"),
    *("reasoning_gym", "math_verify", "regex", "requests"),
)
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

if not MISSING:
    from engine_runs import held, server
    from pair_fixtures import one_thread, own_precision, pair, recipe, undrawn

    __all__ = ["held", "isolation", "one_thread", "own_precision", "pair", "recipe", "server", "undrawn"]


class Skipped(pytest.Module):
    """A file that is not imported: it could not be."""

    def collect(self) -> Any:
        pytest.skip(f"needs the extra `train`: there is no {', '.join(MISSING)}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return Skipped.from_parent(parent, path=module_path) if MISSING else None


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

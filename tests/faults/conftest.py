"""Fixtures of the faults. They train the tiny pair, and need what that needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("transformers", "datasets", "accelerate", "tyro", "rich", "matplotlib")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

if not MISSING:
    import torch
    from engine_runs import held, server
    from faults import command, result
    from matplotlib.figure import Figure
    from pair_fixtures import one_thread, own_precision, pair, undrawn

    from cmdp_fast.cli import main

    __all__ = ["expected", "held", "isolation", "one_thread", "own_precision", "pair", "server", "undrawn"]


class Skipped(pytest.Module):
    """A file that is not imported: it could not be."""

    def collect(self) -> Any:
        pytest.skip(f"needs the extra `train`: there is no {', '.join(MISSING)}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return Skipped.from_parent(parent, path=module_path) if MISSING else None


@pytest.fixture(scope="session")
def expected(pair, tmp_path_factory) -> dict[str, Any]:
    """What the undisturbed run leaves, with one thread and a plot that is not drawn, as in every test here."""
    output, threads = tmp_path_factory.mktemp("expected"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **_: file.write_bytes(b"not drawn"))
        assert main(command(pair, output)) == 0
    torch.set_num_threads(threads)
    return result(output / "r")


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

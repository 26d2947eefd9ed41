"""Fixtures of the tests that train the tiny pair: the trainer's, and those of the integrations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from tiny_pair import SMALL, tiny_pair


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on more, and metrics are bitwise reproducible for a given number only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Figures are made and not drawn, which would take two fifths of a tiny run. A module that looks at them has a
    fixture of this name that does nothing."""

    def savefig(self: Figure, file: Path, **_: Any) -> None:
        file.write_bytes(b"not drawn")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """A process has one precision for accelerate, the first that is asked for: one test's is not the next one's."""
    yield
    if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def recipe(pair, tmp_path_factory) -> Path:
    """A task of two steps with the tiny pair."""
    settings = {**pair, **SMALL, "budget": 2.0, "prefix_budget": 1.5, "step_verifier": "equations"}
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return path

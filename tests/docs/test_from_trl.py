"""The names that the page from TRL to ours compares are those of the installed TRL, and those of our settings."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("trl", exc_type=ImportError)

from trl import GRPOConfig

from cmdp_fast.integrations.trl import CMDPDistillationConfig, CMDPGRPOConfig
from cmdp_fast.trainer.settings.config import TrainConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental
    from trl.experimental.gkd import GKDConfig

PAGE = Path(__file__).parents[2] / "cmdp_fast" / "guide" / "from_trl.md"
TABLES = {"GKDConfig": GKDConfig, "CMDPDistillationConfig": CMDPDistillationConfig, "GRPOConfig": GRPOConfig}


def rows(text: str) -> Iterator[tuple[str, str]]:
    """The cells of the page's tables, each with its column's title."""
    titles: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if not cells:
            titles = []
        elif not titles:
            titles = [cell.strip("`| ") for cell in cells]
        elif not set(line) <= set("|- "):
            yield from zip(titles, cells, strict=False)


ROWS = list(rows(PAGE.read_text(encoding="utf-8")))


def defaults(kind: type) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(kind)}


def test_the_tables_are_found():
    assert {title for title, _ in ROWS} >= {*TABLES, "cmdp-fast train"} and len(ROWS) > 100


@pytest.mark.parametrize("title", TABLES)
def test_names_and_defaults_are_those_of_trl(title):
    known = defaults(TABLES[title])
    cells = [cell for of, cell in ROWS if of == title]
    for cell in cells:
        for name in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", cell):
            assert name in known, cell
        if found := re.search(r"`(\w+)`, default (\S+)", cell):
            assert str(known[found[1]]) == found[2], cell


def test_options_are_ours():
    options = {f"--{name.replace('_', '-')}" for name in defaults(TrainConfig)}
    for title, cell in ROWS:
        if title.startswith("cmdp-fast train"):
            assert set(re.findall(r"--[a-z][\w-]+", cell)) <= options | {"--completion-column"}, cell


def test_defaults_that_differ():
    """Those that the page says in words."""
    theirs, ours = defaults(GRPOConfig), defaults(TrainConfig)
    assert (theirs["num_iterations"], ours["epochs"]) == (1, 2)
    assert (theirs["use_bias_correction_kl"], ours["kl_loss_correction"]) == (True, False)
    assert (theirs["gradient_checkpointing"], ours["gradient_checkpointing"]) == (True, False)
    assert (theirs["beta"], theirs["scale_rewards"]) == (0.0, "group")
    assert (defaults(GKDConfig)["lmbda"], defaults(GKDConfig)["temperature"]) == (0.5, 0.9)
    assert "budget" in defaults(CMDPGRPOConfig)

"""The names that the page from TRL to ours compares are those of the installed TRL, and those of our settings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("trl", exc_type=ImportError)

from trl import GRPOConfig

from cmdp_fast.integrations.trl import CMDPDistillationConfig, CMDPGRPOConfig
from cmdp_fast.trainer.optimization import BETAS
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.settings.recipe import read_recipe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental
    from trl.experimental.gkd import GKDConfig, GKDTrainer

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
OPTIONS = re.compile(r"^\| `(\w+)` \| `([^`]+)` \| (?:`--([a-z-]+)`)?[^|]*\| (?:`([^`]+)`)? ?\|", re.MULTILINE)


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


def test_the_options_have_the_defaults_of_both_sides():
    theirs, ours = defaults(GRPOConfig), dataclasses.asdict(read_recipe("pair"))
    found = OPTIONS.findall(PAGE.read_text(encoding="utf-8"))
    assert [row[0] for row in found] == [cell.strip("`") for title, cell in ROWS if title == "GRPOConfig"]
    for name, default, option, here in found:
        assert str(theirs[name]) == default, name
        if here:
            value = ours[option.replace("-", "_")]
            assert here in (str(value), ",".join(value) if isinstance(value, tuple) else None), option


def test_the_last_column_of_gkd_has_the_defaults_of_the_recipe():
    ours = dataclasses.asdict(read_recipe("pair"))
    cells = " ".join(cell for title, cell in ROWS if title == "cmdp-fast train --method gkd")
    found = re.findall(r"`--([a-z-]+)`, default `([^`]+)`", cells)
    assert {name for name, _ in found} >= {"temperature", "max-new-tokens", "learning-rate"}
    assert all(str(ours[name.replace("-", "_")]) == default for name, default in found), found


def test_every_default_of_gkd_that_differs_is_in_its_table():
    """But for `remove_unused_columns`, which each sets as its own columns need it."""
    theirs, ours = defaults(GKDConfig), defaults(CMDPDistillationConfig)
    named = {name for title, cell in ROWS if title == "GKDConfig" for name in re.findall(r"^`(\w+)", cell)}
    assert {name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]} - named == {
        "remove_unused_columns"
    }


def test_gkd_samples_at_its_temperature_and_compares_at_one():
    """What the page says of `temperature` and of `seq_kd`."""
    called = inspect.getsource(GKDTrainer.compute_loss)
    assert "generalized_jsd_loss(" in called and "temperature" not in called
    step = inspect.getsource(GKDTrainer.training_step)
    assert "random.random() <= self.lmbda" in step and "elif self.seq_kd:" in step
    assert '"temperature": args.temperature' in inspect.getsource(GKDTrainer.__init__)


def test_options_are_ours():
    options = {f"--{name.replace('_', '-')}" for name in defaults(TrainConfig)}
    for title, cell in ROWS:
        if title.startswith("cmdp-fast train"):
            assert set(re.findall(r"--[a-z][\w-]+", cell)) <= options | {"--completion-column"}, cell


def test_defaults_that_differ():
    """Those that the page says in words."""
    trl, ours = defaults(CMDPGRPOConfig), defaults(TrainConfig)
    assert (trl["coefficient"], ours["budget_price"], ours["reward_unit"], ours["baseline"]) == (
        None,
        0.5,
        "auto",
        "rloo",
    )
    assert (trl["kind"], trl["cost"], trl["penalty"]) == (ours["kind"], ours["cost"], ours["penalty"])
    assert trl["discrepancy_weight"] == ours["discrepancy_weight"] and "budget" in trl
    assert (trl["adam_beta1"], trl["adam_beta2"], *BETAS, trl["scale_rewards"]) == (0.9, 0.999, 0.9, 0.95, "group")
    assert trl["disable_dropout"] is False
    assert (defaults(GKDConfig)["lmbda"], defaults(GKDConfig)["temperature"]) == (0.5, 0.9)

"""Tiles so small that a handful of rows and columns make many of them."""

import pytest
from linear_inputs import set_tiles


@pytest.fixture(params=[(4, 16), (7, 768), (1024, 768)], ids=["tiny tiles", "few rows", "usual tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, *request.param)


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, 4, 16)

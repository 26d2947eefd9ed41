"""Tiles so small that a handful of rows and columns make many of them."""

import pytest

from cmdp_fast.ops import tile_size


def set_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Rows of a tile and the unit of its columns, on any device; the area is as small as it gets."""
    for name, value in (("ROWS", rows), ("GPU_ROWS", rows), ("COLUMNS", columns), ("GPU_COLUMNS", columns)):
        monkeypatch.setattr(tile_size, name, value)
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", "1")


@pytest.fixture(params=[(4, 16), (7, 768), (1024, 768)], ids=["tiny tiles", "few rows", "usual tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, *request.param)


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, 4, 16)

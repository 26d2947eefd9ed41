"""Tiles so small that a handful of rows and columns make many of them; each variant of the native kernels."""

import pytest
from linear_inputs import set_tiles

from cmdp_fast.cpu import native


@pytest.fixture(params=[(4, 16), (7, 768), (1024, 768)], ids=["tiny tiles", "few rows", "usual tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, *request.param)


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, 4, 16)


@pytest.fixture(params=[name for name, runs in (native.variants() if native else ()) if runs])
def variant(request):
    """Every compiled variant of the kernels that this processor runs, in turn."""
    chosen = native.variant()
    native.set_variant(request.param)
    yield request.param
    native.set_variant(chosen)

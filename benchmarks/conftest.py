"""Options of the benchmarks under pytest: which shapes, dtypes and peers, as for `cmdp-fast bench`."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest-benchmark is missing; it comes with the extra: pip install '.[bench]'")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cmdp_fast")
    group.addoption("--ops", default="", help="operations, comma-separated (default: all)")
    group.addoption("--shapes", default="", help="shapes, comma-separated (default: each operation's own)")
    group.addoption("--dtype", default="float32,bfloat16", help="dtypes, comma-separated")
    group.addoption("--peers", default="", help="peers, comma-separated, or none (default: all)")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--repeat", type=int, default=9, help="rounds")

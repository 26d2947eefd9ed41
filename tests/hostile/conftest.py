"""Fixtures of the attacks: files and functions that somebody else wrote. Where a package of the extra `train` is
missing, there is nothing to attack."""

from __future__ import annotations

import importlib.util

MISSING = [
    name for name in ("transformers", "datasets", "accelerate", "tyro") if importlib.util.find_spec(name) is None
]

if MISSING:
    collect_ignore_glob = ["test_*.py"]
else:
    from hanging import soon
    from pair_fixtures import one_thread, own_precision, pair, undrawn

    __all__ = ["one_thread", "own_precision", "pair", "soon", "undrawn"]

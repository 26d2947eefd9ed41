"""Peers: other implementations of our operations, or of a part of them, each behind a small adapter.

A peer's module names in `OPS` the operations for which it is a peer. `variants(case)` gives its variants: none for a
mode in which it is no peer; it raises `Absent` or ImportError where it cannot run. An adapter is compared with float64
before it is timed.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.variant import Absent, Variant

PEERS = (
    "eager",
    "kl_div",
    "compile",
    "trl_divergence",
    "trl_logprob",
    "trl_pipeline",
    "verl_pipeline",
    "liger_kl_div",
    "liger_linear_jsd",
    "liger_chunked_jsd",
    "cut_cross_entropy",
    "generate",
)


def serves(peer: str, op: str) -> bool:
    """Whether a peer implements an operation, or a part of it."""
    return op in _module(peer).OPS


def variants_of(peer: str, case: Case) -> list[Variant]:
    """A peer's variants of a case. Raises Absent with the reason if it has none here."""
    try:
        return _module(peer).variants(case)
    except ImportError as error:
        raise Absent(f"cannot be imported: {error}") from error


def _module(peer: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{peer}")

"""Peers: other implementations of what our operations do, or of a part of it, each behind a small adapter.

A peer's module says in `OPS` which operations it is a peer for, and `variants(case)` gives its variants: none for a
mode in which it is no peer, `Absent` or ImportError where it cannot have any here. An adapter is held against float64
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
    """Whether a peer does what an operation does, or a part of it."""
    return op in _module(peer).OPS


def variants_of(peer: str, case: Case) -> list[Variant]:
    """A peer's variants of a case. Raises Absent with the reason if it has none here."""
    try:
        return _module(peer).variants(case)
    except ImportError as error:
        raise Absent(f"cannot be imported: {error}") from error


def _module(peer: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{peer}")

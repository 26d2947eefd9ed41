"""All implementations of a case: ours, and those of the peers that are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from cmdp_fast.bench import peers as peer_modules
from cmdp_fast.bench.case import Case, Op
from cmdp_fast.bench.ops import OPS
from cmdp_fast.bench.variant import Absent, Variant


def variants_of(case: Case, peers: Sequence[str]) -> tuple[Op, list[Variant], dict[str, str]]:
    """(the operation, our variants followed by the peers', the absent peers with the reason)."""
    op = OPS[case.op]
    variants, absent = op.ours(case), {}
    for peer in peers:
        if peer_modules.serves(peer, case.op):
            try:
                variants += peer_modules.variants_of(peer, case)
            except Absent as reason:
                absent[peer] = str(reason)
    return op, variants, absent

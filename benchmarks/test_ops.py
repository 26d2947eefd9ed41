"""The cases of `cmdp-fast bench` under pytest-benchmark: one test per implementation, one group per case.

    pytest benchmarks --ops token_stats --shapes qwen2.5 --benchmark-json FILE

Every implementation is compared with float64 first. pytest-benchmark times one after the other, so other work of the
machine is part of its ratios. `cmdp-fast bench` times all of a case in turn, and adds floors and memory.
"""

import argparse
import functools
import itertools

import pytest
import torch

from cmdp_fast.bench import command, implementations, suite
from cmdp_fast.bench.measure import make_sets
from cmdp_fast.bench.ops import OPS
from cmdp_fast.bench.peers import PEERS
from cmdp_fast.errors import InputError


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    given = argparse.Namespace(
        ops=[name for name in option("--ops").split(",") if name],
        shapes=option("--shapes") or None,
        dtype=option("--dtype"),
        peers=option("--peers") or ",".join(PEERS),
        device=option("--device"),
        repeat=option("--repeat"),
        threads=None,
        sweep=None,
        no_memory=True,
    )
    try:
        plan = command.plan_of(given)
    except InputError as error:
        raise pytest.UsageError(str(error)) from error
    found = []
    for case in plan.cases():
        # A case that cannot run here is listed with its reason, as in `cmdp-fast bench`, and not left out in silence.
        if reason := OPS[case.op].why_not(case):
            found.append(pytest.param(case, None, id=case.label, marks=pytest.mark.skip(reason=reason)))
            continue
        _, variants, absent = implementations.variants_of(case, plan.peers)
        found += [pytest.param(case, variant, id=f"{case.label}: {variant.name}") for variant in variants]
        found += [
            pytest.param(case, None, id=f"{case.label}: {peer}", marks=pytest.mark.skip(reason=f"absent: {reason}"))
            for peer, reason in absent.items()
        ]
    metafunc.parametrize("case, variant", found)


@functools.lru_cache(maxsize=1)
def sets_of(case):
    """The inputs of a case, which its implementations share."""
    return make_sets(lambda seed: OPS[case.op].make(case, seed), case.device)


def test_implementation(benchmark, case, variant, pytestconfig):
    small = case.reduced()
    peers = (variant.peer,) if variant.peer else ()
    op, variants, _ = implementations.variants_of(small, peers)
    twin = next(v for v in variants if v.name == variant.name)
    try:
        error = suite.check(op, small, twin, op.make(small, 0))
    except Exception as problem:  # a peer is foreign code: any error that it raises is the reason for its absence
        if not variant.peer:
            raise
        pytest.skip(f"absent: {problem}")

    turns = itertools.cycle(sets_of(case))
    benchmark.group = case.label
    benchmark.extra_info.update(
        variant=variant.name, peer=variant.peer, lacks=variant.lacks, bytes=op.work(case).bytes, error=error
    )

    def run(state):
        result = variant.run(state)
        if case.device == "cuda":
            torch.cuda.synchronize()
        return result

    rounds = pytestconfig.getoption("--repeat")
    benchmark.pedantic(run, setup=lambda: ((variant.state(next(turns)),), {}), rounds=rounds, warmup_rounds=2)

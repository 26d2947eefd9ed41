"""The stand-in for CUDA (tests/csrc/cuda_host) finds what it has to find in kernels, and nothing in right ones."""

import ctypes
import re

import pytest
import torch
from host_build import HOST, build, problem

pytestmark = pytest.mark.skipif(problem() is not None, reason=str(problem()))
BLOCKS, THREADS = 6, 64
SEEDS = range(1, 9)


@pytest.fixture(scope="module")
def kernels():
    library = ctypes.CDLL(str(build(HOST / "faults.cpp", name="faults")))
    library.run_kernel.restype = ctypes.c_char_p
    library.run_kernel.argtypes = (ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p)
    return library


@pytest.fixture
def run(kernels):
    """Runs a kernel by name: what it wrote, and what the fault said."""

    def call(name, seed):
        out = torch.zeros(BLOCKS, THREADS)
        return out, kernels.run_kernel(name.encode(), seed, out.data_ptr()).decode()

    return call


thread = torch.arange(THREADS, dtype=torch.float32)
RIGHT = {
    "neighbours": torch.arange(BLOCKS)[:, None] * THREADS + (thread + 1) % THREADS,
    "lanes": torch.tensor([i ^ 1 for i in range(THREADS)], dtype=torch.float32).expand(BLOCKS, -1),
    "sum": torch.cat([torch.full((32,), 496.0), torch.full((32,), 1520.0 + 32000.5)]).expand(BLOCKS, -1),
    "early return": torch.where(thread < 10, 5.0, 0.0).expand(BLOCKS, -1),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels(name, run):
    for seed in (0, *SEEDS):
        out, fault = run(name, seed)
        assert fault == "" and torch.equal(out, RIGHT[name]), (seed, fault)


def test_the_last_block_sees_what_all_have_written(run):
    for seed in (0, *SEEDS):
        out, fault = run("last", seed)
        assert fault == "" and out[0, 0] == BLOCKS * THREADS, (seed, fault)


@pytest.mark.parametrize("name", ["missing barrier", "missing warp barrier", "order", "last without a barrier"])
def test_a_result_that_depends_on_the_order_changes(name, run):
    results = {tuple(run(name, seed)[0].nan_to_num(-1.0).flatten().tolist()) for seed in SEEDS}
    assert len(results) > 1


def test_shared_memory_is_nan_until_it_is_written(run):
    for seed in (0, *SEEDS):
        out, _ = run("uninitialised", seed)
        assert out[:, 1::2].isnan().all() and out[:, ::2].eq(1.0).all()


def test_reading_before_the_neighbour_has_written_gives_nan(run):
    assert any(run("missing barrier", seed)[0].isnan().any() for seed in SEEDS)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "divergent barriers",
            r"wait for one another: 10 at the barrier faults.cpp:\d+; 54 at the barrier faults.cpp:\d+",
        ),
        ("half at a barrier", r"32 at the barrier faults.cpp:\d+; 32 for lanes of their warp faults.cpp:\d+"),
        ("a lane has returned", "a mask names a lane that has returned"),
        ("different masks", "lanes wait with different masks|wait for one another: 32 for lanes"),
        ("lane outside the mask", "a lane asks for one that the mask does not name"),
        ("misaligned load", "an access that is not aligned at 128 bits, thread"),
        ("misaligned store", "an access that is not aligned at 128 bits"),
        ("last without a fence before", "an atomic on global memory without a __threadfence before it at faults.cpp"),
        ("last without a fence after", "an atomic on global memory without a __threadfence after it"),
    ],
)
def test_faults_end_the_launch(name, message, run):
    for seed in (0, 1, 2):
        fault = run(name, seed)[1]
        assert re.search(message, fault), fault


def test_after_a_fault_the_next_launch_is_a_fresh_one(run):
    run("divergent barriers", 1)
    out, fault = run("neighbours", 1)
    assert fault == "" and torch.equal(out, RIGHT["neighbours"])


def test_the_same_seed_is_the_same_run(run):
    first, again = (run("missing barrier", 3)[0] for _ in range(2))
    assert torch.equal(first.nan_to_num(-1.0), again.nan_to_num(-1.0))

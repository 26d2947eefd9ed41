"""Backends as a fixture, and which cases of the shared suite a backend has nothing to run for."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hosted  # first: it may bring the CUDA kernels
import pytest
import torch
from helpers import poisoned_memory
from hypothesis import HealthCheck, settings

import cmdp_fast as cf
from cmdp_fast.ops.backends import INTERPRETED

TESTS = Path(__file__).parent
WITH_KERNELS = ("bench", "csrc", "fuzz", "kernels", "ops")  # where .ci/run collects the tests of the GPU kernels
MARKS = {"triton": [pytest.mark.triton], "cuda": [pytest.mark.cuda]}
BACKENDS = [
    pytest.param(name, marks=MARKS.get(name, []))
    for name in ("torch", "cpu", "triton", "cuda")
    if cf.available_backends()[name] is None
]
# A machine that is busy, or slow, fails no test.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if INTERPRETED:
    import interpreter

    interpreter.look_once_a_launch()
    interpreter.look_types_up_once()
    interpreter.round_once()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--fuzz", type=int, metavar="N", help="how many random cases tests/fuzz runs on each backend")
    parser.addoption("--fuzz-seed", type=int, metavar="SEED", help="the one random case that tests/fuzz runs")


def of_kernels(item: pytest.Item) -> bool:
    return "backend" in getattr(item, "fixturenames", ()) or any(item.get_closest_marker(name) for name in MARKS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if of_kernels(item) and not any(TESTS / folder in item.path.parents for folder in WITH_KERNELS):
            raise pytest.UsageError(
                f"{item.nodeid} is of the GPU kernels, whose tests stand in {', '.join(WITH_KERNELS)}"
            )
    # On the GPU backends float64 logits are an error that names the torch backend (test_float64_is_left_to_pytorch), so
    # the float64 cases of the shared suite have nothing to run there; a scan takes float64 (mark `scan`). Likewise
    # operations without a CUDA kernel (test_only_some_operations_have_a_cuda_kernel): marks `mixture` and `tiles`.
    # Skipped rather than left out: the count shows.
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        wide = "float64" in item.keywords or torch.float64 in given
        on_gpu = "triton" in item.keywords or "cuda" in item.keywords
        if on_gpu and wide and item.get_closest_marker("scan") is None:
            item.add_marker(pytest.mark.skip(reason="the GPU kernels take no float64 logits"))
        without = "jsd" in given or any(item.get_closest_marker(mark) for mark in ("mixture", "tiles"))
        if "cuda" in item.keywords and without:
            item.add_marker(pytest.mark.skip(reason="the cuda backend leaves this operation to triton"))
    if config.getoption("--slow"):
        return
    for item in items:  # minutes each; the command says how to run them
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def eighty_columns() -> Iterator[None]:
    """Texts are as wide as the terminal, which COLUMNS tells: here, and in processes that a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        yield


@pytest.fixture
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, poison: None) -> Iterator[str]:
    """A backend by name. Where it needs a GPU, the test makes its tensors there."""
    on_gpu = (request.param == "triton" and not INTERPRETED) or (request.param == "cuda" and not hosted.HOSTED)
    torch.compiler.reset()  # a function is compiled eight times at most, and anew for every backend
    # Not set_default_device(None) afterwards: torch 2.8 then cannot say what it is, to any test that follows.
    with torch.device("cuda") if on_gpu else nullcontext():
        yield request.param


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """The numbers of tests/vectors, by file name."""
    folder = TESTS / "vectors"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

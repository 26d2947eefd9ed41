"""Which backend a call gets, what is said of one that does not work, and that an import asks no driver."""

import importlib.metadata
import os
import subprocess
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cmdp_fast as cf
from cmdp_fast import tiles
from cmdp_fast.ops import backends

CUDA = SimpleNamespace(DEVICE="cuda", COSTS=("reverse_kl",))


@pytest.fixture
def afresh():
    """What was decided before does not count in the test, nor what it decides after it."""
    for forget in (backends._decided.cache_clear, backends._loaded.cache_clear):
        forget()
    said = set(backends._warned)
    backends._warned.clear()
    loaded, decided = backends._loaded, backends._decided
    yield
    backends._warned.update(said)
    loaded.cache_clear()
    decided.cache_clear()


@pytest.fixture
def on_gpu(afresh, monkeypatch):
    """Says which of the GPU backends work: as on a machine with a GPU, though nothing can be launched."""

    def found(cuda, triton, recent=True):
        loaded = {
            "cuda": backends._Loaded(*((CUDA, None) if cuda else (None, "not built"))),
            "triton": backends._Loaded(*((ModuleType("kernels"), None) if triton else (None, "it is not there"))),
            "cpu": backends._Loaded(None, "not needed"),
            "torch": backends._Loaded(tiles),
        }
        monkeypatch.setattr(backends, "_loaded", loaded.__getitem__)
        monkeypatch.setattr(backends, "_recent", lambda index: bool(recent))

    return found


def fake(*shape, dtype=torch.float32, device="cuda"):
    with FakeTensorMode():
        return torch.empty(*shape, dtype=dtype, device=device)


@pytest.mark.filterwarnings("ignore:cmdp_fast serves GPU tensors")
@pytest.mark.parametrize("built, triton, recent", [(b, t, r) for b in (0, 1) for t in (0, 1) for r in (0, 1)])
@pytest.mark.parametrize("preferred", ["cuda", "triton"])
def test_dispatch_of_tensors_on_a_gpu(built, triton, recent, preferred, on_gpu, monkeypatch):
    """The preference decides where both work; what has no CUDA kernel, and a device too old, is triton's."""
    on_gpu(built, triton, recent)
    monkeypatch.setattr(backends, "PREFERRED_ON_GPU", preferred)
    x = fake(2, 3)
    works = {"cuda": built and recent, "triton": triton}
    other = "triton" if preferred == "cuda" else "cuda"
    expected = preferred if works[preferred] else other if works[other] else "torch"
    assert backends.choose(None, x, "token_stats") == expected
    assert backends.choose(None, x, "divergence") == ("triton" if triton else "torch")
    assert backends.choose_for_logits(None, x, torch.float64, "token_stats") == "torch"
    if built and not recent:
        with pytest.raises(ValueError, match=r"of compute capability 8\.0 or later, got one on cuda"):
            backends.choose("cuda", x, "token_stats")


def test_the_choice_is_no_break_in_a_compiled_graph(on_gpu, monkeypatch):
    on_gpu(True, False)
    monkeypatch.setattr(backends, "PREFERRED_ON_GPU", "cuda")
    chosen = []

    def record(graph, inputs):
        chosen.extend(node.args[-3] for node in graph.graph.nodes if "constrained_pass" in str(node.target))
        return graph.forward

    @torch.compile(fullgraph=True, backend=record)
    def step(x, y, tokens, reward):
        return cf.constrained_reward(x, y, tokens, reward, 1.0).reward

    with FakeTensorMode(allow_non_fake_inputs=True):
        x, y = (torch.empty(2, 3, 37, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        tokens, reward = torch.zeros(2, 3, dtype=torch.int64, device="cuda"), torch.zeros(2, 3, device="cuda")
        assert step(x, y, tokens, reward).shape == (2, 3)
    assert chosen == ["cuda"]


def heard(call):
    """The warnings of a call: texts and files."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [(str(w.message), w.filename) for w in caught if "cmdp_fast" in str(w.message)]


def test_the_first_gpu_tensors_that_no_kernel_serves_are_loud(on_gpu):
    """Once, in the line of the call. A float64 tensor is PyTorch's by design, and what has a kernel is served."""
    on_gpu(True, False)
    x = fake(2, 3)
    assert not heard(lambda: backends.choose_for_logits(None, x, torch.float64, "divergence"))
    assert not heard(lambda: backends.choose(None, x, "token_stats"))
    text = "cmdp_fast serves GPU tensors with plain PyTorch, without its Triton kernels: it is not there"
    assert heard(lambda: backends.choose_for_logits(None, x, torch.float32, "divergence")) == [(text, __file__)]
    assert not heard(lambda: [backends.choose(None, t, "update_states") for t in (x, x, fake(2, 3, device="cuda:1"))])


def test_a_warning_that_is_an_error_is_raised_by_each_call(on_gpu):
    on_gpu(False, False)
    x = fake(2, 3)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeWarning, match="serves GPU tensors with plain PyTorch"):
                backends.choose(None, x, "divergence")


def test_other_devices_have_no_kernel_to_miss(on_gpu):
    on_gpu(False, False)
    assert not heard(lambda: backends.choose(None, fake(2, 3, device="meta"), "token_stats"))


def test_without_a_gpu_a_tensor_on_one_is_a_fake_and_misses_nothing(afresh, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "INTERPRETED", False)
    assert not heard(lambda: backends.choose(None, fake(2, 3), "divergence"))


@pytest.fixture
def gpu_and_versions(afresh, monkeypatch):
    """A machine with a GPU, and what is installed there."""

    def install(torch_version, triton_version, required=()):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(backends, "INTERPRETED", False)
        monkeypatch.setattr(torch, "__version__", torch_version)
        triton = ModuleType("triton")
        triton.__version__ = triton_version
        monkeypatch.setitem(sys.modules, "triton", triton if triton_version else None)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(required))

    return install


@pytest.mark.parametrize("version", ["2.6.0+cu124", "2.7.1+rocm6.3"])
def test_a_torch_with_too_old_a_triton_is_named_with_its_cure(version, gpu_and_versions):
    gpu_and_versions(version, "3.3.1")
    problem = (
        f"torch {version} comes with a Triton older than 3.4; the Triton kernels need torch 2.8 or later: "
        "pip install 'torch>=2.8'"
    )
    assert cf.available_backends()["triton"] == problem
    x = fake(2, 3)
    with pytest.raises(ValueError, match=r"'triton' is not available here: torch 2\..* need torch 2\.8 or later"):
        cf.divergence(x, x, backend="triton")
    assert [text for text, _ in heard(lambda: backends.choose(None, x, "divergence"))] == [
        f"cmdp_fast serves GPU tensors with plain PyTorch, without its Triton kernels: {problem}"
    ]


@pytest.mark.parametrize(
    "required, fitting",
    [
        (["numpy", 'triton==3.6.0; platform_system == "Linux"'], "triton==3.6.0"),
        (['pytorch-triton-rocm==3.6.0 ; platform_system == "Linux"'], "pytorch-triton-rocm==3.6.0"),
        ([], "triton>=3.4"),
    ],
)
@pytest.mark.parametrize(
    "version, problem",
    [
        ("3.3.1", "Triton 3.3.1 is too old: the kernels need 3.4 or later"),
        (None, "triton cannot be imported (import of triton halted; None in sys.modules)"),
    ],
)
def test_a_triton_that_does_not_fit_is_named_with_the_one_that_does(
    version, problem, required, fitting, gpu_and_versions
):
    gpu_and_versions("2.11.0+cu130", version, required)
    assert cf.available_backends()["triton"] == f"{problem}: pip install '{fitting}'"


UNASKED = """
import torch

asked = []


def watch(module, name):
    asks = getattr(module, name, None)
    if asks is not None:  # a build of torch for CPUs lacks some
        setattr(module, name, lambda *given, **named: asked.append(name) or asks(*given, **named))


for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_properties"):
    watch(torch.cuda, name)
for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_getDevice", "_cuda_getDriverVersion"):
    watch(torch._C, name)
import cmdp_fast as cf
import cmdp_fast.cli, cmdp_fast.info
x, tokens = torch.randn(1, 2, 3, requires_grad=True), torch.zeros(1, 2, dtype=torch.int64)
cf.constrained_reward(x, x.detach(), tokens, torch.ones(1, 2), 1.0).stats.reverse_kl.sum().backward()
cf.divergence(x, x, backend="torch")
print(asked)
cf.available_backends()
print(asked[:1])
"""


def test_neither_an_import_nor_a_call_with_cpu_tensors_asks_for_a_gpu():
    """After one has, a fork of the process can use none."""
    command = [sys.executable, "-c", UNASKED]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "['is_available']"]

"""The one interface of every backend, which backends work on this machine, and which one a call uses.

All of it is found out on first use. An import asks no driver: a process that has asked NVIDIA's cannot be forked any
more by one that uses a GPU. A call with CPU tensors asks for the native module alone.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import warnings
from types import ModuleType
from typing import Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor

from cmdp_fast import cpu, installation, native_module, tiles
from cmdp_fast.compiling import constant
from cmdp_fast.layout import (
    Account,
    BudgetRule,
    ListedRows,
    Mixture,
    Pair,
    Rewarding,
    Settlement,
    TailGradient,
    TokenTrace,
    Upstream,
)
from cmdp_fast.reference import BudgetTrace
from cmdp_fast.tails import TailState

OLDEST_TRITON = (3, 4)  # whose `triton.knobs` and language the kernels use
OLDEST_TORCH = (2, 8)  # the oldest whose builds for GPUs bring that Triton

# Triton's own switch: its kernels run on CPU tensors, one numpy operation at a time.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

BackendName = Literal["cpu", "cuda", "triton", "torch"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)
ON_GPU = ("cuda", "triton")
NO_DEVICE = "no CUDA or ROCm device was found"

# The operations that the CUDA C++ kernels serve; all others are Triton's on a GPU.
OF_CUDA = ("token_stats", "constrained_reward", "budget_trace", "modified_reward", "topk_stats")

# Which of the two GPU backends a call gets where both work. One for all operations: constrained_reward promises bitwise
# what the other three give in turn. A prediction, since no speed has been measured on a GPU: the passes over the logits
# are bound by memory with either on A100, H100, H200 and B200; instructions per column of the statistics (bfloat16) are
# 16.0 for triton and 16.2 for cuda (15.0 where no reference rises) on sm_90, 13.4 and 16.2 on sm_100
# (`python benchmarks/static_gpu.py`). A trace is added in parallel by triton, token after token by cuda. For cuda speak
# one launch where triton has two, or three, and nothing to compile at run time. AMD's GPUs have triton alone.
PREFERRED_ON_GPU: BackendName = "triton"


class Backend(Protocol):
    """What a backend offers: functions of tensors that have been checked, and that know nothing of autograd.

    A backend is a module of these functions. Not all have all: ``torch`` leaves statistics of whole rows to formulas
    that PyTorch differentiates itself (`cmdp_fast.reference`) and has no `constrained_pass`, and ``cuda`` has those of
    `OF_CUDA`. `choose` names no backend for an operation that it does not serve.
    """

    COSTS: tuple[str, ...]
    """The costs that `constrained_pass` scans; empty where there is none."""

    def token_stats(self, pair: Pair) -> tuple[list[Tensor], Tensor]:
        """The six statistics ``[...]`` and the saved scalars ``[..., SAVED]`` float64. A masked row is all 0."""

    def token_stats_backward(
        self, pair: Pair, saved: Tensor, upstream: Upstream, out: Tensor, first_column: int = 0
    ) -> None:
        """Writes the gradient of the student's logits into ``out``, which may be the logits."""

    def update_states(self, pair: Pair, first_column: int, fields: Tensor) -> None:
        """Folds a tile of columns into ``fields [rows, 13]``; tokens count from the vocabulary's first column."""

    def mixture(self, pair: Pair, weights: Mixture) -> tuple[Tensor, Tensor, Tensor]:
        """A mixture divergence ``[...]``, the saved scalars, and the mean ``[...]`` that the backward pass needs."""

    def mixture_backward(
        self, pair: Pair, saved: Tensor, mean: Tensor, upstream: Tensor, weights: Mixture, out: Tensor
    ) -> None:
        """Writes its gradient into ``out``."""

    def update_tails(self, rows: ListedRows, first_column: int, state: TailState) -> None:
        """Folds a tile of columns into the states; ids and tokens count from the vocabulary's first column."""

    def tail_backward(self, rows: ListedRows, gradient: TailGradient, out: Tensor, first_column: int = 0) -> None:
        """Writes the gradient of the student's logits, or of a tile of them, into ``out``, which may be the logits.
        0 for masked rows, for columns beyond the width, and for rows of which ``gradient`` is all 0."""

    def trace_budgets(
        self, account: Account, limits: Tensor, rule: BudgetRule, trace: BudgetTrace, rewarding: Rewarding | None = None
    ) -> None:
        """Writes the trace of costs against the limits ``[B]`` float64, and the modified reward if there is one."""

    def modify_rewards(self, account: Account, trace: TokenTrace, rewarding: Rewarding) -> None:
        """Writes the modified reward of every token."""

    def constrained_pass(self, pair: Pair, settlement: Settlement) -> tuple[list[Tensor], Tensor]:
        """`token_stats`, and the trace and the reward of what they cost, with nothing in between."""


class _Loaded(NamedTuple):
    """What was found of a backend: the module, or None and why it does not work here."""

    module: ModuleType | None
    problem: str | None = None


@functools.cache
def _loaded(name: str) -> _Loaded:
    if name == "cpu":
        return _Loaded(cpu, cpu.PROBLEM)
    if name == "torch":
        return _Loaded(tiles)
    return _load_cuda() if name == "cuda" else _load_triton()


def _load_cuda() -> _Loaded:
    try:
        from cmdp_fast import cuda
    except ImportError as error:
        note = "" if cpu.native is None else cpu.native.CUDA_NOTE
        return _Loaded(None, f"the CUDA kernels were {note or f'not built ({error})'}")
    if cpu.PROBLEM == native_module.OTHER_SOURCES:  # built with it
        return _Loaded(None, cpu.PROBLEM)
    if cuda.DEVICE == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
        return _Loaded(None, "no CUDA device was found")
    return _Loaded(cuda)


def _load_triton() -> _Loaded:
    if not (INTERPRETED or torch.cuda.is_available()):
        return _Loaded(None, f"{NO_DEVICE} (TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly)")
    # Interpreted kernels know no driver, and so need no build of torch for one.
    if not INTERPRETED and _release(torch.__version__) < OLDEST_TORCH:
        torch_needed, triton_needed = _dotted(OLDEST_TORCH), _dotted(OLDEST_TRITON)
        return _Loaded(
            None,
            f"torch {torch.__version__} comes with a Triton older than {triton_needed}; the Triton kernels need torch "
            f"{torch_needed} or later: pip install 'torch>={torch_needed}'",
        )
    try:
        import triton

        if _release(triton.__version__) < OLDEST_TRITON:
            problem = f"Triton {triton.__version__} is too old: the kernels need {_dotted(OLDEST_TRITON)} or later"
            return _Loaded(None, f"{problem}: pip install '{_fitting_triton()}'")
        from cmdp_fast import kernels
    except ImportError as error:
        return _Loaded(None, f"triton cannot be imported ({error}): pip install '{_fitting_triton()}'")
    return _Loaded(kernels)


def _fitting_triton() -> str:
    """What pip is asked for: the one Triton that this torch names, or any that will do."""
    try:
        required = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:  # used from where it was compiled
        required = []
    named = (requirement.partition(";")[0].strip() for requirement in required if "triton" in requirement)
    return next(named, f"triton>={_dotted(OLDEST_TRITON)}")


def _release(version: str) -> tuple[int, ...]:
    """Major and minor: the rest may be anything, as in 2.8.0a0+gitba56102."""
    return tuple(int(part) for part in version.split(".")[:2])


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def get(name: str) -> Backend:
    """The backend of a name that `choose` has returned."""
    return cast(Backend, _loaded(name).module)


@constant  # a graph is traced through no import
def scans(name: str, cost: str) -> bool:
    """Whether a backend that `choose` has returned has the whole method in one pass for a cost."""
    return cost in get(name).COSTS


def available_backends() -> dict[BackendName, str | None]:
    """Every backend by name; the value is None if it works here, else the reason why it does not.

    ``cpu``: the native kernels, for CPU tensors. ``cuda``: CUDA C++ kernels of some operations, for NVIDIA GPUs of
    compute capability 8.0 and later, compiled when the package was. ``triton``: kernels of all operations, for
    NVIDIA's and AMD's GPUs; they need torch 2.8 and Triton 3.4 or later. ``torch``: plain PyTorch
    (`cmdp_fast.reference`), for any device.

    The first call asks for GPUs with ``torch.cuda.is_available()``, after which a process that uses one cannot be
    forked any more, unless PYTORCH_NVML_BASED_CUDA_CHECK=1 is set for torch.
    """
    return {name: _loaded(name).problem for name in NAMES}


def choose(backend: str | None, tensor: Tensor, operation: str) -> BackendName:
    """The backend that serves an operation on a tensor's device: the one named, or the best that works here.

    Raises ValueError for an unknown name, a backend that does not work here or has no kernel for the operation, or a
    tensor it cannot take.
    """
    return _chosen(_name(backend), tensor.device, operation, False)


def choose_for_logits(backend: str | None, tensor: Tensor, computed: torch.dtype, operation: str) -> BackendName:
    """As `choose`, for statistics in the dtype ``computed``: the GPU kernels leave float64 to PyTorch."""
    return _chosen(_name(backend), tensor.device, operation, computed == torch.float64)


def _name(backend: object) -> str | None:
    """What may be looked up in a cache; raises ValueError for the rest."""
    if backend is not None and not isinstance(backend, str):
        raise ValueError(_unknown(backend))
    return backend


def _unknown(backend: object) -> str:
    return f"backend={backend!r} is unknown; expected None or one of {', '.join(NAMES)}"


@constant  # a graph is traced through no cache, and a warning is no part of it
def _chosen(backend: str | None, device: torch.device, operation: str, float64: bool) -> BackendName:
    return _decided(backend, device, operation, float64)


@functools.cache  # every call of an operation comes by
def _decided(backend: str | None, device: torch.device, operation: str, float64: bool) -> BackendName:
    if backend is None:
        return _best(device, operation, float64)
    name = next((name for name in NAMES if name == backend), None)
    if name is None:
        raise ValueError(_unknown(backend))
    problem = _loaded(backend).problem
    if problem is not None:
        raise ValueError(f"backend={backend!r} is not available here: {problem}")
    if backend == "cuda" and operation not in OF_CUDA:
        raise ValueError(
            f"backend='cuda' has no kernel for {operation}, only for {', '.join(OF_CUDA)}; use backend='triton'"
        )
    if not _takes(backend, device):
        raise ValueError(f"backend={backend!r} takes {_TAKES[backend]}, got one on {device}")
    if float64 and backend in ON_GPU:
        raise ValueError(
            f"backend={backend!r} takes float32, bfloat16 and float16 logits, got float64; use backend='torch'"
        )
    return name


def _best(device: torch.device, operation: str, float64: bool) -> BackendName:
    """The backend that a call gets which names none."""
    gpu = () if float64 else _gpu_backends(operation)
    on_cpu: tuple[BackendName, ...] = ("cpu",)
    candidates = {"cpu": on_cpu, "cuda": gpu}.get(device.type, ())
    for name in candidates:
        if _loaded(name).problem is None and _takes(name, device):
            return name
    if candidates:
        _warn_of_fallback(device.type)
    return "torch"


def _gpu_backends(operation: str) -> tuple[BackendName, ...]:
    """The backends that have kernels for an operation, the preferred one first."""
    if operation not in OF_CUDA:
        return ("triton",)
    return PREFERRED_ON_GPU, "triton" if PREFERRED_ON_GPU == "cuda" else "cuda"


_warned: set[str] = set()


def _warn_of_fallback(kind: str) -> None:
    """Says once per process that the tensors of a kind of device are served by PyTorch, why, and until when."""
    if kind == "cpu":
        problem, tensors, kernels = cpu.PROBLEM, "CPU", "native"
        cure = f". To have them: {cpu.CURE}" if cpu.CURE else ""
    else:
        problem, tensors, kernels, cure = _loaded("triton").problem, "GPU", "Triton", ""
    if kind in _warned or (problem or "").startswith(NO_DEVICE):  # without a device it is no tensor, but a fake
        return
    warnings.warn(
        f"cmdp_fast serves {tensors} tensors with plain PyTorch, without its {kernels} kernels: {problem}{cure}",
        RuntimeWarning,
        stacklevel=installation.level_outside(),
    )
    _warned.add(kind)  # not before: where warnings are errors, each call says so


_TAKES = {
    "cpu": "CPU tensors",
    "cuda": "tensors on an NVIDIA GPU of compute capability 8.0 or later",
    "triton": "tensors on a GPU",
}


def _takes(backend: str, device: torch.device) -> bool:
    """Whether a backend that works here takes tensors on a device."""
    if backend == "cuda":
        home = cast(ModuleType, _loaded("cuda").module).DEVICE
        return device.type == home and (home == "cpu" or _recent(device.index))
    if backend == "triton":
        return device.type == "cuda" or (INTERPRETED and device.type == "cpu")
    return backend == "torch" or device.type == "cpu"


def _recent(index: int | None) -> bool:
    """Whether a device has what the CUDA kernels were compiled for."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index) >= (8, 0)

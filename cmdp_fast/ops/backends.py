"""The one interface of every backend, which backends work on this machine, and which one a call uses."""

from __future__ import annotations

import os
import sys
import warnings
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from cmdp_fast import cpu, native_module, tiles
from cmdp_fast.layout import Account, BudgetRule, Mixture, Pair, Rewarding, Settlement, TokenTrace, Upstream
from cmdp_fast.reference import BudgetTrace

OLDEST_TRITON = (3, 4)  # whose `triton.knobs` and language the kernels use

# The operations that the CUDA C++ kernels serve; all others are Triton's on a GPU.
OF_CUDA = ("token_stats", "constrained_reward", "budget_trace", "modified_reward")

# Which of the two GPU backends a call gets where both work. One for all operations: constrained_reward promises bitwise
# what the other three give in turn. A prediction, since no speed has been measured on a GPU: the passes over the logits
# are bound by memory with either on A100, H100, H200 and B200; instructions per column of the statistics (bfloat16) are
# 16.0 for triton and 16.2 for cuda (15.0 where no reference rises) on sm_90, 13.4 and 16.2 on sm_100
# (`python benchmarks/static_gpu.py`). A trace is added in parallel by triton, token after token by cuda. For cuda speak
# one launch fewer and nothing to compile at run time. AMD's GPUs have triton alone.
PREFERRED_ON_GPU = "triton"


class Backend(Protocol):
    """What a backend offers: functions of tensors that have been checked, and that know nothing of autograd.

    A backend is a module of these functions. Not all have all: ``torch`` leaves statistics of whole rows and mixtures
    to formulas that PyTorch differentiates itself (`cmdp_fast.reference`) and has no `constrained_pass`, and ``cuda``
    has those of `OF_CUDA`. `choose` names no backend for an operation that it does not serve.
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

    def trace_budgets(
        self, account: Account, limits: Tensor, rule: BudgetRule, trace: BudgetTrace, rewarding: Rewarding | None = None
    ) -> None:
        """Writes the trace of costs against the limits ``[B]`` float64, and the modified reward if there is one."""

    def modify_rewards(self, account: Account, trace: TokenTrace, rewarding: Rewarding) -> None:
        """Writes the modified reward of every token."""

    def constrained_pass(self, pair: Pair, settlement: Settlement) -> tuple[list[Tensor], Tensor]:
        """`token_stats`, and the trace and the reward of what they cost, with nothing in between."""


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    """The CUDA kernels and None, or None and the reason why they cannot be used."""
    try:
        from cmdp_fast import cuda
    except ImportError as error:
        note = "" if cpu.native is None else cpu.native.CUDA_NOTE
        return None, f"the CUDA kernels were {note or f'not built ({error})'}"
    if cpu.PROBLEM == native_module.OTHER_SOURCES:  # built with it
        return None, cpu.PROBLEM
    if cuda.DEVICE == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
        return None, "no CUDA device was found"
    return cuda, None


def _load_kernels() -> tuple[ModuleType | None, str | None]:
    """The Triton kernels and None, or None and the reason why they cannot be used."""
    if not (INTERPRETED or torch.cuda.is_available()):
        return None, "no CUDA or ROCm device was found (TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly)"
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
            oldest = ".".join(map(str, OLDEST_TRITON))
            return None, f"Triton {triton.__version__} is too old: the kernels need {oldest} or later"
        from cmdp_fast import kernels
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    return kernels, None


# Triton's own switch: its kernels run on CPU tensors, one numpy operation at a time.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

cuda, _cuda_problem = _load_cuda()
kernels, _kernels_problem = _load_kernels()

_MODULES: dict[str, ModuleType | None] = {"cpu": cpu, "cuda": cuda, "triton": kernels, "torch": tiles}
ON_GPU = ("cuda", "triton")

# Every backend, and None if it works here, else why it does not.
_BACKENDS: dict[str, str | None] = {
    "cpu": cpu.PROBLEM,
    "cuda": _cuda_problem,
    "triton": _kernels_problem,
    "torch": None,
}


def get(name: str) -> Backend:
    """The backend of a name that `choose` has returned."""
    return cast(Backend, _MODULES[name])


def available_backends() -> dict[str, str | None]:
    """Every backend by name; the value is None if it works here, else the reason why it does not.

    ``cpu``: the native kernels, for CPU tensors. ``cuda``: CUDA C++ kernels of some operations, for NVIDIA GPUs of
    compute capability 8.0 and later, compiled when the package was. ``triton``: kernels of all operations, for
    NVIDIA's and AMD's GPUs. ``torch``: plain PyTorch (`cmdp_fast.reference`), for any device.
    """
    return dict(_BACKENDS)


def choose(backend: str | None, tensor: Tensor, operation: str) -> str:
    """The backend that serves an operation on a tensor's device: the one named, or the best that works here.

    Raises ValueError for an unknown name, a backend that does not work here or has no kernel for the operation, or a
    tensor it cannot take.
    """
    device = tensor.device.type
    if backend is None:
        if device == "cpu" and cpu.native is None:
            _warn_of_fallback()
        candidates = {"cpu": ("cpu",), "cuda": _gpu_backends(operation)}.get(device, ())
        for name in candidates:  # a loop: the graphs of older versions of torch know no `next` with a default
            if _BACKENDS[name] is None and _takes(name, tensor):
                return name
        return "torch"
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected None or one of {', '.join(_BACKENDS)}")
    if _BACKENDS[backend] is not None:
        raise ValueError(f"backend={backend!r} is not available here: {_BACKENDS[backend]}")
    if backend == "cuda" and operation not in OF_CUDA:
        raise ValueError(
            f"backend='cuda' has no kernel for {operation}, only for {', '.join(OF_CUDA)}; use backend='triton'"
        )
    if not _takes(backend, tensor):
        raise ValueError(f"backend={backend!r} takes {_TAKES[backend]}, got one on {tensor.device}")
    return backend


def _gpu_backends(operation: str) -> tuple[str, ...]:
    """The backends that have kernels for an operation, the preferred one first."""
    if operation not in OF_CUDA:
        return ("triton",)
    return PREFERRED_ON_GPU, "triton" if PREFERRED_ON_GPU == "cuda" else "cuda"


_warned = False


@torch.compiler.assume_constant_result  # no part of a graph
def _warn_of_fallback() -> None:
    """Says once per process that CPU tensors are served by PyTorch, why, and until when."""
    global _warned
    if not _warned:
        frame, level = sys._getframe(), 1
        while frame.f_back and frame.f_code.co_filename.startswith(str(native_module.PACKAGE)):
            frame, level = frame.f_back, level + 1  # to the caller of an operation
        cure = f". To have them: {cpu.CURE}" if cpu.CURE else ""
        warnings.warn(
            f"cmdp_fast serves CPU tensors with plain PyTorch, without its native kernels: {cpu.PROBLEM}{cure}",
            RuntimeWarning,
            stacklevel=level,
        )
        _warned = True  # not before: where warnings are errors, each call says so


_TAKES = {
    "cpu": "CPU tensors",
    "cuda": "tensors on an NVIDIA GPU of compute capability 8.0 or later",
    "triton": "tensors on a GPU",
}


def _takes(backend: str, tensor: Tensor) -> bool:
    """Whether a backend that works here takes tensors on this one's device."""
    device = tensor.device.type
    if backend == "cuda":
        assert cuda is not None
        return device == cuda.DEVICE and (device == "cpu" or _recent(tensor.device.index))
    if backend == "triton":
        return device == "cuda" or (INTERPRETED and device == "cpu")
    return backend == "torch" or device == "cpu"


@torch.compiler.assume_constant_result
def _recent(index: int | None) -> bool:
    """Whether a device has what the CUDA kernels were compiled for."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index) >= (8, 0)


def choose_for_logits(backend: str | None, tensor: Tensor, computed: torch.dtype, operation: str) -> str:
    """As `choose`, for statistics in the dtype ``computed``: the GPU kernels leave float64 to PyTorch."""
    chosen = choose(backend, tensor, operation)
    if chosen in ON_GPU and computed == torch.float64:
        if backend is not None:
            raise ValueError(
                f"backend={backend!r} takes float32, bfloat16 and float16 logits, got float64; use backend='torch'"
            )
        return "torch"
    return chosen

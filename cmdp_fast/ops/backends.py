"""Which implementations work on this machine, and which one a call uses."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.ops import native_module
from cmdp_fast.ops.preference import CHOICES, gpu_backends

OLDEST_TRITON = (3, 4)  # whose `triton.knobs` and language the kernels use


def _load_cuda():
    """The CUDA kernels and None, or None and the reason why they cannot be used."""
    try:
        from cmdp_fast import cuda
    except ImportError as error:
        note = "" if native is None else native.CUDA_NOTE
        return None, f"the CUDA kernels were {note or f'not built ({error})'}"
    if _native_problem == native_module.OTHER_SOURCES:  # built with it
        return None, _native_problem
    if cuda.DEVICE == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
        return None, "no CUDA device was found"
    return cuda, None


def _load_kernels():
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

native, _native_problem, native_cure = native_module.load()
cuda, _cuda_problem = _load_cuda()
kernels, _kernels_problem = _load_kernels()

# The GPU backends: modules of the same functions.
GPU: dict[str, Any] = {"cuda": cuda, "triton": kernels}

# Every backend, and None if it works here, else why it does not.
_BACKENDS: dict[str, str | None] = {
    "cpu": _native_problem,
    "cuda": _cuda_problem,
    "triton": _kernels_problem,
    "torch": None,
}


def available_backends() -> dict[str, str | None]:
    """Every backend by name; the value is None if it works here, else the reason why it does not.

    ``cpu``: the native kernels, for CPU tensors. ``cuda``: CUDA C++ kernels of some operations (``ops/preference.py``),
    for NVIDIA GPUs of compute capability 8.0 and later, compiled when the package was. ``triton``: kernels of all
    operations, for NVIDIA's and AMD's GPUs. ``torch``: plain PyTorch (`cmdp_fast.reference`), for any device.
    """
    return dict(_BACKENDS)


def choose(backend: str | None, tensor: Tensor, operation: str) -> str:
    """The backend that serves an operation on a tensor's device: the one named, or the best that works here.

    Raises ValueError for an unknown name, a backend that does not work here or has no kernel for the operation, or a
    tensor it cannot take.
    """
    device = tensor.device.type
    if backend is None:
        if device == "cpu" and native is None:
            _warn_of_fallback()
        candidates = {"cpu": ("cpu",), "cuda": gpu_backends(operation)}.get(device, ())
        return next((name for name in candidates if _BACKENDS[name] is None and _takes(name, tensor)), "torch")
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected None or one of {', '.join(_BACKENDS)}")
    if _BACKENDS[backend] is not None:
        raise ValueError(f"backend={backend!r} is not available here: {_BACKENDS[backend]}")
    if backend == "cuda" and operation not in CHOICES:
        raise ValueError(
            f"backend='cuda' has no kernel for {operation}, only for {', '.join(CHOICES)}; use backend='triton'"
        )
    if not _takes(backend, tensor):
        raise ValueError(f"backend={backend!r} takes {_TAKES[backend]}, got one on {tensor.device}")
    return backend


_warned = False


@torch.compiler.assume_constant_result  # no part of a graph
def _warn_of_fallback() -> None:
    """Says once a process that, why, and until when CPU tensors are served by PyTorch."""
    global _warned
    if not _warned:
        frame, level = sys._getframe(), 1
        while frame.f_back and frame.f_code.co_filename.startswith(str(native_module.PACKAGE)):
            frame, level = frame.f_back, level + 1  # to whoever called an operation
        cure = f". To have them: {native_cure}" if native_cure else ""
        warnings.warn(
            f"cmdp_fast serves CPU tensors with plain PyTorch, without its native kernels: {_native_problem}{cure}",
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
    if chosen in GPU and computed == torch.float64:
        if backend is not None:
            raise ValueError(
                f"backend={backend!r} takes float32, bfloat16 and float16 logits, got float64; use backend='torch'"
            )
        return "torch"
    return chosen

"""Which implementations work on this machine, and which one a call uses."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def _load_native():
    """The native module and None, or None and the reason why it cannot be used."""
    try:
        from cmdp_fast import _C

        _C.variant()  # raises if the processor is older than every compiled variant
    except (ImportError, RuntimeError) as error:
        return None, f"the native module was not built, or does not run here ({error})"
    return _C, None


def _load_kernels():
    """The Triton kernels and None, or None and the reason why they cannot be used."""
    if not (INTERPRETED or torch.cuda.is_available()):
        return None, "no CUDA or ROCm device was found (TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly)"
    try:
        from cmdp_fast import kernels
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    return kernels, None


# Triton's own switch: its kernels run on CPU tensors, one numpy operation at a time.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

native, _native_problem = _load_native()
kernels, _kernels_problem = _load_kernels()

# Every backend, and None if it works here, else why it does not.
_BACKENDS: dict[str, str | None] = {
    "cpu": _native_problem,
    "triton": _kernels_problem,
    "torch": None,
}


def available_backends() -> dict[str, str | None]:
    """Every backend by name; the value is None if it works here, else the reason why it does not.

    ``cpu``: the native kernels, for CPU tensors. ``triton``: GPU kernels. ``torch``: plain PyTorch
    (`cmdp_fast.reference`), for any device.
    """
    return dict(_BACKENDS)


def choose(backend: str | None, tensor: Tensor) -> str:
    """The backend that serves a tensor's device: the one named, or the best that works here.

    Raises ValueError for an unknown name, a backend that does not work here, or a tensor it cannot take.
    """
    device = tensor.device.type
    if backend is None:
        best = {"cpu": "cpu", "cuda": "triton"}.get(device, "torch")
        return best if _BACKENDS[best] is None else "torch"
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected None or one of {', '.join(_BACKENDS)}")
    if _BACKENDS[backend] is not None:
        raise ValueError(f"backend={backend!r} is not available here: {_BACKENDS[backend]}")
    if backend == "cpu" and device != "cpu":
        raise ValueError(f"backend='cpu' takes CPU tensors, got one on {tensor.device}")
    if backend == "triton" and device != "cuda" and not (INTERPRETED and device == "cpu"):
        raise ValueError(f"backend='triton' takes tensors on a GPU, got one on {tensor.device}")
    return backend


def choose_for_logits(backend: str | None, tensor: Tensor, computed: torch.dtype) -> str:
    """As `choose`, for statistics in the dtype ``computed``: the GPU kernels leave float64 to PyTorch."""
    chosen = choose(backend, tensor)
    if chosen == "triton" and computed == torch.float64:
        if backend is not None:
            raise ValueError(
                "backend='triton' takes float32, bfloat16 and float16 logits, got float64; use backend='torch'"
            )
        return "torch"
    return chosen

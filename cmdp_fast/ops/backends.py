"""Which implementations work on this machine, and which one a call uses."""

from __future__ import annotations

from torch import Tensor


def _load_native():
    """The native module and None, or None and the reason why it cannot be used."""
    try:
        from cmdp_fast import _C

        _C.variant()  # raises if the processor is older than every compiled variant
    except (ImportError, RuntimeError) as error:
        return None, f"the native module was not built, or does not run here ({error})"
    return _C, None


native, _native_problem = _load_native()

# Every backend, and None if it works here, else why it does not.
_BACKENDS: dict[str, str | None] = {
    "cpu": _native_problem,
    "triton": "this version has no GPU kernels; tensors on a GPU use the torch backend",
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
    if backend is None:
        return "cpu" if tensor.device.type == "cpu" and _BACKENDS["cpu"] is None else "torch"
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected None or one of {', '.join(_BACKENDS)}")
    if _BACKENDS[backend] is not None:
        raise ValueError(f"backend={backend!r} is not available here: {_BACKENDS[backend]}")
    if backend == "cpu" and tensor.device.type != "cpu":
        raise ValueError(f"backend='cpu' takes CPU tensors, got one on {tensor.device}")
    return backend

"""Which implementations work on this machine, and which one a call uses."""

from __future__ import annotations

from torch import Tensor

try:
    from cmdp_fast import _C as native

    _native_problem = None
except ImportError as error:  # no compiler at installation time, or a wheel for another platform
    native = None  # type: ignore[assignment]
    _native_problem = f"the native module was not built or does not load here ({error})"


def available_backends() -> dict[str, str | None]:
    """Every backend by name; the value is None if it works here, else the reason why it does not.

    ``cpu``: the native kernels, for CPU tensors. ``triton``: GPU kernels. ``torch``: plain PyTorch
    (`cmdp_fast.reference`), for any device.
    """
    problem = _native_problem
    if native is not None:
        try:
            native.variant()
        except RuntimeError as error:
            problem = str(error)
    return {
        "cpu": problem,
        "triton": "this version has no GPU kernels; tensors on a GPU use the torch backend",
        "torch": None,
    }


def choose(backend: str | None, *tensors: Tensor | None) -> str:
    """The backend that serves these tensors: the one named, or the best that works here.

    Raises ValueError for an unknown name, a backend that does not work here, or tensors it cannot take.
    """
    on_cpu = all(t is None or t.device.type == "cpu" for t in tensors)
    if backend is None:
        return "cpu" if on_cpu and available_backends()["cpu"] is None else "torch"
    known = available_backends()
    if backend not in known:
        raise ValueError(f"backend={backend!r} is unknown; expected None or one of {', '.join(known)}")
    if known[backend] is not None:
        raise ValueError(f"backend={backend!r} is not available here: {known[backend]}")
    if backend == "cpu" and not on_cpu:
        device = next(t.device for t in tensors if t is not None and t.device.type != "cpu")
        raise ValueError(f"backend='cpu' takes CPU tensors, got one on {device}")
    return backend

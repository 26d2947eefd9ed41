"""The text of `cmdp-fast info`: versions, processor, kernel variant, threads, and which backends work here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence

import torch

from cmdp_fast import __version__
from cmdp_fast.cpu import CURE, native
from cmdp_fast.ops.backends import available_backends

_PACKAGES = ("cmdp_fast", "torch", "triton", "transformers", "datasets", "accelerate", "tyro", "reasoning-gym")
_ABSENT = "not installed"


def version(package: str) -> str:
    """The version of a package, or 'not installed'."""
    if package == "cmdp_fast":
        return __version__  # of the source that runs: a checkout may have no metadata, or old ones
    if package == "torch":
        return torch.__version__  # names the build, +cu130 for instance, which metadata may leave out
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _ABSENT


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """The version of each package that is installed."""
    return {name: found for name in packages if (found := version(name)) != _ABSENT}


def processor() -> str:
    """The processor's name and architecture."""
    name = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or 'unnamed processor'} ({platform.machine()})"


def machine() -> str:
    """Processor and versions in a line, to be quoted beside measurements."""
    named = ", ".join(f"{package} {version(package)}" for package in ("cmdp_fast", "torch", "transformers"))
    return f"{processor()}, {os.cpu_count()} processors, python {platform.python_version()}, {named}"


def report() -> str:
    """Versions, processor features, the kernel variant chosen, threads, and which backends work."""
    lines = [f"python         {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{package:<14} {version(package)}" for package in _PACKAGES]
    if native is None:
        lines.append(f"native module  absent{f'. To have it: {CURE}' if CURE else ''}")
    else:
        variants = ", ".join(name if runs else f"{name} (not on this processor)" for name, runs in native.variants())
        lines += [
            f"cpu features   {' '.join(native.cpu_features()) or 'none looked for on this architecture'}",
            f"kernel variant {native.variant()} of {variants}",
            f"openmp         {'yes' if native.OPENMP else 'no: single thread'}",
        ]
    lines.append(f"threads        {torch.get_num_threads()} (torch.get_num_threads) of {os.cpu_count()} processors")
    for name, problem in available_backends().items():
        lines.append(f"backend {name:<6} {'available' if problem is None else f'not available: {problem}'}")
    return "\n".join(lines)

"""The machine of a run: processor, caches, device, versions, threads and kernel variant."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import cmdp_fast as cf
from cmdp_fast.cpu import native

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "verl")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHE = 64 * 2**20  # bytes, where the system does not tell


def describe(device: str) -> dict[str, Any]:
    """The machine as a dictionary, for the header of a run."""
    described: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cmdp_fast": cf.__version__,
        "kernels": native.variant() if native is not None else "none: the torch backend serves",
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described["gpu"] = {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_cache": properties.L2_cache_size,
        }
    return described


def text(machine: dict[str, Any]) -> list[str]:
    """The machine as lines of text."""
    levels = ", ".join(f"{name} {size // 1024} KiB" for name, size in machine["caches"].items()) or "caches unknown"
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {levels}, {machine['system']}",
        f"cmdp_fast {machine['cmdp_fast']}, kernels {machine['kernels']}, {machine['threads']} threads, "
        f"Python {machine['python']}, " + ", ".join(f"{name} {v}" for name, v in machine["versions"].items()),
    ]
    if gpu := machine.get("gpu"):
        gpu_line = f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_cache'] // 2**20} MiB"
        lines.append(gpu_line + (f", {machine['driver']}" if machine.get("driver") else ""))
    return lines


def last_level_cache(device: str) -> int:
    """The bytes that a benchmark has to push out of the way to read from memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    return max(caches().values(), default=ASSUMED_CACHE)


@functools.cache
def caches() -> dict[str, int]:
    """The size in bytes of each data cache of the first core, by name (Linux)."""
    found = {}
    for index in sorted(CACHES.glob("index*")):
        try:
            kind, level = ((index / name).read_text().strip() for name in ("type", "level"))
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            found[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

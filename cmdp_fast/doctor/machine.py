"""The machine: threads, memory, disk, GPU, compilers, and the OpenMP libraries of this process."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from cmdp_fast import cpu
from cmdp_fast.native_module import COMPILER
from cmdp_fast.trainer.models.cache import cache_dir

from .row import NOTE, OK, PROBLEM, Row

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
GIB = 2**30
LITTLE = GIB  # of memory and of disk, in bytes
OLDEST_CAPABILITY = (8, 0)  # of the CUDA kernels


def threads() -> Iterator[Row]:
    """PyTorch's threads, with which the kernels compute too, against the processors that this process may use."""
    used, usable = torch.get_num_threads(), _usable_processors()
    given = os.environ.get("OMP_NUM_THREADS")
    says = f"{used} on {_counted(usable)} of {os.cpu_count()}" + (f", OMP_NUM_THREADS={given}" if given else "")
    if used > usable:
        yield Row(NOTE, "threads", f"{says}: more threads than processors wait for each other", _exported(usable))
    elif used < usable and given:
        yield Row(NOTE, "threads", f"{says}: the other processors are left out", "unset OMP_NUM_THREADS")
    else:
        yield Row(OK, "threads", says)


def openmp() -> Iterator[Row]:
    """The OpenMP libraries that are loaded: the pools of threads of two know nothing of each other."""
    try:
        maps = (PROC / "self" / "maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    loaded = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))
    if len(loaded) > 1:
        yield Row(NOTE, "openmp", f"{len(loaded)} libraries, each with threads of its own: {', '.join(loaded)}")
    else:
        yield Row(OK, "openmp", loaded[0] if loaded else "no library of it is loaded")


def memory() -> Iterator[Row]:
    """The memory that is free, and a container's limit."""
    try:
        text = (PROC / "meminfo").read_text(encoding="utf-8")
    except OSError:
        yield Row(OK, "memory", "this system does not tell")
        return
    amounts = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith(" kB")}
    free, says = amounts["MemAvailable"], ""
    for limit, used in _memory_limits():
        if limit - used < free:
            free, says = limit - used, f", by a container's limit of {_gib(limit)}"
    level = NOTE if free < LITTLE else OK
    yield Row(level, "memory", f"{_gib(free)} free of {_gib(amounts['MemTotal'])}{says}")


def disk() -> Iterator[Row]:
    """The room for what is made once and kept: the built-in models."""
    folder = cache_dir()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free, elsewhere = shutil.disk_usage(place).free, "export XDG_CACHE_HOME=FOLDER"
    if not os.access(place, os.W_OK):
        yield Row(PROBLEM, "disk", f"{place}, where models are kept, cannot be written to", elsewhere)
    elif free < LITTLE:
        yield Row(NOTE, "disk", f"{_gib(free)} free at {folder}", elsewhere)
    else:
        yield Row(OK, "disk", f"{_gib(free)} free at {folder}")


def gpu() -> Iterator[Row]:
    """The GPUs that torch finds, or why there is none."""
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    built = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        if driver and not built:
            says = f"torch {torch.__version__} is built without CUDA, and NVIDIA's driver {driver} is here"
            yield Row(NOTE, "gpu", says, "https://pytorch.org/get-started/locally has the build for it")
        elif driver:
            yield Row(PROBLEM, "gpu", f"torch finds none with driver {driver}; it is built for CUDA {built}")
        else:
            yield Row(OK, "gpu", f"none ({f'torch for {built}' if built else 'torch for CPUs'}, no NVIDIA driver)")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{about.major}.{about.minor}"
        says = f"{about.name}, compute capability {capability}, {_gib(free)} free of {_gib(total)}"
        says += f", driver {driver or 'unknown'}, torch for {built}"
        old = torch.version.hip is None and (about.major, about.minor) < OLDEST_CAPABILITY
        yield Row(NOTE if old else OK, f"gpu {index}", says + (": too old for the CUDA kernels" if old else ""))


def compilers() -> Iterator[Row]:
    """What a build of the kernels would use."""
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))), None)
    found = [f"{name} {_release_of(name) if shutil.which(name) else 'none'}" for name in ("cmake", "ninja", "nvcc")]
    says = ", ".join([f"{compiler} {_release_of(compiler)}" if compiler else "no C++ compiler", *found])
    if compiler is None and cpu.native is None:
        yield Row(NOTE, "compilers", says, f"install {COMPILER}")
    else:
        yield Row(OK, "compilers", says)


def _usable_processors() -> int:
    """The processors that this process may run on, or the time that its containers grant it, rounded up."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = [math.ceil(share) for share in _processor_limits()]
    return max(1, min([own, *granted]))


def _processor_limits() -> Iterator[float]:
    for folder in _groups("cpu"):
        words = _words(folder / "cpu.max")  # "max 100000", or microseconds of so many
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            yield int(words[0]) / int(words[1])
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and quota[0].isdigit() and period[0].isdigit():  # -1: no limit
            yield int(quota[0]) / int(period[0])


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each group that this process is in."""
    for folder in _groups("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, now = _words(folder / limit), _words(folder / used)
            if most and now and most[0].isdigit() and now[0].isdigit() and int(most[0]) < 1 << 60:
                yield int(most[0]), int(now[0])


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups of this process, of both versions, from its own up to the root."""
    try:
        own = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in own:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        here = root / path.lstrip("/")
        yield from (folder for folder in (here, *here.parents) if folder == root or root in folder.parents)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []


def _release_of(program: str) -> str:
    """The first number with points in what `--version` says."""
    found = re.search(r"\d+(\.\d+)+", _output(program, "--version"))
    return found[0] if found else "of an unknown version"


def _first_line(*command: str) -> str:
    return next(iter(_output(*command).splitlines()), "")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _exported(number: int) -> str:
    return f"export OMP_NUM_THREADS={number}"


def _counted(processors: int) -> str:
    return f"{processors} usable processor{'' if processors == 1 else 's'}"


def _gib(number: int) -> str:
    return f"{number / GIB:.1f} GiB"

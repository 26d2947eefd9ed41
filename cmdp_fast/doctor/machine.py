"""The machine: threads, memory, disk, GPU, compilers, and the OpenMP libraries of this process."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from cmdp_fast import containers, cpu
from cmdp_fast.errors import InputError, first_line
from cmdp_fast.masking import home
from cmdp_fast.native_module import COMPILER
from cmdp_fast.threads import usable_processors
from cmdp_fast.trainer.models.cache import cache_dir

from .row import NOTE, OK, PROBLEM, Row

GIB = 2**30
LITTLE = GIB  # of memory and of disk, in bytes
OLDEST_CAPABILITY = (8, 0)  # of the CUDA kernels
OLDEST_COMPILERS = {"GCC": 11, "Clang": 14}
_HIDES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_HUB = "export HF_HOME=FOLDER"


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
        maps = (containers.PROC / "self" / "maps").read_text(encoding="utf-8", errors="replace")
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
        text = (containers.PROC / "meminfo").read_text(encoding="utf-8")
    except OSError:
        yield Row(OK, "memory", "this system does not tell")
        return
    amounts = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith(" kB")}
    free, total, whose = amounts["MemAvailable"], amounts["MemTotal"], ""
    for limit, used in containers.memory_limits():
        if limit - used < free:
            free, total, whose = max(0, limit - used), limit, " that its container may use"
    yield Row(NOTE if free < LITTLE else OK, "memory", f"{_gib(free)} free of {_gib(total)}{whose}")


def disk() -> Iterator[Row]:
    """The room for what is made once and kept (the built-in models), for what the Hub gives, and for runs."""
    try:
        yield _room("disk", cache_dir(), "built-in models", "export XDG_CACHE_HOME=FOLDER")
    except InputError as error:
        yield Row(PROBLEM, "disk", str(error), "export XDG_CACHE_HOME=FOLDER")
    hub, variable = _hub_cache()
    if hub is None:
        yield Row(NOTE, "disk of the Hub", "there is no home folder, where huggingface_hub keeps models", _HUB)
    else:
        yield _room("disk of the Hub", hub, "models of the Hub", f"export {variable}=FOLDER")
    yield _room("disk of runs", Path.cwd(), "runs", "run from another folder, or with --output-dir FOLDER")


def _room(what: str, folder: Path, kept: str, elsewhere: str) -> Row:
    place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))  # a link may lead nowhere
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "cannot be written to" if place.is_dir() else "is no folder"
        return Row(PROBLEM if what == "disk" else NOTE, what, f"{place}, for {kept}, {why}", elsewhere)
    free = shutil.disk_usage(place).free
    says = f"{_gib(free)} free at {folder}, for {kept}"
    return Row(NOTE, what, says, elsewhere) if free < LITTLE else Row(OK, what, says)


def _hub_cache() -> tuple[Path | None, str]:
    """The folder of what huggingface_hub downloads, as it finds it, and the variable that moves it."""
    own = home()
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if given := os.environ.get(variable):
            return Path(os.path.expandvars(os.path.expanduser(given)), below).absolute(), variable
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(os.path.expandvars(os.path.expanduser(given)), "huggingface", "hub").absolute(), "HF_HOME"
    return (own / ".cache" / "huggingface" / "hub" if own else None), "HF_HOME"


def gpu() -> Iterator[Row]:
    """The GPUs that torch finds, or why there is none."""
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()  # one for each GPU
    driver, built = next(iter(drivers), ""), _built_for()
    if not torch.cuda.is_available():
        yield _no_gpu(driver, built, len(drivers))
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        if torch.version.hip is None:
            kind = f"compute capability {about.major}.{about.minor}, driver {driver or 'unknown'}"
        else:
            kind = f"{getattr(about, 'gcnArchName', 'AMD')}"
        says = f"{about.name}, {kind}, {_gib(free)} free of {_gib(total)}, torch built for {built}"
        old = torch.version.hip is None and (about.major, about.minor) < OLDEST_CAPABILITY
        yield Row(NOTE if old else OK, f"gpu {index}", says + (": too old for the CUDA kernels" if old else ""))


def _built_for() -> str:
    """What torch is built for, as in `CUDA 13.0`; empty where it is for CPUs alone."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else ""


def _no_gpu(driver: str, built: str, gpus: int) -> Row:
    if not built and driver:
        says = f"torch {torch.__version__} is built without CUDA, and NVIDIA's driver {driver} is here"
        return Row(NOTE, "gpu", says, "https://pytorch.org/get-started/locally has the build for it")
    amd = built.startswith("ROCm")
    names = [name for name in (_HIDES if amd else _HIDES[:1]) if name in os.environ]
    hiding = next((name for name in names if _hides(os.environ[name], None if amd else gpus)), None)
    if built and (driver or amd) and hiding:
        says = f"torch, built for {built}, finds none: {hiding}={os.environ[hiding]} hides them"
        return Row(NOTE, "gpu", says, f"unset {hiding}, unless that is meant")
    if driver:
        says = f"torch, built for {built}, finds none with NVIDIA's driver {driver}"
        cure = "update the driver, or install a torch for an older CUDA (https://pytorch.org/get-started/locally)"
        return Row(PROBLEM, "gpu", says, "install a torch for CUDA" if amd else cure)
    return Row(OK, "gpu", f"none ({f'torch built for {built}' if built else 'torch for CPUs'}, no NVIDIA driver)")


def _hides(chosen: str, gpus: int | None) -> bool:
    """Whether a list of GPUs names none: those behind the first that is not there do not count."""
    first = chosen.split(",")[0].strip()
    if re.fullmatch(r"[+-]?\d+", first):
        return int(first) < 0 or (gpus is not None and int(first) >= gpus)
    return not first.startswith(("GPU-", "MIG-"))


def compilers() -> Iterator[Row]:
    """What a build of the kernels would use; CMake and Ninja come with it."""
    given = os.environ.get("CXX", "")
    try:
        command = shlex.split(given) or _found("c++", "g++", "clang++")
    except ValueError as error:  # a quotation without an end
        yield Row(NOTE, "compilers", f"CXX={given} is no command: {first_line(error)}", f"install {COMPILER}")
        return
    nvcc = f"nvcc {_release(_output('nvcc', '--version'))}" if shutil.which("nvcc") else "no nvcc"
    if not command or not shutil.which(command[0]):
        says = f"CXX={given} is no program" if command else "no C++ compiler"
        level = OK if cpu.native is not None and not command else NOTE
        yield Row(level, "compilers", f"{says}, {nvcc}", "" if level == OK else f"install {COMPILER}")
        return
    said = _output(*command, "--version")
    name, release = shlex.join(command), _release(said)
    kind = "Clang" if "clang" in said.lower() else "GCC" if re.search(r"gcc|[gc]\+\+", said, re.IGNORECASE) else ""
    if not kind:
        says = f"{'CXX=' if given else ''}{name} does not say that it is GCC or Clang, {nvcc}"
        yield Row(NOTE, "compilers", says, f"install {COMPILER}, and name it in CXX")
        return
    too_old = release.partition(".")[0].isdigit() and int(release.partition(".")[0]) < OLDEST_COMPILERS[kind]
    if too_old and "apple" not in said.lower():
        says = f"{name} is {kind} {release}, older than {kind} {OLDEST_COMPILERS[kind]}, which a build needs"
        yield Row(NOTE, "compilers", f"{says}, {nvcc}", f"install {COMPILER}, and name it in CXX")
    else:
        yield Row(OK, "compilers", f"{name} {release}, {nvcc}")


def _found(*names: str) -> list[str]:
    return [name for name in names if shutil.which(name)][:1]


def _usable_processors() -> int:
    """The processors that this process may run on, or the time that its containers grant it, rounded up."""
    own = usable_processors()
    granted = [math.ceil(share) for share in containers.processor_limits()]
    return max(1, min([own, *granted]))


def _release(said: str) -> str:
    """The version in what a compiler says of itself: the first number with points outside of brackets, in
    which the distribution has its own."""
    for line in said.splitlines():
        plain = re.sub(r"\([^()]*\)", "", line)  # (Ubuntu 11.4.0-1ubuntu1~22.04)
        if found := re.search(r"\d+(\.\d+)+", plain) or re.search(r"\d+(\.\d+)+", line):
            return found[0]
    return "of an unknown version"


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

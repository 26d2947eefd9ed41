"""Compiles CUDA sources for the host, with tests/csrc/cuda_host in the place of CUDA."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests" / "csrc" / "cuda_host"
# No contraction of multiplications and additions: it would differ from one kernel to the next, and from nvcc's. No SLP,
# which in GCC 12 drops a rounding to float that csrc/gradient.h depends on.
FLAGS = (
    "-std=c++20",
    "-O2",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-tree-slp-vectorize",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
)


def problem() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not sys.platform.startswith("linux"):
        return "the host's stand-in for CUDA needs ELF's thread-local storage"
    if shutil.which("g++") is None:
        return "there is no g++"
    return None


def build(*sources: Path, name: str, flags: tuple[str, ...] = ()) -> Path:
    """A shared library of the sources, the one compiled earlier if nothing it is made from has changed since."""
    known = [p for folder in (HOST, ROOT / "csrc") for p in sorted(folder.rglob("*")) if p.is_file()]
    command = ["g++", *FLAGS, *flags, f"-I{HOST}", "-include", str(HOST / "cuda.h"), "-x", "c++", *map(str, sources)]
    digest = hashlib.sha256(repr((command, sys.version)).encode())
    for path in known:
        digest.update(path.read_bytes())
    folder = ROOT / ".pytest_cache" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    with open(folder / f"{name}.lock", "w") as lock:  # workers of pytest-xdist compile once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in folder.glob(f"{name}-*.so"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                fresh = Path(scratch) / "library.so"
                subprocess.run([*command, "-o", str(fresh)], check=True)
                fresh.rename(library)
    return library


def extension() -> Path:
    """The Python module cmdp_fast._cuda of kernels compiled for the host."""
    import pybind11

    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "cuda" / "bindings.cpp"]
    include = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-fvisibility=hidden")
    return build(*sources, name="_cuda", flags=include)

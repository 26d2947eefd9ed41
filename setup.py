"""Builds csrc/ into cmdp_fast._C and, where CMDP_FAST_CUDA says so, cmdp_fast._cuda with CMake and ninja; everything
else is in pyproject.toml.

The library works without the native module (the plain PyTorch backend serves), so a missing compiler is reported and
does not fail the installation. Set CMDP_FAST_REQUIRE_NATIVE=1 to make it fail instead. Likewise the CUDA kernels, which
are built where there are an nvcc and an NVIDIA GPU; CMDP_FAST_CUDA=1 builds them anywhere or fails, 0 leaves them out.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """One extension, built by CMake from csrc/."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("CMDP_FAST_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"cmdp_fast: the native kernels were not built ({error}). A C++20 compiler is needed. "
                "Installing without them: the PyTorch backend will be used, and it is slower.",
                file=sys.stderr,
            )
            self.extensions = []

    def _build(self, ext: Extension) -> None:
        wish = os.environ.get("CMDP_FAST_CUDA") or "auto"
        try:
            self._run_cmake(ext, f"-DCMDP_FAST_CUDA={wish}")
        except subprocess.CalledProcessError as error:
            if wish != "auto":
                raise
            print(f"cmdp_fast: a build with CUDA kernels failed ({error}); building without them", file=sys.stderr)
            self._run_cmake(
                ext, "-DCMDP_FAST_CUDA=0", "-DCMDP_FAST_CUDA_NOTE=not built: nvcc failed, see pip's log (-v)"
            )

    def _run_cmake(self, ext: Extension, *settings: str) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # settings of an earlier build
        configure = [
            "cmake",
            "-S",
            str(Path(__file__).resolve().parent / "csrc"),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *settings,
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


here = Path(__file__).parent
# As `depends` these travel in the sdist; how to compile the sources, CMake alone knows.
travels = ("csrc", "tests", "benchmarks")
files = [path for folder in travels for path in (here / folder).rglob("*") if path.is_file()] + [
    here / "constraints.txt"
]
depends = sorted(str(path.relative_to(here)) for path in files if "__pycache__" not in path.parts)
setup(
    ext_modules=[Extension("cmdp_fast._C", sources=[], depends=depends)],
    cmdclass={"build_ext": CMakeBuild},
)

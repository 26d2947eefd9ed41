"""Builds csrc/ into cmdp_fast._C with CMake and ninja; everything else is in pyproject.toml.

The library works without the native module (the plain PyTorch backend serves), so a missing compiler is reported and
does not fail the installation. Set CMDP_FAST_REQUIRE_NATIVE=1 to make it fail instead.
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
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
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

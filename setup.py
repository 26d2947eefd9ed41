"""Builds csrc/ into cmdp_fast._C and, where CMDP_FAST_CUDA says so, cmdp_fast._cuda with CMake and ninja; everything
else is in pyproject.toml.

The library works without the native module (the plain PyTorch backend serves), so a missing compiler does not fail the
installation. The reason is written beside the place of the module, since pip shows nothing that is printed here, and
`cmdp-fast info` and a warning tell it. Set CMDP_FAST_REQUIRE_NATIVE=1 to make it fail instead. Likewise the CUDA
kernels, which are built where there are an nvcc and an NVIDIA GPU; CMDP_FAST_CUDA=1 builds them anywhere or fails, 0
leaves them out. CMDP_FAST_NATIVE=0 makes the wheel for every system, which has no native module, and takes that of an
earlier build away from an editable installation.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

here = Path(__file__).resolve().parent
native_module = runpy.run_path(str(here / "cmdp_fast" / "native_module.py"))


left_out = os.environ.get("CMDP_FAST_NATIVE") == "0"
required = os.environ.get("CMDP_FAST_REQUIRE_NATIVE", "0") not in ("", "0")
if left_out and required:
    sys.exit("CMDP_FAST_NATIVE=0 leaves the native kernels out, CMDP_FAST_REQUIRE_NATIVE=1 requires them: set one")


def run(command: list[str]) -> None:
    """Runs a command whose output is shown as it comes, and raises CalledProcessError with it where it fails."""
    # `reason` reads English. Characters stay the user's own: CMake starts Python, which reads the paths in .pth files
    # and fails with LC_ALL=C where one is not ASCII. (C.UTF-8 would be a name that not every system knows.)
    environment = {**os.environ, "LC_MESSAGES": "C"}
    if everywhere := environment.pop("LC_ALL", ""):
        environment["LC_CTYPE"] = everywhere
    output = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(output))


def reason(error: Exception) -> str:
    """Why a build failed, in one line: the words of a compiler or CMake from its first error on."""
    output = getattr(error, "output", None) or str(error)
    if "No CMAKE_CXX_COMPILER could be found" in output:
        return "no C++ compiler was found"
    patterns = (r"^.*(\berror:|CMake Error)", r"(?i)^.*\berror\b")  # a path may have an error in it as well
    first = next(filter(None, (re.search(pattern, output, re.MULTILINE) for pattern in patterns)), None)
    words = " ".join(output[first.start() if first else 0 :].split())
    words = re.sub(r"^CMake Error at \S+ \(\w+\): ", "CMake: ", words)
    words = re.split(r" It fails with the following| Call Stack ", words)[0]
    return words if len(words) <= 300 else f"{words[:300]} ..."


class CleanBuild(build):
    """A build from nothing: the files of an earlier one, modules since deleted for instance, would be packed again."""

    def run(self) -> None:
        earlier = Path(self.build_lib) / "cmdp_fast"
        if earlier.exists():
            shutil.rmtree(earlier)
        super().run()
        if left_out:
            note = "this is the wheel for every system (CMDP_FAST_NATIVE=0)\n"
            (earlier / native_module["LEFT_OUT"]).write_text(note, encoding="utf-8")


class Wheel(bdist_wheel):
    """Of a build that failed, its name says so: of all that is printed here, pip shows the wheel's name alone.

    The build tag is the place for words. Of one Python and any system, it yields to every wheel with kernels.
    """

    FAILED = "0_without_native_kernels"

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        return (python, "none", "any") if self.build_number == self.FAILED else (python, abi, system)


class CMakeBuild(build_ext):
    """One extension, built by CMake from csrc/."""

    def build_extension(self, ext: Extension) -> None:
        self._remove(self._built())
        try:
            self._build(ext)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if required or os.environ.get("CMDP_FAST_CUDA", "auto") not in ("", "auto", "0"):
                raise
            print(
                f"cmdp_fast: the native kernels were not built ({reason(error)}). A C++20 compiler is needed. "
                "Installing without them: the PyTorch backend will be used, and it is slower.",
                file=sys.stderr,
            )
            self._remove(self._built())
            failure = self._built()[-1]
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(reason(error) + "\n", encoding="utf-8")
            self.extensions = []
            wheel = self.distribution.command_obj.get("bdist_wheel")
            if isinstance(wheel, Wheel) and not self.editable_mode:  # whose name has a build tag already
                wheel.build_number = Wheel.FAILED

    def copy_extensions_to_source(self) -> None:
        """The modules that this build made, none of an earlier one: an editable installation imports them there."""
        for built in self._built():
            target = self._source() / built.name
            if built.exists():
                partial = target.with_name(f"{target.name}.partial")
                shutil.copy2(built, partial)
                partial.replace(target)  # a process that has the old one loaded keeps it
            else:
                self._remove([target])

    def leave_out(self) -> None:
        """In the source tree: no module of an earlier build, and the reason."""
        *modules, failure = (self._source() / built.name for built in self._built())
        self._remove(modules)
        failure.write_text("it was left out (CMDP_FAST_NATIVE=0)\n", encoding="utf-8")

    def _source(self) -> Path:
        return Path(self.get_finalized_command("build_py").get_package_dir("cmdp_fast"))

    def _built(self) -> list[Path]:
        """The files that a build can make: both modules, and the reason of its failure."""
        modules = (self.get_ext_filename(f"cmdp_fast.{name}") for name in ("_C", "_cuda"))
        folder = Path(self.build_lib).resolve()
        return [folder / module for module in modules] + [folder / "cmdp_fast" / native_module["FAILURE"]]

    def _remove(self, paths: list[Path]) -> None:
        for path in paths:
            if path.exists():
                path.unlink()
                print(f"cmdp_fast: removed {path}, of an earlier build", file=sys.stderr)

    def _build(self, ext: Extension) -> None:
        wish = os.environ.get("CMDP_FAST_CUDA") or "auto"
        try:
            self._run_cmake(ext, f"-DCMDP_FAST_CUDA={wish}")
        except subprocess.CalledProcessError as error:
            if wish != "auto":
                raise
            print(f"cmdp_fast: a build with CUDA kernels failed ({reason(error)}); trying without", file=sys.stderr)
            self._run_cmake(
                ext, "-DCMDP_FAST_CUDA=0", "-DCMDP_FAST_CUDA_NOTE=not built: nvcc failed, see pip's log (-v)"
            )

    def _run_cmake(self, ext: Extension, *settings: str) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        if folder.exists():
            shutil.rmtree(folder)  # an earlier build's settings and compiler
        folder.mkdir(parents=True)
        configure = [
            "cmake",
            "-S",
            str(here / "csrc"),
            "-B",
            str(folder),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMDP_FAST_SANITIZE=" + os.environ.get("CMDP_FAST_SANITIZE", ""),
            f"-DCMDP_FAST_SOURCES={native_module['fingerprint'](here / 'csrc')}",
            *settings,
        ]
        run(configure)
        run(["cmake", "--build", str(folder)])


class Editable(editable_wheel):
    """Of the source tree as it is, where there is nothing to build."""

    def run(self) -> None:
        if left_out:
            self.get_finalized_command("build_ext").leave_out()
        super().run()


def long_description() -> str:
    """The README for an index, which has neither its pictures nor the files that it links to, of a repository whose
    address is not known here. Links within the page stay, and those to other places."""
    text = (here / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\([^)]*\)\n\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!#|https?:)[^)\s]+\)", r"\1", text)


# As `depends` these travel in the sdist; how to compile the sources, CMake alone knows.
travels = (".ci", ".github", "csrc", "tests", "benchmarks")
files = [path for folder in travels for path in (here / folder).rglob("*") if path.is_file()] + [
    here / "constraints.txt"
]
depends = sorted(str(path.relative_to(here)) for path in files if "__pycache__" not in path.parts)
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("cmdp_fast._C", sources=[], depends=depends)] if not left_out or "sdist" in sys.argv else [],
    cmdclass={"bdist_wheel": Wheel, "build": CleanBuild, "build_ext": CMakeBuild, "editable_wheel": Editable},
)

"""What setup.py leaves behind, whether or not there is a compiler, and what the package makes of it."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from checkouts import ROOT, SHOW, SILENT, USE, checkout, installed, python, setup

import cmdp_fast
from cmdp_fast import installation, native_module
from cmdp_fast.cpu import native

pytest.importorskip("setuptools")
FAILURE = native_module.FAILURE
MODULE = FAILURE.removesuffix(".missing")

# In place of csrc/: a module that compiles in seconds, through the same CMake and pybind11.
TINY_CMAKE = """
cmake_minimum_required(VERSION 3.20)
project(cmdp_fast LANGUAGES CXX)
set(PYBIND11_FINDPYTHON ON)
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
pybind11_add_module(_C MODULE bindings.cpp)
target_compile_definitions(_C PRIVATE CMDP_SOURCES="${CMDP_FAST_SOURCES}")
"""
# Without pybind11's headers, which take most of the seconds.
TINY_MODULE = """
#include <Python.h>
static PyObject* variant(PyObject*, PyObject*) { return PyUnicode_FromString("tiny"); }
static PyMethodDef methods[] = {{"variant", variant, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddStringConstant(module, "SOURCES", CMDP_SOURCES);
  PyModule_AddStringConstant(module, "CUDA_NOTE", "");
  return module;
}
"""
TINY_CUDA = {
    "token_stats.cu": "__global__ void nothing() {}\n",
    "backward.cu": "__global__ void nothing_either() {}\n",
    "bindings.cpp": """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&definition); }
""",
}


@pytest.fixture
def tree(tmp_path):
    return checkout(tmp_path / "checkout")


def test_without_a_compiler_the_reason_is_packed_in_place_of_an_earlier_module(tree, tmp_path):
    built = tmp_path / "lib" / "cmdp_fast"
    for earlier in (MODULE, MODULE.replace("_C", "_cuda"), "deleted.py"):
        built.mkdir(parents=True, exist_ok=True)
        (built / earlier).touch()
    done = setup(tree, "build", "--build-base", tmp_path / "base", "--build-lib", tmp_path / "lib")
    assert done.returncode == 0, done.stderr
    assert "cmdp_fast: the native kernels were not built" in done.stderr
    assert not list(tmp_path.rglob("*.so")) and not (built / "deleted.py").exists()
    assert (built / "info.py").exists()
    reason = (built / FAILURE).read_text()
    assert reason.startswith('CMake: The C++ compiler "/bin/false" is not able to compile') and reason.count("\n") == 1


def test_a_build_that_must_have_the_module_fails_without_a_compiler(tree, tmp_path):
    built = tmp_path / "lib" / "cmdp_fast"
    built.mkdir(parents=True)
    (built / MODULE).touch()
    done = setup(tree, "build_ext", "--build-temp", tmp_path, "--build-lib", built.parent, CMDP_FAST_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert not list(built.iterdir())


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")
def test_failures_and_successes_in_place(tree):
    """As an editable installation builds: what lies in the source tree is of the last build alone."""
    pytest.importorskip("pybind11")
    (tree / "csrc" / "CMakeLists.txt").write_text(TINY_CMAKE)
    (tree / "csrc" / "bindings.cpp").write_text(TINY_MODULE)
    package = tree / "cmdp_fast"
    compiler = os.environ.get("CXX") or "c++"

    assert setup(tree, "build_ext", "--inplace").returncode == 0
    assert (package / FAILURE).exists() and not (package / MODULE).exists()
    assert ': CMake: The C++ compiler "/bin/false" is not able to compile' in python(tree, SHOW).stdout

    done = setup(tree, "build_ext", "--inplace", CXX=compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (package / MODULE).exists() and not (package / FAILURE).exists(), done.stdout
    assert python(tree, SHOW).stdout == "None\n"

    (tree / "csrc" / "bindings.cpp").write_text(TINY_MODULE + "// changed\n")
    assert python(tree, SHOW).stdout == f"{native_module.OTHER_SOURCES}\n"

    (tree / "csrc" / "bindings.cpp").write_text("#error no such machine\n")
    (package / MODULE.replace("_C", "_cuda")).touch()
    done = setup(tree, "build_ext", "--inplace", CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert f"removed cmdp_fast/{MODULE}, of an earlier build" in done.stderr
    assert not list(package.glob("*.so")) and "error: #error no such machine" in (package / FAILURE).read_text()


def test_leaving_them_out_takes_them_away_from_an_editable_installation(tree, tmp_path):
    cuda = MODULE.replace("_C", "_cuda")
    for earlier in (MODULE, cuda):
        (tree / "cmdp_fast" / earlier).touch()
    (tree / "cmdp_fast" / "_C.of-another-python.so").touch()
    left_out = {"CMDP_FAST_NATIVE": "0", "CMDP_FAST_REQUIRE_NATIVE": ""}
    done = setup(tree, "editable_wheel", "--dist-dir", tmp_path / "dist", **left_out)
    assert done.returncode == 0 and len(list((tmp_path / "dist").glob("*.whl"))) == 1, done.stderr
    assert [path.name for path in tree.rglob("*.so")] == ["_C.of-another-python.so"]
    assert (tree / "cmdp_fast" / FAILURE).read_text() == "it was left out (CMDP_FAST_NATIVE=0)\n"


WHERE = """
import importlib.util, os, site, sys
from importlib.machinery import PathFinder
# Without the environment's own installation, whose folder would stand before one that a .pth file adds.
sys.path = [folder for folder in sys.path if not os.path.isfile(os.path.join(folder, "cmdp_fast", "__init__.py"))]
sys.path.insert(0, home)
site.addsitedir(home)  # .pth files count
package = importlib.util.find_spec("cmdp_fast").submodule_search_locations
print(*(PathFinder.find_spec(f"cmdp_fast.{name}", package).origin for name in ("_C", "_cuda")))
"""
WITH_CUDA = {  # how csrc/ comes to its second module: as it is, or without waiting for nvcc
    "nvcc": "include(cuda/build.cmake)\n",
    "c++": "if(CMDP_FAST_CUDA STREQUAL 1)\n  pybind11_add_module(_cuda MODULE cuda/bindings.cpp)\nendif()\n",
}


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")
@pytest.mark.parametrize(
    "compiler, way", [("c++", "build_ext"), ("c++", "editable"), ("c++", "pip"), ("nvcc", "build_ext")]
)
def test_every_way_of_installing_keeps_the_cuda_kernels(compiler, way, tree, tmp_path):
    for package in ("pip", "pybind11"):
        pytest.importorskip(package)
    if compiler == "nvcc" and shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    (tree / "csrc" / "CMakeLists.txt").write_text(TINY_CMAKE + WITH_CUDA[compiler])
    (tree / "csrc" / "bindings.cpp").write_text(TINY_MODULE)
    for name, source in TINY_CUDA.items():
        (tree / "csrc" / "cuda" / name).write_text(source)
    environment = {"CXX": os.environ.get("CXX") or "c++", "CMDP_FAST_CUDA": "1", "CUDAARCHS": "90-real"}
    home = tree
    if way == "build_ext":
        done = setup(tree, "build_ext", "--inplace", **environment)
    else:
        command = [sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-deps", "--no-build-isolation"]
        # Or pip would first take the package away from the environment that runs the tests.
        command += ["--ignore-installed", "--prefix", str(tmp_path / "site")]
        command += [*(["-e"] if way == "editable" else []), str(tree)]
        said = {"PIP_CONFIG_FILE": os.devnull, "PIP_QUIET": "0"}  # what was compiled is read from what pip says
        environment = {**os.environ, **SILENT, **environment, **said}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        # An editable installation is a folder on the search path, no hook in the imports: type checkers follow it.
        assert not list((tmp_path / "site").rglob("__editable__*.py"))
        (home,) = {noted.parent for noted in (tmp_path / "site").rglob("cmdp_fast-*.dist-info")} or {None}
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "uninstall" not in said.lower(), said
    assert compiler != "nvcc" or "CUDA kernels for 90-real" in said
    package = (home if way == "pip" else tree) / "cmdp_fast"
    imported = python(tmp_path, f"home = {str(home)!r}\n{WHERE}", PYTHONPATH="")
    assert imported.stdout.split() == [str(package / MODULE.replace("_C", name)) for name in ("_C", "_cuda")]


def test_no_compiler_at_all_is_said_plainly(tree, tmp_path):
    """CMake looks for compilers on PATH, where there is nothing but CMake and ninja."""
    for tool in ("cmake", "ninja"):
        path = shutil.which(tool)
        if path is None:
            pytest.skip(f"needs {tool}")
        script = tmp_path / "bin" / tool
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec "{path}" "$@"\n')
        script.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CMDP_FAST_REQUIRE_NATIVE")}
    environment["PATH"] = str(tmp_path / "bin")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tree / "cmdp_fast" / FAILURE).read_text() == "no C++ compiler was found\n", done.stdout


@pytest.mark.parametrize("theirs", [{"LC_ALL": "C.UTF-8"}, {"LC_ALL": ""}])
def test_a_build_speaks_english_and_reads_any_path(tree, tmp_path, theirs):
    """CMake starts Python, which reads .pth files with the paths of editable installations, in whatever letters."""
    script = tmp_path / "bin" / "cmake"
    script.parent.mkdir()
    encoding = "io.TextIOWrapper(io.BytesIO(), encoding='locale').encoding"  # which Python reads .pth files in
    program = f"import io, os; print('error:', {encoding}, os.getenv('LC_MESSAGES'), flush=True)"
    script.write_text(f'#!/bin/sh\n"{sys.executable}" -c "{program}"\nexit 1\n')
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    done = setup(tree, "build_ext", "--inplace", PATH=path, **theirs)
    assert done.returncode == 0, done.stderr
    assert (tree / "cmdp_fast" / FAILURE).read_text().lower() == "error: utf-8 c\n"


def test_the_first_call_on_a_cpu_warns_with_reason_and_cure(tree, tmp_path):
    (tree / "cmdp_fast" / FAILURE).write_text("no C++ compiler was found\n")
    installed(tree, tmp_path / "site", {"url": "file:///a.whl", "archive_info": {}})
    done = python(tmp_path, USE, PYTHONPATH=str(tmp_path / "site"))
    assert done.stderr.count("<string>:2: RuntimeWarning") == 1  # the line of the call
    assert "without its native kernels: the native module was not built: no C++ compiler was found" in done.stderr
    assert f"install {native_module.COMPILER}, then build and install the wheel again\n" in done.stderr


@pytest.mark.parametrize(
    "origin, cure",
    [
        ({"url": "file:///checkout", "dir_info": {}}, "/checkout"),
        ({"url": "file:///with%20space/a.tar.gz", "archive_info": {}}, "'/with space/a.tar.gz'"),
        ({"url": "https://x.test/a", "vcs_info": {"vcs": "git", "commit_id": "c0"}}, "git+https://x.test/a@c0"),
        ({}, "/path/to/checkout-or-sdist"),
        ({"url": "file:///a.whl", "archive_info": {}}, None),
    ],
)
def test_the_cure_is_for_the_origin(tree, tmp_path, origin, cure, monkeypatch):
    installed(tree, tmp_path / "site", origin)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "site" / "cmdp_fast")
    command = f"pip install --no-cache-dir --force-reinstall --no-deps {cure}"
    assert native_module._missing()[1].endswith(f", then {command if cure else 'build and install the wheel again'}")


def test_a_source_tree_that_hides_an_installation_is_named(tree, tmp_path):
    installed(tree, tmp_path / "site", {})
    (tmp_path / "site" / "cmdp_fast" / MODULE).touch()
    done = python(tree, USE, PYTHONPATH=str(tmp_path / "site"))
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"source tree {tree}, which hides the installation in {tmp_path / 'site'}" in done.stderr
    assert "PYTHONSAFEPATH=1" in done.stderr and f"pip install --no-deps -e {tree}" in done.stderr


def test_the_module_of_another_folder_is_not_borrowed(tree, tmp_path):
    """An editable installation of a checkout would lend it to a copy of the package that lies elsewhere."""
    installed(tree, tmp_path / "site", {})
    lent = "import types; lent = types.ModuleType('cmdp_fast._C'); lent.__file__ = '/elsewhere/_C.so'\n"
    lent += "lent.variant = lambda: 'lent'; lent.CUDA_NOTE = ''; sys.modules['cmdp_fast._C'] = lent\n"
    done = python(tmp_path, lent + SHOW, PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout.startswith("the native module was not built for Python")


def test_a_module_that_cannot_be_loaded_is_not_said_to_be_missing(tree):
    (tree / "cmdp_fast" / MODULE).write_bytes(b"no module")
    assert python(tree, SHOW).stdout.startswith("the native module cannot be loaded (")


def test_the_module_knows_its_sources():
    """CMake hands the hash of setup.py on; what it covers, the loader covers too."""
    if native is None or installation.source_tree() is None:
        pytest.skip("needs the native module, in a checkout")
    assert re.fullmatch("[0-9a-f]{64}", native.SOURCES)
    assert native_module.fingerprint(ROOT / "csrc") == native.SOURCES


def test_the_version_has_one_source(tree):
    """A build reads it where `import cmdp_fast` has it."""
    face = tree / "cmdp_fast" / "__init__.py"
    done = setup(tree, "--version")
    assert done.stdout.split()[-1] == cmdp_fast.__version__
    face.write_text(face.read_text().replace(f'"{cmdp_fast.__version__}"', '"8.7.6"'))
    assert setup(tree, "--version").stdout.split()[-1] == "8.7.6"


def test_kernels_that_were_asked_for_by_name_are_not_left_out(tree, tmp_path):
    """CMDP_FAST_CUDA=1 builds them or fails; it does not cost the others without a word."""
    done = setup(tree, "build_ext", "--build-lib", tmp_path / "b", "--build-temp", tmp_path / "t", CMDP_FAST_CUDA="1")
    assert done.returncode != 0


@pytest.mark.parametrize(
    "why, cure",
    [
        ("no C++ compiler was found", "install a C++20 compiler"),
        ("CMake: Could NOT find Python (missing: Development.Module)", "remove the reason (a build needs"),
    ],
)
def test_the_cure_is_for_the_reason(why, cure, tree, monkeypatch):
    (tree / "cmdp_fast" / FAILURE).write_text(why)
    (tree / "setup.py").unlink()  # not a checkout, whose own cures come first
    monkeypatch.setattr(installation, "PACKAGE", tree / "cmdp_fast")
    said, remedy = native_module._missing()
    assert why in said and cure in remedy


def test_what_an_editor_or_a_build_leaves_in_csrc_is_no_source(tree):
    before = native_module.fingerprint(tree / "csrc")
    (tree / "csrc" / ".#scale.h").symlink_to("somebody@machine.1:2")
    (tree / "csrc" / "build").mkdir()
    (tree / "csrc" / "build" / "CMakeCache.txt").write_text("x")
    assert native_module.fingerprint(tree / "csrc") == before


def test_a_warning_that_is_an_error_does_not_go_away(tree):
    twice = "import torch, cmdp_fast as cf, warnings\nwarnings.simplefilter('error')\nx = torch.randn(2, 3)\n"
    twice += (
        "for _ in range(2):\n    try:\n        cf.divergence(x, x)\n    except RuntimeWarning:\n        print('said')"
    )
    assert python(tree, twice).stdout.split() == ["said", "said"]


@pytest.mark.parametrize(
    "error, first",
    [
        ("libgomp.so.1: cannot open shared object file: No such file or directory", "install libgomp.so.1 (Debian, "),
        ("/x/_C.so: invalid ELF header", "pip install "),
    ],
)
def test_a_module_that_cannot_be_loaded_has_a_cure(monkeypatch, error, first):
    def fails(name, *given):
        if (given and given[2] == ("_C",)) or name == "cmdp_fast._C":
            raise ImportError(error)
        return real(name, *given)

    real = __import__
    monkeypatch.setattr("builtins.__import__", fails)
    module, problem, cure = native_module.load()
    assert module is None and problem == f"the native module cannot be loaded ({error})" and cure.startswith(first)

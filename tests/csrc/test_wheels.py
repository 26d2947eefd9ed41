"""What is in a wheel, what it is called, and which OpenMP the native module uses."""

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from checkouts import ROOT, USE, checkout, installed, python, setup
from packaging.requirements import InvalidRequirement, Requirement

from cmdp_fast import installation, native_module
from cmdp_fast.cpu import native

pytest.importorskip("setuptools", minversion="77.0.1")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return checkout(tmp_path_factory.mktemp("tree") / "checkout")


def wheel(tree, folder, **environment):
    done = setup(tree, "bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "bdist", **environment)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_for_every_system(tree, tmp_path):
    """It says at its first use, once, what it lacks; it has the guides, the types and the licence."""
    path = wheel(tree, tmp_path, CMDP_FAST_NATIVE="0", CMDP_FAST_REQUIRE_NATIVE="")
    assert re.fullmatch(r"cmdp_fast-[\d.]+-py3-none-any\.whl", path.name)
    with zipfile.ZipFile(path) as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "site")
    guides = {str(page.relative_to(ROOT)) for page in (ROOT / "cmdp_fast").rglob("*.md")}
    assert len(guides) > 5
    assert {*guides, "cmdp_fast/py.typed", "cmdp_fast/_C.pyi", f"cmdp_fast/{native_module.LEFT_OUT}"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    if (ROOT / ".git").exists() and shutil.which("git"):  # that there is nothing else, .ci/wheels sees
        listed = subprocess.run(["git", "ls-files", "-z", "cmdp_fast"], capture_output=True, text=True, cwd=ROOT)
        there = {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
        assert there and there <= set(names), there - set(names)
    done = python(tmp_path, USE, PYTHONPATH=str(tmp_path / "site"))
    assert done.stderr.count("RuntimeWarning") == 1
    assert "left out: this is the wheel for every system (CMDP_FAST_NATIVE=0). To have them: " in done.stderr
    assert "install a wheel for this system and Python; or else a C++20 compiler" in done.stderr
    assert f"--no-deps {installation.SOURCES}" in done.stderr


def test_the_wheel_of_a_failed_build_says_so_in_its_name(tree, tmp_path):
    """pip shows nothing else of a build that succeeds. The tags make it the last choice, of this Python alone."""
    path = wheel(tree, tmp_path)
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert path.name.endswith(f"-0_without_native_kernels-{python_tag}-none-any.whl")
    with zipfile.ZipFile(path) as packed:
        assert f"cmdp_fast/{native_module.FAILURE}" in packed.namelist()


def test_leaving_out_what_is_required_is_refused(tree):
    done = setup(tree, "--version", CMDP_FAST_NATIVE="0", CMDP_FAST_REQUIRE_NATIVE="1")
    assert done.returncode != 0 and "set one" in done.stderr


def test_an_index_gets_a_description_that_needs_no_repository(tree, tmp_path):
    assert setup(tree, "egg_info", "--egg-base", tmp_path).returncode == 0
    metadata = (tmp_path / "cmdp_fast.egg-info" / "PKG-INFO").read_text(encoding="utf-8")
    assert "Description-Content-Type: text/markdown" in metadata and "\n# cmdp_fast\n" in metadata
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures, links = r"!\[", r"\]\((?!#|https?:)"
    assert re.search(pictures, readme) and re.search(links, readme)
    assert not re.search(pictures, metadata) and not re.search(links, metadata)
    assert "[arXiv 2509.22921](https://arxiv.org/abs/2509.22921)" in metadata


@pytest.mark.parametrize(
    "origin, what",
    [
        ({"url": "file:///checkout", "dir_info": {}}, "/checkout[trl]"),
        ({"url": "file:///with%20space/a.tar.gz", "archive_info": {}}, "/with space/a.tar.gz[trl]"),
        ({"url": "file:///a.whl", "archive_info": {}}, "/a.whl[trl]"),
        (
            {"url": "https://x.test/a", "vcs_info": {"vcs": "git", "commit_id": "c0"}},
            "cmdp_fast[trl] @ git+https://x.test/a@c0",
        ),
        (
            {"url": "https://x.test/a", "vcs_info": {"vcs": "git", "commit_id": "c0"}, "subdirectory": "b/c"},
            "cmdp_fast[trl] @ git+https://x.test/a@c0#subdirectory=b/c",
        ),
        (
            {"url": "https://x.test/a.zip", "archive_info": {}, "subdirectory": "b"},
            "cmdp_fast[trl] @ https://x.test/a.zip#subdirectory=b",
        ),
        ({"url": "https://x.test/a.zip", "archive_info": {}}, "cmdp_fast[trl] @ https://x.test/a.zip"),
        ({}, "/path/to/checkout-or-sdist[trl]"),
        ({"url": "https://x.test/a", "vcs_info": {}}, "/path/to/checkout-or-sdist[trl]"),
        ({"url": 1}, "/path/to/checkout-or-sdist[trl]"),
        ({"dir_info": {"editable": True}}, "/path/to/checkout-or-sdist[trl]"),
        (["url"], "/path/to/checkout-or-sdist[trl]"),
        (None, "/path/to/checkout-or-sdist[trl]"),
        ("cut off", "/path/to/checkout-or-sdist[trl]"),
    ],
)
def test_an_extra_comes_from_where_the_package_came_from(tree, tmp_path, origin, what, monkeypatch):
    installed(tree, tmp_path / "site", origin)
    if origin == "cut off":
        (noted,) = (tmp_path / "site").glob("*/direct_url.json")
        noted.write_bytes(b'{"url": "\xff')
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "site" / "cmdp_fast")
    assert installation.extra("trl") == f"pip install '{what}'"


def test_no_command_names_what_an_index_could_serve():
    """Not even where the words for a place are copied as they stand: with a slash they are no name to pip."""
    with pytest.raises(InvalidRequirement):
        Requirement(installation.SOURCES)
    with pytest.raises(InvalidRequirement):
        Requirement(f"{installation.SOURCES}[trl]")
    texts = [path for ending in ("py", "md", "toml", "in") for path in (ROOT / "cmdp_fast").rglob(f"*.{ending}")]
    for path in texts:
        for command in re.findall(r"pip install ([^`&\n]*)", path.read_text(encoding="utf-8")):
            asks = [word for word in command.split() if re.match(r"['\"]?cmdp[_-]fast(?![\w./-])", word)]
            assert not asks or "--no-index" in command, f"{path}: pip install {command}"


def test_in_a_checkout_an_extra_comes_from_the_checkout(tree, monkeypatch):
    monkeypatch.setattr(installation, "PACKAGE", tree / "cmdp_fast")
    assert installation.extra("train,trl") == f"pip install -e '{tree}[train,trl]'"


def test_a_checkout_is_built_again_where_it_lies(tmp_path, monkeypatch):
    """With what it needs left as it is, and in quotes where a shell would part it."""
    checkout = tmp_path / "with space"
    for name in ("csrc/CMakeLists.txt", "setup.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    monkeypatch.setattr(installation, "PACKAGE", checkout / "cmdp_fast")
    assert installation.again() == f"pip install --no-deps -e '{checkout}'"


def noted(site, origin, package):
    """What pip notes of an installation whose package lies in a folder, as in its own or in that of an editable one."""
    (site / "cmdp_fast-0.1.0.dist-info").mkdir(parents=True)
    (site / "cmdp_fast-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: cmdp_fast\n")
    (site / "cmdp_fast-0.1.0.dist-info" / "direct_url.json").write_text(json.dumps(origin))
    (package / "cmdp_fast").mkdir(parents=True)
    (package / "cmdp_fast" / "__init__.py").touch()


def test_of_several_installations_it_is_the_one_that_runs(tmp_path, monkeypatch):
    """An editable one lies where its folder is, and not beside what pip notes."""
    sites = [tmp_path / name for name in ("plain", "edited", "hidden")]
    folders = [sites[0], tmp_path / "the checkout", sites[2]]
    origins = [{"url": f"file:///{name}", "dir_info": {}} for name in ("a", "b", "c")]
    origins[1] = {"url": folders[1].as_uri(), "dir_info": {"editable": True}}
    for site, origin, folder in zip(sites, origins, folders, strict=True):
        noted(site, origin, folder)
    monkeypatch.setattr(sys, "path", [*map(str, sites), *sys.path])
    assert [path for _, path in installation.installations()][:3] == folders
    for folder, place in zip(folders, ("/a", folders[1], "/c"), strict=True):
        monkeypatch.setattr(installation, "PACKAGE", folder / "cmdp_fast")
        assert installation.extra("trl") == f"pip install '{place}[trl]'"


def openmp_in_this_process():
    paths = (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return {Path(path).resolve() for path in paths if re.search(r"/libgomp[^/]*$", path)}


def brought_by(torch_folder):
    """The OpenMP that a wheel of torch has: its build puts it into the package, auditwheel beside it under a hash."""
    places = (torch_folder / "lib", torch_folder.parent / "torch.libs")
    return {path.resolve() for folder in places for path in folder.glob("libgomp*.so*")}


def test_where_torch_has_its_openmp(tmp_path):
    places = [tmp_path / "torch" / "lib" / "libgomp.so.1", tmp_path / "torch.libs" / "libgomp-947d5fa1.so.1.0.0"]
    for place in places:
        place.parent.mkdir(parents=True)
        place.touch()
    assert brought_by(tmp_path / "torch") == {*places}


@pytest.mark.skipif(native is None or not Path("/proc/self/maps").exists(), reason="needs the native module, on Linux")
def test_the_module_uses_the_openmp_of_torch():
    """Not a second one with threads of its own, which a wheel would have if auditwheel put a copy into it."""
    if not native.OPENMP:
        pytest.skip("the module was built without OpenMP")
    brought = brought_by(Path(torch.__file__).parent)
    loaded = openmp_in_this_process()
    assert loaded == brought if brought else len(loaded) == 1


def test_without_an_openmp_library_the_reason_is_said(monkeypatch):
    """As the loader says it, where neither torch nor the system has one: no error at the import of the package."""

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "cmdp_fast._C":
                raise ImportError("libgomp.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.delitem(sys.modules, "cmdp_fast._C", raising=False)
    monkeypatch.delattr("cmdp_fast._C", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    module, problem, cure = native_module.load()
    assert module is None and "libgomp.so.1: cannot open shared object file" in problem
    assert cure.startswith("install libgomp.so.1 (Debian, Ubuntu: libgomp1; Fedora, conda: libgomp), or pip install")


def script(name):
    """A script of .ci, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_release_is_complete_and_of_its_tag(tmp_path):
    check = script("release_check")
    metadata = b"Metadata-Version: 2.4\nName: cmdp_fast\nVersion: 1.2.3\n\nVersion: 9\n"
    with tarfile.open(tmp_path / "cmdp_fast-1.2.3.tar.gz", "w:gz") as packed:
        inside = tarfile.TarInfo("cmdp_fast-1.2.3/PKG-INFO")
        inside.size = len(metadata)
        packed.addfile(inside, io.BytesIO(metadata))
    (tmp_path / "cmdp_fast-1.2.3-py3-none-any.whl").touch()
    systems = ("manylinux_2_28_x86_64", "manylinux_2_27_aarch64.manylinux_2_28_aarch64")
    for python_tag in ("cp310", "cp311", "cp312", "cp313", "cp314"):
        for system in systems:
            (tmp_path / f"cmdp_fast-1.2.3-{python_tag}-{python_tag}-{system}.whl").touch()
    assert check.problems(tmp_path) == check.problems(tmp_path, "v1.2.3") == check.problems(tmp_path, "1.2.3") == []
    assert check.problems(tmp_path, "v1.2.4") == ["the tag is 'v1.2.4', the version '1.2.3'"]
    wheel = tmp_path / f"cmdp_fast-1.2.3-cp312-cp312-{systems[1]}.whl"
    other = wheel.rename(tmp_path / "cmdp_fast-1.2.2-cp312-cp312-manylinux_2_28_aarch64.whl")
    assert check.problems(tmp_path) == [
        "expected one wheel of cp312 for manylinux_2_28_aarch64, found []",
        f"not expected: {other.name}",
    ]
    other.rename(wheel)
    (tmp_path / "cmdp_fast-1.2.3-py3-none-any.whl").unlink()
    (tmp_path / "cmdp_fast-1.2.3.tar").touch()
    assert check.problems(tmp_path) == [
        "missing: cmdp_fast-1.2.3-py3-none-any.whl",
        "not expected: cmdp_fast-1.2.3.tar",
    ]


# What cibuildwheel 4.3.5 installs into the environment of a build to try the wheel, virtualenv, and all that it needs.
CIBUILDWHEELS = {"virtualenv", "distlib", "filelock", "packaging", "platformdirs", "python-discovery", "pip"}


def pins_of(path):
    return dict(re.findall(r"^([\w-]+)==(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE))


def test_what_is_published_is_built_by_pinned_tools():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins, tools = (pins_of(ROOT / ".ci" / name) for name in ("build_system.txt", "build.txt"))
    asked = re.search(r"^requires = \[(.*)\]$", project, re.MULTILINE)
    requirements = [Requirement(text) for text in re.findall(r'"([^"]+)"', asked[1])]
    for requirement in requirements:
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    built = re.search(r"^environment = .*$", project, re.MULTILINE)[0]
    assert built.count('CONSTRAINT = "/project/.ci/build_system.txt"') == 2 and "INDEX" not in built
    # In that environment cibuildwheel installs virtualenv with pins of its own, and pip refuses two of one package.
    assert pins.keys() == {requirement.name for requirement in requirements}
    assert not pins.keys() & CIBUILDWHEELS and not pins.keys() & tools.keys()
    # The tools outside are pinned beside them, by a line that does not install what it names, as `-r` would.
    said = (ROOT / ".ci" / "build.txt").read_text(encoding="utf-8").splitlines()
    assert "-c build_system.txt" in said and tools.keys() > {"build", "cibuildwheel"}
    assert set(re.findall(r'"(cp\d+)-manylinux_\*"', project)) == set(script("release_check").PYTHONS)


def test_every_pull_request_builds_the_sdist():
    """Any file may be missing from one, of the tests for instance. A release publishes what the same job has made."""
    yaml = pytest.importorskip("yaml")
    workflows = ROOT / ".github" / "workflows"
    sdist, wheels = (yaml.safe_load((workflows / f"{name}.yml").read_text("utf-8")) for name in ("sdist", "wheels"))
    started = sdist[True]  # `on` is a word for it in YAML 1.1
    assert started == {"pull_request": None, "workflow_call": None}
    assert any(".ci/wheels --out" in step.get("run", "") for step in sdist["jobs"]["any"]["steps"])
    assert wheels["jobs"]["any"]["uses"] == "./.github/workflows/sdist.yml"
    assert "any" in wheels["jobs"]["complete"]["needs"]

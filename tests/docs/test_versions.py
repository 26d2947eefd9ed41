"""The page of versions says what pyproject.toml allows, what constraints.txt pins, and what the scripts of .ci run."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from cmdp_fast.ops.backends import OLDEST_TORCH, OLDEST_TRITON

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "cmdp_fast" / "guide" / "versions.md").read_text(encoding="utf-8")
HEADER = "| package | oldest | pinned | newest | run by | between them |"
NO_BOUND = {"openrlhf"}  # no requirement of ours


def rows() -> dict[str, dict[str, str]]:
    table = PAGE.partition(HEADER)[2].partition("\n\n")[0].splitlines()[2:]
    columns = [name.strip() for name in HEADER.strip("|").split("|")]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return {row[0].lower(): dict(zip(columns, row, strict=True)) for row in cells}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    listed = [*project["dependencies"], *(text for extra in extras for text in extra)]
    return [Requirement(f"python{project['requires-python']}"), *map(Requirement, listed)]


def script(name: str) -> str:
    return (ROOT / ".ci" / name).read_text(encoding="utf-8")


ROWS = rows()


@pytest.mark.parametrize("package", ROWS)
def test_oldest_and_pinned(package):
    row = ROWS[package]
    bounds = {str(r.specifier) for r in requirements() if r.name == package and r.specifier}
    lowest = {
        part.version for r in requirements() if r.name == package for part in r.specifier if part.operator == ">="
    }
    if package in NO_BOUND:
        assert not bounds and not row["oldest"]
    else:
        assert lowest == {row["oldest"]}, bounds
    pins = re.findall(rf"^{package}==([^;\s]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert package == "python" or row["pinned"] == "".join(pins)
    ordered = [Version(row[name]) for name in ("oldest", "pinned", "newest") if row[name]]
    assert ordered == sorted(ordered)


def test_the_oldest_are_those_of_the_code():
    assert ROWS["torch"]["oldest"] == ".".join(map(str, OLDEST_TORCH))
    assert ROWS["triton"]["oldest"] == ".".join(map(str, OLDEST_TRITON))


def test_the_newest_are_those_of_the_scripts():
    assert f"newest={ROWS['triton']['newest']} interpreted=3.6.0" in script("tritons")
    assert f"verl=={ROWS['verl']['newest']}" in script("run") and f"openrlhf=={ROWS['openrlhf']['newest']}" in script(
        "run"
    )
    assert f"version={ROWS['vllm']['newest']}" in script("vllm")
    for package in ("torch", "transformers"):
        assert f" {package}=={ROWS[package]['newest']}" in script("oldest")


def test_the_torch_of_the_gpu_has_a_row():
    page = (ROOT / "benchmarks" / "results" / "gpu-h200" / "README.md").read_text(encoding="utf-8")
    ran = set(re.findall(r"torch (\d\S*), triton (\d\S*),", page))
    table = PAGE.partition("## What is run with each torch")[2].partition("\n\n## ")[0]
    assert ran and all(f"| {torch} | Triton {triton}, " in table for torch, triton in ran)
    assert all(torch in ROWS["torch"]["between them"] for torch, _ in ran)


def test_every_python_of_the_package_is_between_the_two():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pythons = [Version(v) for v in re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)]
    assert (min(pythons), max(pythons)) == (Version(ROWS["python"]["oldest"]), Version(ROWS["python"]["newest"]))
    install = (ROOT / "cmdp_fast" / "guide" / "install.md").read_text(encoding="utf-8")
    assert f"Python {min(pythons)} to {max(pythons)} on Linux." in install
    built = re.search(r"^build = \[(.*)\]$", text, re.MULTILINE)
    assert built and re.findall(r"cp(3)(\d+)-", built[1]) == [(str(v.major), str(v.minor)) for v in sorted(pythons)]

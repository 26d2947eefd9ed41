"""What is installed: this package, the versions of what it needs, other copies of it, its variables."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cmdp_fast
from cmdp_fast import installation
from cmdp_fast.children import command
from cmdp_fast.errors import first_line, readable
from cmdp_fast.info import version
from cmdp_fast.nearest import did_you_mean
from cmdp_fast.ops.tile_size import given_bytes

from .row import NOTE, OK, PROBLEM, Row

PREFIX = "CMDP_FAST_"
VARIABLES = (  # that this package reads
    *("CMDP_FAST_AUTOTUNE", "CMDP_FAST_PATIENCE", "CMDP_FAST_TEACHER_RANK", "CMDP_FAST_TILE_BYTES"),
    "CMDP_FAST_TRACEBACK",
    *("CMDP_FAST_CUDA", "CMDP_FAST_NATIVE", "CMDP_FAST_REQUIRE_NATIVE", "CMDP_FAST_SANITIZE"),  # setup.py
    *("CMDP_FAST_CUDA_HOST", "CMDP_FAST_VLLM_PYTHON"),  # its tests
)
NEEDED = "train"  # the extra of the commands that train
# What the commands that train import, beside the packages of their extra: transformers has these only once asked
IMPORTED = (
    *("transformers:AutoTokenizer", "transformers:AutoModelForCausalLM", "torch.utils.tensorboard"),
    *("cmdp_fast.trainer.run", "cmdp_fast.trainer.evaluate_student"),
)
PATIENCE = 120.0  # seconds for all of it: with a cold disk a minute
DEVELOPMENT = ("test", "docs")  # extras that nothing at run time needs


def package() -> Iterator[Row]:
    """Which package runs, on which Python."""
    yield Row(OK, "cmdp_fast", f"{cmdp_fast.__version__} in {installation.PACKAGE}")
    yield Row(OK, "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}")
    noted = _noted_version()
    if noted not in (None, cmdp_fast.__version__):
        yield Row(NOTE, "cmdp_fast", f"pip has left the metadata of {noted}, with whose bounds versions are compared")


def versions() -> Iterator[Row]:
    """The versions of other packages, against the bounds in this package's own metadata."""
    try:
        required = importlib.metadata.requires("cmdp_fast") or []
    except importlib.metadata.PackageNotFoundError:
        yield Row(NOTE, "versions", "not compared: cmdp_fast runs from a folder that pip has not installed")
        return
    try:
        from packaging.requirements import Requirement
    except ImportError:
        # Their markers cannot be evaluated; most of them ask for the extra alone
        names = [n[1] for text in required if (n := re.fullmatch(rf"([\w.-]+)[^;]*;\s*extra\s*==\s*.{NEEDED}.", text))]
        yield _of_extra(len(names), [name for name in names if _installed(name) is None])
        yield Row(NOTE, "versions", "not compared: there is no packaging", "pip install packaging")
        return
    parsed = [Requirement(text) for text in required]
    extras = importlib.metadata.metadata("cmdp_fast").get_all("Provides-Extra") or []
    wrong: dict[str, Row] = {}
    for extra in ("", NEEDED, *(name for name in extras if name not in (NEEDED, *DEVELOPMENT))):
        needs = [r for r in parsed if _of(r, extra) and r.name.replace("-", "_") != "cmdp_fast"]
        missing = [r.name for r in needs if _installed(r.name) is None]
        for requirement in needs:
            found = _installed(requirement.name)
            if found is not None and not requirement.specifier.contains(found, prereleases=True):
                asks = f"{found}, and cmdp_fast{f'[{extra}]' if extra else ''} needs {requirement.specifier}"
                level = PROBLEM if extra in ("", NEEDED) else NOTE
                cure = f"pip install '{requirement.name}{requirement.specifier}'"
                wrong.setdefault(requirement.name, Row(level, f"version of {requirement.name}", asks, cure))
        if extra == "":
            wrong |= {name: Row(PROBLEM, f"version of {name}", "not installed") for name in missing}
        if extra == NEEDED:
            yield _of_extra(len(needs), missing)
    yield from wrong.values()
    named = ("torch", "triton", "transformers", "trl", "vllm", "verl", "peft")
    found_versions = [f"{name} {version(name)}" for name in named if version(name) != "not installed"]
    found_versions.append(f"{len(wrong)} out of bounds" if wrong else "all within bounds")
    yield Row(OK, "versions", ", ".join(found_versions))


def _of_extra(needed: int, missing: list[str]) -> Row:
    what, cure = f"extra {NEEDED}", installation.extra(NEEDED)
    if not missing:
        return Row(OK, what, f"all {needed} packages are installed")
    if len(missing) > needed // 2:
        return Row(NOTE, what, "not installed: the operations work, and the commands that train do not", cure)
    return Row(PROBLEM, what, f"{', '.join(missing)} not installed", cure)


def imports() -> Iterator[Row]:
    """Whether the packages of the extra can be imported, in a process of its own."""
    needed = [name for name in names_of_extra() if _installed(name) is not None]
    if _installed("transformers") is None:  # it is not installed, as is said above
        return
    modules = [name.replace("-", "_") for name in needed]
    try:
        done = subprocess.run(
            command("cmdp_fast.doctor.importing", *modules, *IMPORTED),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
        failed = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        yield Row(NOTE, "imports", f"importing {', '.join(modules)} has not ended after {PATIENCE:.0f} seconds")
        return
    if failed is None:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no output")
        yield Row(PROBLEM, "imports", f"importing {', '.join(modules)} ended the process: {readable(last.strip())}")
    elif not failed:
        yield Row(OK, "imports", f"the packages of the extra {NEEDED} can be imported")
    else:
        for name, why in failed.items():
            yield Row(PROBLEM, f"import of {name}", why, "install it, or what it has not found, again")


def names_of_extra(extra: str = NEEDED) -> list[str]:
    """The packages that an extra asks for on this machine, as far as our own metadata tell."""
    try:
        required = importlib.metadata.requires("cmdp_fast") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    pattern = rf"([\w.-]+)[^;]*;.*\bextra\s*==\s*.{extra}\b"
    return [found[1] for text in required if (found := re.match(pattern, text))]


def others() -> Iterator[Row]:
    """Other copies of this package that the same Python would find, or that it hides."""
    here = installation.PACKAGE.parent
    places = [Path(entry or os.curdir).resolve() for entry in sys.path]
    found = [place for place in dict.fromkeys(places) if (place / "cmdp_fast" / "__init__.py").is_file()]
    installed = [path for _, path in installation.installations()]
    rest = [path for path in dict.fromkeys([*found, *installed]) if path != here]
    if rest:
        why, cure = _first_because(here)
        yield Row(NOTE, "copies", f"the one in {here} runs and hides {', '.join(map(str, rest))}: {why}", cure)
    else:
        yield Row(OK, "copies", "one cmdp_fast on the path")


def _first_because(here: Path) -> tuple[str, str]:
    """Why Python finds this copy before others, and what lets it find another one."""
    named = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if here in named:
        return "PYTHONPATH names it", "take that folder out of PYTHONPATH, unless this copy is meant"
    if sys.path and Path(sys.path[0] or os.curdir).resolve() == here:
        option = " or with python -P" if sys.version_info >= (3, 11) else ""
        return (
            "it is in the working directory, or beside the script",
            f"run from another folder{option}, unless this copy is meant",
        )
    return "both are installed", "pip uninstall cmdp_fast, until nothing is left, and install the one that is meant"


def variables() -> Iterator[Row]:
    """Variables of the environment that are this package's, or look so."""
    for name in sorted(name for name in os.environ if name.upper().startswith(PREFIX[:-1])):
        if name in VARIABLES:
            value = os.environ[name]
            wrong = _wrong(name, value)
            yield (
                Row(PROBLEM, "variable", wrong, f"unset {name}")
                if wrong
                else Row(NOTE, "variable", f"{name}={value} is set")
            )
        else:  # what all of them begin with makes none of them alike
            own = name[len(PREFIX) :]
            known = [each.removeprefix(PREFIX) for each in VARIABLES]
            yield Row(PROBLEM, "variable", f"{name} is set, and nothing reads it{did_you_mean(own, known, PREFIX)}")


def _wrong(name: str, value: str) -> str:
    """What whoever reads a variable says against its value; empty if nothing."""
    try:
        if name in _READERS:
            _READERS[name]()
    except ImportError:
        return ""  # without the extra nobody reads it
    except ValueError as error:
        return first_line(error) if name in str(error) else f"{name}={value}: {first_line(error)}"
    return f"{name}={value} does nothing: 1 switches it on" if name in _SWITCHES and value not in ("", "0", "1") else ""


def _patience() -> object:
    from cmdp_fast.trainer.launch import patience

    return patience()


def _teacher_rank() -> object:
    from cmdp_fast.trainer.teacher_ranks import rank

    return rank()


_READERS: dict[str, Callable[[], object]] = {
    "CMDP_FAST_TILE_BYTES": given_bytes,
    "CMDP_FAST_PATIENCE": _patience,
    "CMDP_FAST_TEACHER_RANK": _teacher_rank,
}
_SWITCHES = ("CMDP_FAST_AUTOTUNE", "CMDP_FAST_TRACEBACK")


def _of(requirement: Any, extra: str) -> bool:
    """Whether a requirement is one of an extra, or (with "") of the package itself, on this machine."""
    marker = requirement.marker
    if marker is None:
        return extra == ""
    named = re.search(r"\bextra\b", str(marker)) is not None
    return bool(marker.evaluate({"extra": extra})) and named == (extra != "")


def _installed(name: str) -> str | None:
    found = version(name)
    return None if found == "not installed" else found


def _noted_version() -> str | None:
    try:
        return importlib.metadata.version("cmdp_fast")
    except importlib.metadata.PackageNotFoundError:
        return None

"""Finds the native module `cmdp_fast._C`; where there is none that can be used, says why and what to do about it.

setup.py runs this file too, to leave word of a failed build where `load` looks for it: no import of ours at the top.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shlex
import sys
import sysconfig
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
# Beside the module that it stands for, and like it of one Python: why the build of it failed, in one line.
FAILURE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}.missing"
COMPILER = "a C++20 compiler (GCC 11, Clang 14 or newer)"
OTHER_SOURCES = "the native module was built from other sources than those that are in csrc/ now"


def fingerprint(csrc: Path) -> str:
    """A hash of what the native modules are made from: names and contents of the files under csrc/."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        inside = path.relative_to(csrc).parts
        if any(part.startswith(".") or part == "build" for part in inside):  # an editor's, or a build
            continue
        if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".cmake", ".txt") and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def load() -> tuple[Any, str | None, str | None]:
    """The native module, None and None; or None, the reason why it cannot be used, and a cure if there is one."""
    try:
        import cmdp_fast._C as module
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cmdp_fast._C":
            return None, *_missing()
        missing = re.search(r"lib[\w.+-]+\.so[\w.]*(?=: cannot open)", str(error))
        first = f"install {missing[0]} (of the system's packages), or " if missing else ""
        return None, f"the native module cannot be loaded ({error})", first + _reinstall(from_source=True)
    sources = _source_tree()
    # Python takes a submodule that is missing here from an editable installation of another folder, if there is one.
    if not sources and Path(module.__file__).resolve().parent != PACKAGE:
        return None, *_missing()
    if sources and getattr(module, "SOURCES", None) != fingerprint(sources / "csrc"):
        return None, OTHER_SOURCES, _reinstall()
    try:
        module.variant()  # raises if the processor is older than every compiled variant
    except RuntimeError as error:
        return None, f"the native module does not run here ({error})", None
    return module, None, None


def _missing() -> tuple[str, str]:
    """Why there is no native module, and what to do."""
    failure = PACKAGE / FAILURE
    why = f": {failure.read_text(encoding='utf-8').strip()}" if failure.is_file() else ""
    tree = _source_tree()
    hidden = next((path for _, path in installations() if path != tree), None)
    if tree and hidden:
        return (
            f"the native module was not built in the source tree {tree}, which hides the installation in {hidden}{why}",
            f"run from another folder, or with PYTHONSAFEPATH=1 (python -P) from Python 3.11 on, or build it here: "
            f"{_reinstall()}",
        )
    if not why and is_pure():
        return (
            "this is the pure-Python wheel, which has none",
            f"install {COMPILER}, then {_reinstall(from_source=True)}",
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"the native module was not built{why or f' for Python {version}'}",
        f"{_remedy(why)}, then {_reinstall()}",
    )


def _remedy(why: str) -> str:
    """What has to be done before a build can succeed, as far as the reason tells."""
    if not why or "C++ compiler" in why:
        return f"install {COMPILER}"
    return f"remove the reason (a build needs {COMPILER}, the headers of Python, and memory)"


def _source_tree() -> Path | None:
    """The folder of csrc/ that this package lies in, if it is imported from one."""
    parent = PACKAGE.parent
    return parent if all((parent / name).is_file() for name in ("csrc/CMakeLists.txt", "setup.py")) else None


def installations() -> list[tuple[dict[str, Any], Path]]:
    """Where the package is installed on the search path: what pip noted of its origin (PEP 610), and the folder."""
    installations = []
    for distribution in importlib.metadata.distributions(name="cmdp_fast"):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        folder = Path(str(distribution.locate_file("")))
        if origin.get("dir_info", {}).get("editable"):
            folder = _path_of(origin["url"])
        if (folder / "cmdp_fast" / "__init__.py").is_file():
            installations.append((origin, folder.resolve()))
    return installations


def is_pure() -> bool:
    """Whether this is an installation of a wheel that holds no native module by choice, and not for want of a compiler:
    a wheel for every machine."""
    if _source_tree():
        return False
    for distribution in importlib.metadata.distributions(name="cmdp_fast"):
        if Path(str(distribution.locate_file(""))).resolve() == PACKAGE.parent:
            return "Root-Is-Purelib: true" in (distribution.read_text("WHEEL") or "")
    return False


def _path_of(url: str) -> Path:
    return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))


def _reinstall(from_source: bool = False) -> str:
    """The command that builds this installation again: a wheel that pip has cached may be one without kernels.
    ``from_source``: and so would be, or would not load, the one of the package index."""
    tree = _source_tree()
    if tree:
        return f"pip install --no-deps -e {shlex.quote(str(tree))}"
    origin = next((origin for origin, path in installations() if path == PACKAGE.parent), {})
    url = origin.get("url", "cmdp_fast")
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    elif url.endswith(".whl"):  # the same wheel would bring no kernels again
        return "build and install the wheel again"
    elif url.startswith("file:"):
        url = str(_path_of(url))
    source = "--no-binary cmdp_fast " if from_source and url == "cmdp_fast" else ""
    return f"pip install --no-cache-dir --force-reinstall --no-deps {source}{shlex.quote(url)}"

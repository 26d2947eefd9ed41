"""Finds the native module `cmdp_fast._C`; where there is none that can be used, says why and what to do about it.

setup.py runs this file too, to leave word of a failed build where `load` looks for it: no import of ours at the top.
"""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

# Beside the module that it stands for, and like it of one Python: why the build of it failed, in one line.
FAILURE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}.missing"
# In its place in the wheel for every system, which setup.py makes with CMDP_FAST_NATIVE=0.
LEFT_OUT = "_C.missing"
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
    from cmdp_fast import installation

    try:
        import cmdp_fast._C as module  # after torch, whose OpenMP it then shares: setup.py's wheels bring none
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cmdp_fast._C":
            return None, *_missing()
        return None, f"the native module cannot be loaded ({error})", _repair(str(error))
    sources = installation.source_tree()
    # Python takes a submodule that is missing here from an editable installation of another folder, if there is one.
    if not sources and Path(module.__file__).resolve().parent != installation.PACKAGE:
        return None, *_missing()
    if sources and getattr(module, "SOURCES", None) != fingerprint(sources / "csrc"):
        return None, OTHER_SOURCES, installation.again()
    try:
        module.variant()  # raises if the processor is older than every compiled variant
    except RuntimeError as error:
        return None, f"the native module does not run here ({error})", None
    return module, None, None


def is_pure() -> bool:
    """Whether this is the wheel for every system, which has no native module by choice, and lacked no compiler."""
    from cmdp_fast import installation

    return (installation.PACKAGE / LEFT_OUT).is_file()


def _repair(error: str) -> str:
    """What to do where the module cannot be loaded. Its OpenMP is torch's, or the system's where torch brings none."""
    from cmdp_fast import installation

    missing = re.search(r"lib[\w.+-]+\.so[\w.]*(?=: cannot open)", error)
    if not missing:
        return installation.again()
    package = " (Debian, Ubuntu: libgomp1; Fedora, conda: libgomp)" if missing[0].startswith("libgomp") else ""
    return f"install {missing[0]}{package}, or {installation.again()}"


def _missing() -> tuple[str, str]:
    """Why there is no native module, and what to do."""
    from cmdp_fast import installation

    note = installation.PACKAGE / (LEFT_OUT if is_pure() else FAILURE)
    why = f": {note.read_text(encoding='utf-8').strip()}" if note.is_file() else ""
    tree = installation.source_tree()
    hidden = next((path for _, path in installation.installations() if path != tree), None)
    if tree and hidden:
        return (
            f"the native module was not built in the source tree {tree}, which hides the installation in {hidden}{why}",
            f"run from another folder, or with PYTHONSAFEPATH=1 (python -P) from Python 3.11 on, or build it here: "
            f"{installation.again()}",
        )
    if is_pure():
        return (
            f"the native module was left out{why}",
            f"install a wheel for this system and Python; or else {COMPILER}, and then a checkout or an sdist: "
            f"pip install --no-cache-dir --force-reinstall --no-deps {installation.SOURCES}",
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"the native module was not built{why or f' for Python {version}'}",
        f"{_remedy(why)}, then {installation.again()}",
    )


def _remedy(why: str) -> str:
    """What has to be done before a build can succeed, as far as the reason tells."""
    if not why or "C++ compiler" in why:
        return f"install {COMPILER}"
    return f"remove the reason (a build needs {COMPILER}, the headers of Python, and memory)"

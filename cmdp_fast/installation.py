"""Where this copy of the package comes from, and the commands that install from there again.

pip notes the origin of what it was given as a path or an address (PEP 610), not of what it found by its name.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
NAME = "cmdp_fast"
# Where the origin is not known. Never the bare name: no index has the package, and whoever takes it there could run
# code of theirs. With a slash pip takes it for a path alone, even if it is copied as it stands.
SOURCES = "/path/to/checkout-or-sdist"


def level_outside() -> int:
    """The ``stacklevel`` at which a warning of the function that asks names the caller of this package, or of the
    function of PyTorch, such as a backward pass, that has called it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and (
        frame.f_code.co_filename.startswith(f"{PACKAGE}{os.sep}")
        or frame.f_globals.get("__name__", "").partition(".")[0] == "torch"
    ):
        frame, level = frame.f_back, level + 1
    return level


def source_tree() -> Path | None:
    """The folder of csrc/ that this package lies in, if it is imported from one."""
    parent = PACKAGE.parent
    return parent if all((parent / name).is_file() for name in ("csrc/CMakeLists.txt", "setup.py")) else None


def installations() -> list[tuple[dict[str, Any], Path]]:
    """Where the package is installed on the search path: what pip noted of its origin, and the folder."""
    found = []
    for distribution in importlib.metadata.distributions(name=NAME):
        folder = Path(str(distribution.locate_file("")))
        try:
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
            _url(origin)  # it has what it has to have
            if origin.get("dir_info", {}).get("editable"):
                folder = _path_of(origin["url"])
        except (ValueError, KeyError, TypeError, AttributeError):  # broken, or of another form: as if it were not there
            origin = {}
        if (folder / NAME / "__init__.py").is_file():
            found.append((origin, folder.resolve()))
    return found


def extra(names: str) -> str:
    """The command that adds the packages of an extra, or of several with commas, to this installation."""
    tree = source_tree()
    if tree:
        return f"pip install -e {_quoted(f'{tree}[{names}]')}"
    origin = _origin()
    url = _url(origin)
    if not url:
        return f"pip install {_quoted(f'{SOURCES}[{names}]')}"
    local = origin["url"].startswith("file:") and "vcs_info" not in origin
    return f"pip install {_quoted(f'{url}[{names}]' if local else f'{NAME}[{names}] @ {url}')}"


def again() -> str:
    """The command that builds this installation again: a wheel that pip has cached may be one without kernels."""
    tree = source_tree()
    if tree:
        return f"pip install --no-deps -e {shlex.quote(str(tree))}"
    url = _url(_origin())
    if url.endswith(".whl"):  # the same wheel would bring no kernels again
        return "build and install the wheel again"
    return f"pip install --no-cache-dir --force-reinstall --no-deps {shlex.quote(url or SOURCES)}"


def _origin() -> dict[str, Any]:
    return next((origin for origin, path in installations() if path == PACKAGE.parent), {})


def _url(origin: dict[str, Any]) -> str:
    """As pip takes it: a path, or an address; empty if pip found the package by its name."""
    url: str = origin.get("url", "")
    if url.startswith("file:") and "vcs_info" not in origin:
        return str(_path_of(url))
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return f"{url}#subdirectory={origin['subdirectory']}" if origin.get("subdirectory") else url


def _path_of(url: str) -> Path:
    return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))


def _quoted(requirement: str) -> str:
    """In quotes always: a shell may take the brackets for a pattern."""
    quoted = shlex.quote(requirement)
    return quoted if quoted.startswith("'") else f"'{quoted}'"

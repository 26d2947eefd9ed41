"""Writes the folder: what the Hub's `kernels` package loads, what its kernel-builder builds that from, card and tests.

A build is a folder ``build/torch-cpu`` or ``build/torch-cuda``: `kernels` takes the one of the backend that torch was
compiled for. Both hold the same sources. What differs is the id, under which the module and its operators are known:
several kernels, and the package itself, live in one process.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import string
from pathlib import Path

from cmdp_fast.errors import InputError
from cmdp_fast.files import write_json, write_text, writing

from .sources import NAME, PACKAGE, kernel_files

BACKENDS = ("cpu", "cuda")  # where these sources have run as the package's
HUB_NAME = NAME.replace("_", "-")  # the Hub's names have no underscores
TEMPLATE = Path(__file__).with_name("template")

# `kernel-builder` writes a file with this function into what it builds; this is ours.
_OPS = '''"""The namespace of this build's operators in torch: the id in its metadata.json, which no other build has."""


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''

# The rules ask for the module a second time, below its own name, for loaders that look there.
_BELOW = '''"""The names of the folder above."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])

__all__ = sys.modules["{id}"].__all__
globals().update((name, getattr(sys.modules["{id}"], name)) for name in __all__)
'''


def write(folder: Path) -> list[Path]:
    """Writes everything into a folder that is not there or empty; returns the builds. Raises InputError otherwise."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty: give the name of a folder that is not there yet")
    files = kernel_files()
    release = _release()
    values = {"name": HUB_NAME, "module": NAME, "release": release, "version": _version(release)}
    for path in sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        text = string.Template(path.read_text(encoding="utf-8")).substitute(values)
        _write(folder, {path.relative_to(TEMPLATE).as_posix().removesuffix(".in"): text})
    _write(folder, {"LICENSE": _licence()})
    _write(folder / "torch-ext" / NAME, files)
    return [_build(folder / "build" / f"torch-{backend}", backend, files, _version(release)) for backend in BACKENDS]


def _build(folder: Path, backend: str, files: dict[str, str], version: int) -> Path:
    identity = f"_{NAME}_{backend}_{_fingerprint(files)}"
    extra = {"_ops.py": _OPS.format(id=identity), f"{NAME}/__init__.py": _BELOW.format(id=identity)}
    _write(folder, files | extra)
    digests = {
        path: base64.b64encode(hashlib.sha256((folder / path).read_bytes()).digest()).decode()
        for path in sorted(files | extra)
    }
    metadata = {
        "name": HUB_NAME,
        "id": identity,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    write_json(folder / "metadata.json", metadata)  # the last: a folder without it is not loaded
    return folder


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        with writing(folder):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, text)


def _fingerprint(files: dict[str, str]) -> str:
    """Ten digits that are others as soon as a file is another one."""
    return hashlib.sha256("\0".join(f"{path}\0{text}" for path, text in sorted(files.items())).encode()).hexdigest()[
        :10
    ]


def _release() -> str:
    import cmdp_fast

    return cmdp_fast.__version__


def _version(release: str) -> int:
    """The Hub's version, which is a whole number and, as this package's first, 0 as long as names may change."""
    return int(release.partition(".")[0])


def _licence() -> str:
    """The text of the licence: of the checkout, or of the installed package."""
    in_tree = PACKAGE.parent / "LICENSE"
    if in_tree.is_file() and (PACKAGE.parent / "pyproject.toml").is_file():
        return in_tree.read_text(encoding="utf-8")
    text = importlib.metadata.distribution(NAME).read_text("licenses/LICENSE")
    if text is None:
        raise InputError(f"the installation of {NAME} in {PACKAGE} has no licence's text, which a copy needs")
    return text

"""Checkouts of their own, what setup.py makes of them, and programs that import what it has made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SILENT = {"CXX": "/bin/false", "CMDP_FAST_REQUIRE_NATIVE": "0"}  # the quickest of all failures
SHOW = "import cmdp_fast as cf; print(cf.available_backends()['cpu'])"
USE = "import torch, cmdp_fast as cf; x = torch.randn(2, 3); cf.divergence(x, x); cf.divergence(x, x)"


def checkout(root: Path) -> Path:
    """A copy of what a build reads, without the native module."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so*")
    for folder in ("cmdp_fast", "csrc"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    return root


def setup(tree, *words, **environment):
    command = [sys.executable, "setup.py", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=tree, env={**os.environ, **SILENT, **environment}
    )


# The editable installation that the tests run from would lend its native module to every other folder's package.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"


def python(folder, program, **environment):
    """A program run in a folder, which is then the first of the search path."""
    environment = {**os.environ, "PYTHONSAFEPATH": "", **environment}
    done = subprocess.run(
        [sys.executable, "-c", ALONE + program], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


def installed(tree, folder, origin):
    """A copy of the package as pip lays it, with what pip notes of its origin."""
    shutil.copytree(tree / "cmdp_fast", folder / "cmdp_fast")
    noted = folder / "cmdp_fast-0.1.0.dist-info"
    noted.mkdir()
    (noted / "METADATA").write_text("Metadata-Version: 2.1\nName: cmdp_fast\nVersion: 0.1.0\n")
    (noted / "direct_url.json").write_text(json.dumps(origin))

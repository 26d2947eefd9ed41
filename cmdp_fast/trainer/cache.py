"""Where models that a recipe makes for itself are kept, and how they get there whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/cmdp_fast`` or ``~/.cache/cmdp_fast``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmdp_fast"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, filled by `make` now if it is not there. A process that is killed leaves nothing half made."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(scratch)
            os.replace(scratch, folder)
        except OSError:
            if not folder.is_dir():  # or another process has been faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder

"""Commands for processes that run this very package from any working directory."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).parent.parent)


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as `python -m` does, but of the package that runs here.

    `python -m` looks in the working directory first, which may be a checkout without the native module.
    """
    start = (
        "import runpy, sys; "
        f"sys.path[:] = [{ROOT!r}, *filter(None, sys.path)]; "
        "import cmdp_fast; del sys.path[0]; "  # stays imported; nothing else in its folder may be found
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", start, *arguments]

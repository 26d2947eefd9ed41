"""The command ``python -m cmdp_fast.hub_kernel FOLDER``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cmdp_fast.errors import InputError

from .folder import write


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the folder and says how it is loaded; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cmdp_fast.hub_kernel",
        description="Writes the folder that the Hub's package `kernels` loads token_stats, linear_token_stats and "
        "constrained_reward from. Nothing is uploaded.",
    )
    parser.add_argument("folder", type=Path, help="where to write it: a folder that is not there yet")
    folder = parser.parse_args(arguments).folder
    try:
        builds = write(folder)
    except InputError as error:
        print(f"cmdp_fast.hub_kernel: error: {error}", file=sys.stderr)
        return 2
    for build in builds:
        print(build)
    program = f"from pathlib import Path; import kernels; print(kernels.get_local_kernel(Path({str(folder)!r})))"
    print(f"python -c {shlex.quote(program)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

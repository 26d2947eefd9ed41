"""The command that builds the site."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from cmdp_fast.installation import extra

NEEDED = ("sphinx", "myst_parser", "furo", "latex2mathml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the site; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cmdp_fast.guide", description="The documentation as a site of HTML."
    )
    parser.add_argument("folder", type=Path, help="where to write the pages")
    folder = parser.parse_args(arguments).folder
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"cmdp_fast.guide: error: needs {', '.join(missing)}: {extra('train,docs')}", file=sys.stderr)
        return 2
    from cmdp_fast.guide.site import SiteError, build

    try:
        left_out = build(folder)
    except SiteError as error:
        print(f"cmdp_fast.guide: error: {error}", file=sys.stderr)
        return 2
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    print(folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())

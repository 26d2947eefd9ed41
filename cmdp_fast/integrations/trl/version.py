"""The releases of TRL that this was tested with. It overrides methods that TRL does not promise to keep."""

from __future__ import annotations

from cmdp_fast import installation
from cmdp_fast.integrations.packages import require

AT_LEAST, BELOW = "1.16", "1.17"


def require_trl() -> None:
    """Raises PackageError, in one line, if TRL is missing or is a release that this was not tested with."""
    require("trl", at_least=AT_LEAST, below=BELOW, install=installation.extra("trl"))

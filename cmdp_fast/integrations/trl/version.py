"""The releases of TRL that this was tested with. It overrides methods that TRL does not promise to keep."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TESTED = ">=1.16,<1.17"


def require_trl() -> None:
    """Raises ImportError, in one line, if TRL is missing or is a release that this was not tested with."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(
            f"cmdp_fast.integrations.trl needs TRL, and found none; expected trl{TESTED}: pip install 'cmdp_fast[trl]'"
        ) from None
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(TESTED).contains(found):
        raise ImportError(
            f"cmdp_fast.integrations.trl found TRL {found}, with which it was not tested; expected trl{TESTED}: "
            f"pip install 'trl{TESTED}'"
        )

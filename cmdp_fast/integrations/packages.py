"""Whether a package that an integration is written for is installed, in a version that it was tested with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from cmdp_fast.errors import InputError


class PackageError(InputError, ImportError):
    """A package is absent, or of a version that was not tested. The message has the version found, the range expected
    and the pip command."""


def require(package: str, *, at_least: str, below: str, install: str) -> str:
    """The installed version of a package. Raises PackageError, which quotes the command ``install``, unless
    ``at_least`` <= version < ``below``."""
    expected = f"expected {package}>={at_least},<{below}: {install}"
    try:
        installed = version(package)
    except PackageNotFoundError as error:
        raise PackageError(f"{package} is not installed, {expected}") from error
    if not _numbers(at_least) <= _numbers(installed) < _numbers(below):
        raise PackageError(f"{package} {installed} is installed, which was not tested; {expected}")
    return installed


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", release)[:3])

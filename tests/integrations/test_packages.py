"""What is said of packages that are absent or untested, and that nothing imports them unasked."""

import subprocess
import sys

import pytest

from cmdp_fast.errors import InputError
from cmdp_fast.integrations.packages import PackageError, require


def test_a_version_in_the_range_is_returned() -> None:
    assert require("pytest", at_least="8.0", below="100", install="pip install pytest") == pytest.__version__


def test_an_absent_package_is_named_with_the_command() -> None:
    with pytest.raises(
        PackageError, match=r"no-such-package is not installed, expected no-such-package>=1.2,<2: pip i"
    ):
        require("no-such-package", at_least="1.2", below="2", install="pip install no-such-package")


@pytest.mark.parametrize(("at_least", "below"), [("1.0", "2.0"), ("100.0", "101.0")])
def test_an_untested_version_is_named_with_the_range(at_least: str, below: str) -> None:
    with pytest.raises(PackageError, match=f"pytest {pytest.__version__} is installed.*>={at_least},<{below}"):
        require("pytest", at_least=at_least, below=below, install="pip install pytest")


def test_it_is_an_import_error_and_an_input_error() -> None:
    assert issubclass(PackageError, ImportError) and issubclass(PackageError, InputError)


def test_nothing_is_imported_unasked() -> None:
    code = """
import sys
import cmdp_fast, cmdp_fast.credit, cmdp_fast.integrations.rewards, cmdp_fast.scoring
import cmdp_fast.integrations.openrlhf
loaded = {"trl", "verl", "openrlhf", "ray", "tensordict", "transformers", "tyro", "accelerate"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)

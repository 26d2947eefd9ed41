"""Without a package of the extra `train` the trainer's tests are skipped; those of all else are collected."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HIDE = "import sys\nfor name in ('tyro', 'datasets'):\n    sys.modules[name] = None\n"


def test_a_missing_package_is_named_and_ends_no_collection(tmp_path):
    (tmp_path / "without.py").write_text(HIDE)
    given = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_XDIST", "PYTEST_ADDOPTS"))}
    environment = given | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    other = f"{HERE.parent / 'test_advantage.py'}::test_equal_returns_leave_the_direct_term_alone"
    command = [sys.executable, "-m", "pytest", "-p", "without", "-p", "no:cacheprovider", "-ra"]
    command += [str(HERE / "test_lock.py"), str(HERE / "test_trust.py"), other]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert "SKIPPED [2]" in done.stdout and "needs the extra `train`: there is no datasets, tyro" in done.stdout

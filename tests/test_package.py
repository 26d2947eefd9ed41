"""The package as it is installed: with and without the native module, and the command that reports on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cmdp_fast as cf
from cmdp_fast import children, info

ROOT = Path(__file__).parent.parent


def test_report_names_versions_variant_threads_and_every_backend():
    text = info.report()
    assert f"torch          {torch.__version__}" in text and f"cmdp_fast      {cf.__version__}" in text
    assert f"threads        {torch.get_num_threads()}" in text
    for name, problem in cf.available_backends().items():
        expected = "available" if problem is None else f"not available: {problem}"
        assert f"backend {name:<6} {expected}" in text


def test_a_module_that_was_built_runs_here():
    """The tests of its kernels do not tell: where no variant runs they are left out."""
    assert pytest.importorskip("cmdp_fast._C").variant()


WITHOUT_NATIVE = """
import sys
sys.modules["cmdp_fast._C"] = None  # what an import of a module that was not built comes to
import torch
import cmdp_fast as cf, cmdp_fast.info
assert cf.available_backends()["cpu"].startswith("the native module was not built"), cf.available_backends()
x, y = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
out = cf.constrained_reward(x, y, torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), 1.0)
out.stats.reverse_kl.sum().backward()
cf.divergence(x, y)
cf.TokenState.empty(3).update(x[0], y[0], torch.zeros(3, dtype=torch.int64)).finish()
try:
    cf.token_stats(x, y, torch.zeros(2, 3, dtype=torch.int64), backend="cpu")
except ValueError as error:
    print(error)
torch.compile(lambda x: cf.divergence(x, y), fullgraph=True, backend="eager")(x)
print(cmdp_fast.info.report())
"""


def test_the_torch_backend_serves_without_the_native_module():
    done = subprocess.run([sys.executable, "-c", WITHOUT_NATIVE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "backend='cpu' is not available here: the native module was not built" in done.stdout
    assert "native module  absent" in done.stdout and "backend torch  available" in done.stdout
    # One warning for all of these calls.
    assert done.stderr.count("without its native kernels: the native module was not built") == 1
    assert "circular" not in done.stdout + done.stderr


NO_CALL = """
import sys
sys.modules["cmdp_fast._C"] = None
import cmdp_fast as cf
cf.available_backends()
"""


def test_an_import_does_not_warn():
    command = [sys.executable, "-W", "error", "-c", NO_CALL]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_warning_of_a_fallback_in_a_graph_is_no_break():
    program = WITHOUT_NATIVE.partition("out = ")[0] + WITHOUT_NATIVE[WITHOUT_NATIVE.index("torch.compile") :]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("without its native kernels") == 1


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import cmdp_fast as cf
problem = cf.available_backends()["triton"]
cf.token_stats(torch.randn(2, 5), torch.randn(2, 5), torch.zeros(2, dtype=torch.int64))
print(problem)
"""


@pytest.mark.parametrize(
    "interpreted, reason", [("1", "triton cannot be imported"), ("0", "no CUDA or ROCm device was found")]
)
def test_a_missing_triton_is_reported(interpreted, reason):
    environment = {**os.environ, "TRITON_INTERPRET": interpreted, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(reason)


OLD_TRITON = """
import sys
import torch
import triton
triton.__version__ = "3.3.1"
import cmdp_fast as cf
print(cf.available_backends()["triton"])
"""


def test_a_triton_that_is_too_old_is_reported():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", OLD_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Triton 3.3.1 is too old: the kernels need 3.4 or later: pip install ")


WITHOUT_CUDA = """
import sys
sys.modules["cmdp_fast._cuda"] = None
import cmdp_fast as cf
print(cf.available_backends()["cuda"])
"""


def test_cuda_kernels_that_were_not_built_are_reported():
    done = subprocess.run([sys.executable, "-c", WITHOUT_CUDA], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the CUDA kernels were not built")


def test_children_run_the_package_that_started_them(tmp_path):
    """Not one that lies where the command was typed, as in a checkout beside an installation, nor one installed."""
    (tmp_path / "cmdp_fast").mkdir()
    (tmp_path / "cmdp_fast" / "__init__.py").write_text("raise SystemExit('another package')")
    for environment in (os.environ, {**os.environ, "PYTHONPATH": str(tmp_path)}):
        command = children.command("cmdp_fast.cli", "info")
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0 and "backend torch" in done.stdout, done.stderr

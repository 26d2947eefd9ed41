"""What an import of the package brings, and a command's --help: no more than they need. In one process, in turn."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import contextlib, io, json, sys
import torch

def brought(action):
    before = set(sys.modules)
    action()
    print(json.dumps(sorted(set(sys.modules) - before)))

def package():
    import cmdp_fast

def helped(*command):
    from cmdp_fast.cli import main
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert "usage: cmdp-fast" in said.getvalue(), said.getvalue()

brought(package)
brought(helped)
brought(lambda: helped("train"))
"""

# Of which none is needed to say what the options are. Each takes from a tenth of a second to several.
HEAVY = {
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "triton",
    "sympy",
    "transformers",
    "datasets",
    "accelerate",
    "matplotlib",
    "pandas",
    "pyarrow",
    "tensorboard",
    "reasoning_gym",
}


def test_no_more_is_imported_than_is_needed():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    package, commands, train = (set(json.loads(line)) for line in done.stdout.splitlines())
    assert foreign(package) == foreign(commands) == set()
    assert not package & {"cmdp_fast.cli", "cmdp_fast.trainer", "cmdp_fast.judging", "cmdp_fast.kernels"}
    assert train & HEAVY == set()


def foreign(modules: set[str]) -> set[str]:
    """Those of other packages; torch and what it imports was there before."""
    ours = {"cmdp_fast", *sys.stdlib_module_names}
    return {name for name in modules if name.split(".")[0] not in ours and not name.startswith("_sysconfigdata")}

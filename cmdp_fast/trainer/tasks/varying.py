"""Problems of tasks that are other ones in each process, made in a process where they are not.

A few of reasoning-gym's tasks draw from sets of texts, whose order is another one in each process (PYTHONHASHSEED), or
with Python's own random numbers, which nobody has seeded. A run that goes on would have other problems, and so would
each of several processes: it would train on what another holds out.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any

from cmdp_fast.errors import InputError

# Found by making problems of all 106 tasks of reasoning-gym 0.1.19 under several hash seeds.
HASHED = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
UNSEEDED = ("list_functions",)
VARYING = (*HASHED, *UNSEEDED)

_MAKE = """
import pickle, random, sys
sys.path[:], task, arguments = pickle.loads(sys.stdin.buffer.read())
out, sys.stdout = sys.stdout.buffer, sys.stderr
import reasoning_gym
random.seed(0)
made = pickle.dumps([dict(entry) for entry in reasoning_gym.create_dataset(task, **arguments)])
out.write(made)
"""


def entries(task: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a task's dataset, which these arguments are known to make, in a process with the hash seed 0 and
    Python's random numbers from 0 on.

    Raises InputError, with the last line of what that process said, if it makes none.
    """
    made = subprocess.run(
        [sys.executable, "-c", _MAKE],
        input=pickle.dumps(([path for path in sys.path if path], task, arguments)),
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    if made.returncode:
        said = made.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {made.returncode}"]
        raise InputError(f"--task {task}: {said[-1]}")
    rows: list[dict[str, Any]] = pickle.loads(made.stdout)
    return rows

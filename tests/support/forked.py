"""Processes of a check, forked from a server that has imported what they need and has run no test.

In a process that was forked after thousands of tests PyTorch's collectives have crashed, and one that starts anew
imports for seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

IMPORTED = ["parallel_worker", "sharded_heads"]


def in_processes(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """``function`` of a rank, the number of ranks and the arguments. An error in one ends all and is raised."""
    with pytest.MonkeyPatch.context() as patch:
        # The server does not take the search path of who starts it, and passes over what it cannot import
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        multiprocessing.set_forkserver_preload(IMPORTED)
        torch.multiprocessing.start_processes(
            function, args=(world, *arguments), nprocs=world, start_method="forkserver"
        )

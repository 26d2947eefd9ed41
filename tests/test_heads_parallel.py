"""Hidden states and head of models over several processes: gradients are those of one process.

Each check runs in processes of its own, so that a crash in one is a failure that says so. They come from a
server that has run no test: in one that was forked after thousands of them PyTorch's collectives have crashed.
"""

from __future__ import annotations

import multiprocessing

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs the extra `train`")

import sharded_heads

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo"
)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("check", ["fully_sharded", "replicated", "adapted", "sharded_by_the_older"])
def test_gradients_are_those_of_one_process(check, world, tmp_path):
    arguments = (world, str(tmp_path / "store"), getattr(sharded_heads, check))
    multiprocessing.set_forkserver_preload([sharded_heads.__name__])
    torch.multiprocessing.start_processes(sharded_heads.run, args=arguments, nprocs=world, start_method="forkserver")

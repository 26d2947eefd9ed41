"""Hidden states and head of models over several processes: gradients are those of one process.

Each check runs in processes of its own, so that a crash in one is a failure that says so.
"""

from __future__ import annotations

import pytest
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs the extra `train`")

import sharded_heads
from forked import in_processes

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo"
)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("check", ["fully_sharded", "replicated", "adapted", "sharded_by_the_older"])
def test_gradients_are_those_of_one_process(check, world, tmp_path):
    in_processes(world, sharded_heads.run, str(tmp_path / "store"), getattr(sharded_heads, check))

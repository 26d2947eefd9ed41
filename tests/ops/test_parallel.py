"""A vocabulary over several processes against one process. Each number of processes is started once."""

import pytest
import torch
import torch.distributed as dist
from forked import in_processes
from helpers import make_logits
from parallel_worker import BOUNDS, run

import cmdp_fast as cf


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo")
@pytest.mark.parametrize("world", list(BOUNDS))
def test_columns_on_several_ranks(world, tmp_path):
    in_processes(world, run, str(tmp_path / "store"))


def test_a_first_column_without_a_group_is_refused():
    x, tokens = make_logits(2, 9), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="first_column=4 has a meaning only with process_group="):
        cf.token_stats(x, x, tokens, first_column=4)

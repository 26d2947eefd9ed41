"""The command line with FSDP2 on CPUs, which accelerate does not offer by itself: `python -m fsdp_on_cpu train …`.

It has accelerate take the processes, which talk by gloo, for some with a GPU each.
"""

from __future__ import annotations

import os
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

SHARDING = {  # as accelerate's launcher sets them from fsdp2.yaml
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def pretend() -> None:
    """From here on an accelerator takes a CPU for a GPU."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["ACCELERATE_USE_CPU"] = "false"
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    from cmdp_fast.cli import main

    pretend()
    sys.exit(main())

"""Whether bfloat16 is the faster arithmetic of this machine, for the setting `mixed_precision auto`."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal

SIZE, ROUNDS = 256, 5  # a product small enough where bfloat16 is emulated, hundreds of times slower


@cache
def faster_precision() -> Literal["no", "bf16"]:
    """bf16 on a GPU that has it, and on a CPU where a product in it takes less than three quarters of the time of one
    in float32: measured once a process, within a tenth of a second."""
    import torch
    from accelerate.utils import parse_flag_from_env

    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(2))
        rounds = []
        for _ in range(ROUNDS):
            since = time.perf_counter()
            left @ right
            rounds.append(time.perf_counter() - since)
        taken[dtype] = min(rounds)
    return "bf16" if taken[torch.bfloat16] < 0.75 * taken[torch.float32] else "no"

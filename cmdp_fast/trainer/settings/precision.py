"""Whether bfloat16 is the faster arithmetic of this machine, for the setting `mixed_precision auto`."""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Literal

SIZE = 256  # of a product that is small enough where bfloat16 is emulated, hundreds of times slower
ROUNDS, ENOUGH = (3, 30), 0.3  # at least and at most, and seconds after which there are no more


@cache
def faster_precision() -> Literal["no", "bf16"]:
    """bf16 on a GPU that has it, and on a CPU where a product in it takes less than three quarters of the time of one
    in float32: measured once a process, within half a second, by the shortest of turns that alternate, on one thread:
    what else computes on this machine, and waits for several, is not to decide."""
    import torch
    from accelerate.utils import parse_flag_from_env

    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    threads, began = torch.get_num_threads(), time.perf_counter()
    factors = {dtype: torch.ones(SIZE, SIZE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    shortest = dict.fromkeys(factors, math.inf)
    torch.set_num_threads(1)
    try:
        for turn in range(ROUNDS[1]):
            for dtype, factor in factors.items():
                since = time.perf_counter()
                factor @ factor
                shortest[dtype] = min(shortest[dtype], time.perf_counter() - since)
            if turn + 1 >= ROUNDS[0] and time.perf_counter() - began > ENOUGH:
                break
    finally:
        torch.set_num_threads(threads)
    return "bf16" if shortest[torch.bfloat16] < 0.75 * shortest[torch.float32] else "no"

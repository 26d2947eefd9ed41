"""Where sequences lie in tensors of a number per token, and sums along them.

A sequence is read in chunks of a fixed size, so that it comes out the same whether it is padded or packed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from cmdp_fast.kernels import launch
from cmdp_fast.kernels.shapes import Pointer

LANES = 512
# The longest sequence of a batch decides how long a scan takes, so few and large steps.
CHUNK = 2048
RUN = tl.constexpr(4)  # tokens that `running` adds up before it looks at others


class Sequences(NamedTuple):
    """Arguments of a kernel, one by one: it must not be compiled for the numbers."""

    offsets: Pointer | None  # [B+1]: where each begins; None: all have the same width
    width: int
    total: int  # tokens


class Tokens(NamedTuple):
    """The numbers of each token ``[tokens]`` that a scan reads."""

    plus: Pointer | None  # the cost is plus - minus, which is how `cmdp_fast.reference.token_cost` rounds it too
    minus: Pointer | None
    mask: Pointer | None  # bytes
    task_reward: Pointer | None


@triton.jit
def bounds(offsets, width, total, sequence):
    """Where a sequence begins, and its length. Offsets may be unchecked; they must not lead outside of the tensors."""
    if offsets is None:
        begin = sequence.to(tl.int64) * width
        length = tl.zeros([], tl.int32) + width
    else:
        begin = tl.minimum(tl.maximum(tl.load(offsets + sequence).to(tl.int64), 0), total)
        stop = tl.minimum(tl.load(offsets + sequence + 1).to(tl.int64), total)
        length = tl.maximum(stop - begin, 0).to(tl.int32)
    return begin, length


@triton.jit
def previous(x, first):
    """x shifted by one place; `first` comes before."""
    index = tl.arange(0, x.shape[0])
    return tl.where(index == 0, first, tl.gather(x, tl.maximum(index - 1, 0), 0))


@triton.jit
def running(x, total):
    """`total` plus the sum of x up to and with each place [CHUNK], and `total` after all of them.

    RUN neighbours are summed within a warp, then the sums of the runs. A plain `tl.cumsum` adds up all warps once for
    each number that a lane holds: 605 instructions in place of 417 for 8 doubles per lane of 256 (sm_90).
    """
    runs: tl.constexpr = x.shape[0] // RUN
    x = tl.reshape(x, [runs, RUN])
    inner = tl.cumsum(x, 1)
    sums = tl.reshape(tl.gather(inner, tl.full([runs, 1], RUN - 1, tl.int32), 1), [runs])
    before = previous(tl.cumsum(sums, 0), tl.zeros([], x.dtype))
    return tl.reshape(inner + (total + before)[:, None], [runs * RUN]), total + tl.sum(sums, 0)


@triton.jit
def cost_of(tokens, at, mask):
    """The cost as the operations before have rounded it: plus, -minus or plus - minus."""
    # The compiler leaves out a branch whose condition is known, but not a statement that follows a return.
    if tokens.minus is None:
        cost = tl.load(tokens.plus + at, mask=mask, other=0.0)
    elif tokens.plus is None:
        cost = -tl.load(tokens.minus + at, mask=mask, other=0.0)
    else:
        cost = tl.load(tokens.plus + at, mask=mask, other=0.0) - tl.load(tokens.minus + at, mask=mask, other=0.0)
    return cost.to(tl.float64)


def compiled() -> dict[str, Any]:
    """How kernels with one program per sequence are compiled."""
    return {"CHUNK": CHUNK, **launch.compiled_for(LANES // launch.warp_size())}

"""Products with float32 or wider sums for every dtype of the inputs, written into memory that exists.

On a CPU half-precision inputs are widened to float32 first: few processors multiply them natively, and where none does
a bfloat16 product is hundreds of times slower than a float32 one. On a GPU they stay as they are and the product comes
out in float32, where this version of PyTorch and the device offer that.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def input_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What both factors of a projection are converted to."""
    common = torch.promote_types(hidden.dtype, weight.dtype)
    return torch.float32 if hidden.device.type == "cpu" and common in HALVES else common


def output_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a product of two such factors is stored as: float32 if it can be had without widening the factors."""
    return torch.float32 if dtype in HALVES and _widens(device.type, dtype) else dtype


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b."""
    if out.dtype != a.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out=out)


def accumulate(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """total += a b, or = if ``fresh``, where total is float32 or wider and never rounded to less."""
    beta = 0 if fresh else 1  # 0: what stands there is not read
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif _widens(total.device.type, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


@functools.cache
def _widens(device: str, dtype: torch.dtype) -> bool:
    """Whether half-precision factors give a float32 product here.

    Tried out on two tiny products, because PyTorch has no way to ask: ``out_dtype`` is there from 2.8 on (TypeError
    before), and not for every vendor's products (RuntimeError). Where it is not, nothing fails: the caller widens.
    """
    if device == "cpu":
        return False
    try:
        tiny, out = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
        torch.mm(tiny, tiny, out_dtype=torch.float32, out=out)
        torch.addmm(out, tiny, tiny, out_dtype=torch.float32, out=out)
    except torch.OutOfMemoryError:
        raise  # a RuntimeError too, but one that says nothing about the product
    except (RuntimeError, TypeError):
        return False
    return True

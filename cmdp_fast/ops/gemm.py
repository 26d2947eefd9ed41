"""Products with float32 or wider sums for every dtype of the factors, written into memory that exists.

Under autocast both factors are rounded to its dtype, as those of `torch.nn.functional.linear` are; float64 is left
alone, as autocast leaves it.

On a CPU half-precision factors are widened to float32 first, after that rounding: few processors multiply them
natively, and where none does a bfloat16 product is hundreds of times slower than a float32 one. On a GPU they are never
widened, since a float32 product there is 12 to 15 times slower (67 TFLOP/s against 990 on an H100, by its data sheet).
They stay as they are, and the product comes out in float32 where PyTorch and the device offer that:

    torch.mm(a, b, out_dtype=float32, out=)             from PyTorch 2.8 on
    torch.addmm(total, a, b, out_dtype=float32, out=)   with a float32 total from 2.10 on

Sums over tiles without the second take the first and one addition more. Without either the product is rounded to the
factors' dtype, as eager PyTorch's is, and then summed in float32; a warning says so.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast.ops.workspace import Workspace

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
HALVES = tuple(HALF.values())


class Offered(NamedTuple):
    """What a device's products of half-precision factors can do."""

    write: bool  # a float32 product
    add: bool  # and add it to a float32 total


class FactorDtypes(NamedTuple):
    """What hidden states and head are converted to, one after the other."""

    rounded: torch.dtype  # the common one, or autocast's
    multiplied: torch.dtype  # that, or float32 where half precision is widened


def keeps_half(device: torch.device) -> bool:
    """Whether half-precision factors are multiplied as they are."""
    return device.type != "cpu"


def autocast_dtype(device: torch.device) -> str:
    """The dtype to which autocast rounds factors on a device, by name; empty where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return ""
    chosen = torch.get_autocast_dtype(device.type)
    for name, dtype in HALF.items():
        if dtype == chosen:
            return name
    return ""


def factor_dtypes(hidden: Tensor, weight: Tensor, autocast: str = "") -> FactorDtypes:
    """What both factors of a projection are converted to. ``autocast``: as `autocast_dtype` gives it."""
    rounded = torch.promote_types(hidden.dtype, weight.dtype)
    if autocast and rounded != torch.float64:
        rounded = HALF[autocast]
    widens = rounded in HALVES and not keeps_half(hidden.device)
    return FactorDtypes(rounded, torch.float32 if widens else rounded)


def output_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a product of two such factors is stored as: float32 if it can be had without widening the factors."""
    return torch.float32 if dtype in HALVES and offered(device, dtype).write else dtype


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        write_wide(a, b, out)


def accumulate(total: Tensor, a: Tensor, b: Tensor, workspace: Workspace, *, fresh: bool = False) -> None:
    """total += a b, or = if ``fresh``, where total is float32 or wider and what was there is never rounded to less."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if fresh else 1)  # 0: what stands there is not read
        return
    write, add = offered(total.device, a.dtype)
    if fresh and write:
        write_wide(a, b, total)
    elif write and add:
        add_wide(a, b, total)
    else:
        product = workspace.matrix("product", total.shape, total.dtype if write else a.dtype)
        multiply(a, b, product)
        if fresh:
            total.copy_(product)
        else:
            total.add_(product)


def write_wide(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b of half-precision factors, where out is float32."""
    torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_wide(a: Tensor, b: Tensor, total: Tensor) -> None:
    """total += a b of half-precision factors, where total is float32."""
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@functools.cache
def offered(device: torch.device, dtype: torch.dtype) -> Offered:
    """What half-precision factors of a dtype are offered on a device.

    Tried out on tiny products, because PyTorch has no way to ask. Either may be missing: TypeError where PyTorch is
    older than the argument, RuntimeError where it wants another total (`addmm` before 2.10 one in the factors' dtype)
    or has no such product for a vendor. Nothing waits for the device, so that a graph may be captured meanwhile.
    Warns once per device and dtype where there is no float32 product.
    """
    factor = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    write = _works(write_wide, factor, total)
    if not write:
        warnings.warn(
            f"PyTorch {torch.__version__} gives no float32 product of {str(dtype).removeprefix('torch.')} factors on "
            f"{device}: logits and every tile's share of a gradient are rounded to it, as eager PyTorch rounds them; "
            "PyTorch 2.8 and later have that product on NVIDIA's GPUs",
            RuntimeWarning,
            stacklevel=2,
        )
    return Offered(write, write and _works(add_wide, factor, total))


def _works(product: Callable[[Tensor, Tensor, Tensor], None], factor: Tensor, out: Tensor) -> bool:
    try:
        product(factor, factor, out)
    except TypeError:
        return False
    except RuntimeError as error:
        if any(sign in str(error) for sign in _OF_ANOTHER_CAUSE):
            raise
        return False
    return True


# What a RuntimeError says that tells nothing about the product: a device without memory or that has failed, a mode.
_OF_ANOTHER_CAUSE = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "illegal memory access",
    "deterministic",
)

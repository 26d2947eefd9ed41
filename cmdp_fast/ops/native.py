"""Hands tensors to the native kernels as addresses, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from cmdp_fast.layout import matrix_of
from cmdp_fast.ops.backends import native

HUGE = 8 * 2**20  # bytes from which on fresh memory asks for huge pages, of 2 MiB where there are any
STATE = 13  # numbers a row of a token state: kSegmentState in csrc/cpu/kernels.h


def threads() -> int:
    return torch.get_num_threads()


def in_huge_pages(t: Tensor) -> Tensor:
    """The tensor itself, just allocated and about to be written from end to end.

    On a CPU the first touch of a large one costs more in page faults than the writing does, unless its pages are huge;
    most Linux systems give those to who asks. Small tensors come from memory that is used again, and need nothing.
    """
    if native is not None and t.device.type == "cpu" and t.nbytes >= HUGE:
        native.advise_huge_pages(t.data_ptr(), t.nbytes)
    return t


def unit_stride(t: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, else a copy."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def can_overwrite(t: Tensor, other: Tensor) -> bool:
    """Whether rows of ``t`` may be overwritten one by one while ``other`` is still read.

    Not if rows of ``t`` share memory, as after `expand` or `unfold`, nor if ``other`` lies in the same storage in
    another layout: a row could then be overwritten before it has been read. The same rows are fine.
    """
    extent = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent += (size - 1) * stride
    shared = t.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    same = t.data_ptr() == other.data_ptr() and t.stride() == other.stride() and t.dtype == other.dtype
    return not shared or same


def matrix(t: Tensor):
    """The rows ``[..., V]`` of a tensor as the kernels see them."""
    return native.Matrix(*matrix_of(t))

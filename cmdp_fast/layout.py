"""How tensors lie in memory, as kernels that are no part of PyTorch are told of it."""

from __future__ import annotations

import torch
from torch import Tensor

SAVED = 7  # numbers a row that the backward pass needs: kSaved in csrc/cpu/kernels.h


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def flat(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A small per-token tensor as a contiguous array; keep a reference to it while the kernel runs."""
    return None if t is None else t.to(dtype).contiguous()


def row_axes(t: Tensor) -> list[tuple[int, int]]:
    """Size and stride of the leading axes of ``[..., V]``, neighbouring axes merged where memory allows."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def addressable(t: Tensor) -> bool:
    """Whether the GPU kernels can address a tensor's rows where they lie, and so write to them."""
    return len(row_axes(t)) <= 2


def matrix_of(t: Tensor) -> tuple[int, str, list[int], list[int], int]:
    """The rows ``[..., V]`` of a tensor: address, dtype, leading sizes and strides, width (make_matrix in
    csrc/arguments.h)."""
    axes = row_axes(t)
    dtype = str(t.dtype).removeprefix("torch.")
    return t.data_ptr(), dtype, [size for size, _ in axes], [stride for _, stride in axes], t.shape[-1]


def empty_statistics(student: Tensor, packed: bool = False) -> tuple[list[Tensor], Tensor]:
    """Room for what the GPU kernels make of ``student [..., V]``: the six statistics and the saved scalars.

    ``packed``: they are made sequence by sequence. On a GPU nobody has checked where those lie: a row of none is 0.
    """
    shape, room = student.shape[:-1], student.new_zeros if packed else student.new_empty
    statistics = [room(shape, dtype=torch.float32) for _ in range(6)]
    return statistics, room((*shape, SAVED), dtype=torch.float64)

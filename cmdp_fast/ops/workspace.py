"""Memory by name that is used again from one tile to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PITCH = 64  # elements; 128 bytes in half precision


def pitch(columns: int, device: torch.device) -> int:
    """How far apart the rows of a matrix begin: on a GPU at whole cache lines.

    A vocabulary of 50257 columns would otherwise put most rows where neither a product nor a kernel can load 16 bytes
    at once. On a CPU rows adjoin.
    """
    return columns if device.type == "cpu" else -(-columns // PITCH) * PITCH


class Workspace:
    """Matrices that live until their name is asked for again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def matrix(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``[rows, columns]``, whose contents are whatever stands there. Grows where it is too small."""
        rows, columns = shape
        stride = pitch(columns, self.device)
        memory = self._memory.get((name, dtype))
        if memory is None or len(memory) < rows * stride:
            self._memory.pop((name, dtype), None)  # before there is another
            memory = self._memory[name, dtype] = torch.empty(rows * stride, dtype=dtype, device=self.device)
        return memory[: rows * stride].view(rows, stride)[:, :columns]

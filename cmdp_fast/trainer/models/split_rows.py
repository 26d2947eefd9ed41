"""Rows of a batch of which a device has no room for all: the first there, the others in the host's memory."""

from __future__ import annotations

import torch
from torch import Tensor


class SplitRows:
    """A tensor ``[B, ...]`` of which the device has the first rows and the host the others; read some rows at a time.

    For a GPU the host's memory is pinned, from which it copies by itself.
    """

    def __init__(self, like: Tensor, count: int, here: int) -> None:
        """Room for ``count`` rows like those of ``like``, ``here`` of them on its device."""
        shape = like.shape[1:]
        self.here = like.new_empty(here, *shape)
        self.elsewhere = torch.empty(
            (count - here, *shape), dtype=like.dtype, device="cpu", pin_memory=like.device.type == "cuda"
        )

    def __setitem__(self, rows: Tensor, values: Tensor) -> None:
        """Writes the values ``[N, ...]`` to an index ``[N]`` of int64."""
        index = rows.cpu()
        is_here = index < len(self.here)
        if is_here.any():
            self.here[index[is_here].to(values.device)] = values[is_here.to(values.device)]
        if not is_here.all():
            self.elsewhere[index[~is_here] - len(self.here)] = values[~is_here.to(values.device)].cpu()

    def __getitem__(self, index: Tensor) -> Tensor:
        """The rows of an index of int64 of any shape, on the device: ``[*index.shape, ...]``."""
        flat = index.flatten().cpu()
        is_here = flat < len(self.here)
        rows = self.here.new_empty(len(flat), *self.here.shape[1:])
        device = rows.device
        if is_here.any():
            rows[is_here.to(device)] = self.here[flat[is_here].to(device)]
        if not is_here.all():
            rows[~is_here.to(device)] = self.elsewhere[flat[~is_here] - len(self.here)].to(device)
        return rows.unflatten(0, index.shape) if index.numel() else rows.reshape(*index.shape, *rows.shape[1:])

"""Rows of a batch of which a device has no room for all: the first there, the others in the host's memory."""

from __future__ import annotations

import torch
from torch import Tensor


class SplitRows:
    """A tensor ``[B, ...]`` of which the device has the first rows and the host the others; read some rows at a time.

    On a GPU the host's memory is pinned, so that rows come back at the speed of the bus.
    """

    def __init__(self, like: Tensor, count: int, here: int) -> None:
        """Room for ``count`` rows like those of ``like``, ``here`` of them on its device."""
        shape = like.shape[1:]
        self.here = like.new_empty(here, *shape)
        self.elsewhere = torch.empty(
            (count - here, *shape), dtype=like.dtype, device="cpu", pin_memory=like.device.type == "cuda"
        )

    def __len__(self) -> int:
        return len(self.here) + len(self.elsewhere)

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        """Writes some rows that lie one behind the other; ``rows`` has both ends and no step."""
        border = min(max(len(self.here) - rows.start, 0), len(values))  # how many of the values belong here
        self.here[rows.start : rows.start + border] = values[:border]
        start = rows.start + border - len(self.here)
        if border < len(values):
            self.elsewhere[start : start + len(values) - border].copy_(values[border:])

    def __getitem__(self, index: Tensor) -> Tensor:
        """The rows of an index ``[N]`` of int64, on the device: ``[N, ...]``."""
        index = index.cpu()
        is_here = index < len(self.here)
        rows = self.here.new_empty(len(index), *self.here.shape[1:])
        device = rows.device
        if is_here.any():
            rows[is_here.to(device)] = self.here[index[is_here].to(device)]
        if not is_here.all():
            rows[~is_here.to(device)] = self.elsewhere[index[~is_here] - len(self.here)].to(device)
        return rows

"""Tensors that lie in memory in every way PyTorch has, amid numbers that nobody may read or write."""

import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from fuzzing.draws import Draw

FAR = 2**31 + 7  # elements: beyond what 32 bits count
LAYOUTS = {
    "contiguous": 4,
    "offset": 2,
    "wide rows": 2,
    "permuted axes": 2,
    "gaps everywhere": 2,
    "strided columns": 1,
    "columns first": 1,
    "expanded": 2,
    "expanded columns": 0.5,
    "overlapping": 1,
    "far apart": 0.3,
}
STRANGE = ("expanded", "expanded columns", "overlapping")  # several places of the view are one in memory


class Layout(NamedTuple):
    strides: tuple[int, ...]
    offset: int


class Placed(NamedTuple):
    """A view of memory that is longer than it."""

    memory: Tensor  # one axis
    shape: tuple[int, ...]
    layout: Layout

    def view(self) -> Tensor:
        return self.memory.as_strided(self.shape, *self.layout)

    def copy(self) -> "Placed":
        """The same numbers in memory of its own."""
        if self.is_far:
            memory = _far_memory(len(self.memory), self.memory.dtype)
            again = self._replace(memory=memory)
            again.view().copy_(self.view())
            return again
        return self._replace(memory=self.memory.clone())

    @property
    def is_far(self) -> bool:
        return len(self.memory) > FAR

    def bits(self, around: bool = False) -> Tensor:
        """All bytes; with ``around`` those alone that the view does not show. Of memory of gigabytes what it shows."""
        if self.is_far:
            shown = self.view().contiguous().view(torch.uint8)
            return shown[:0] if around else shown
        if not around:
            return self.memory.view(torch.uint8)
        outside = torch.ones(self.memory.shape, dtype=torch.bool)
        outside.as_strided(self.shape, *self.layout).fill_(False)
        return self.memory[outside].view(torch.uint8)


def copied(given: dict[str, Placed]) -> dict[str, Placed]:
    """The same numbers in other memory; what shares memory still does."""
    out, known = {}, dict[int, Placed]()
    for name, placed in given.items():
        if id(placed.memory) not in known:
            known[id(placed.memory)] = placed.copy()
        out[name] = placed._replace(memory=known[id(placed.memory)].memory)
    return out


def drawn_layout(draw: Draw, name: str, shape: tuple[int, ...]) -> Layout:
    """Strides and offset of a layout for a shape."""
    if not shape:
        return Layout((), draw.integer(0, 3))
    width, offset = shape[-1], 0
    order = list(range(len(shape)))  # from the slowest axis to the fastest
    gaps, fastest = [0] * len(shape), 1
    if name in ("offset", "gaps everywhere"):
        offset = draw.integer(1, 19)
    if name == "wide rows":
        gaps[-1] = draw.integer(1, 40)
    elif name == "permuted axes":
        order = [*draw.shuffled(order[:-1]), order[-1]]
        gaps = [draw.integer(0, 3) for _ in shape]
    elif name == "gaps everywhere":
        gaps = [draw.integer(0, 9) for _ in shape]
    elif name == "strided columns":
        fastest = draw.integer(2, 3)
    elif name == "columns first":
        order = [order[-1], *draw.shuffled(order[:-1])]
    elif name == "overlapping" and len(shape) > 1:
        gaps[-1] = -draw.integer(1, max(1, width - 1))
    elif name == "far apart":
        gaps[order[0]] = 0
    strides, extent = [0] * len(shape), fastest
    for axis in reversed(order):
        strides[axis] = extent
        extent = max(extent * shape[axis] + gaps[axis] * fastest, 1)
    if name == "expanded":
        for axis in range(len(shape) - 1 if len(shape) > 1 else 1):
            if draw.integer(0, 1) or axis == 0:
                strides[axis] = 0
    elif name == "expanded columns":
        strides[-1] = 0
    elif name == "far apart" and len(shape) > 1:
        strides[0] = FAR
    return Layout(tuple(strides), offset)


def extent_of(shape: tuple[int, ...], layout: Layout) -> int:
    """How many elements memory must have."""
    if 0 in shape:
        return layout.offset
    return layout.offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, layout.strides, strict=True))


def place(draw: Draw, values: Tensor, what: str, names: dict[str, float] = LAYOUTS) -> Placed:
    """The values in a layout; where several places are one, the last value that was written counts for all."""
    shape = tuple(values.shape)
    name = draw.choice(f"layout of {what}", tuple(names), tuple(names.values()))
    if name == "far apart" and (len(shape) < 2 or 0 in shape or not 2 <= shape[0] <= 3 or values.dtype.itemsize > 4):
        name = "gaps everywhere"
    layout = drawn_layout(draw, name, shape)
    if name == "far apart":
        memory = _far_memory(extent_of(shape, layout), values.dtype)
    else:
        memory = _nonsense(extent_of(shape, layout) + draw.integer(0, 5), values.dtype)
    placed = Placed(memory, shape, layout)
    if 0 not in shape:
        _write(placed, values)
    return placed


def _write(placed: Placed, values: Tensor) -> None:
    """Row after row, so that it is known who wrote last where rows overlap."""
    places = torch.full(placed.shape, placed.layout.offset)
    for axis, (size, stride) in enumerate(zip(placed.shape, placed.layout.strides, strict=True)):
        places += (torch.arange(size) * stride).view(-1, *[1] * (len(placed.shape) - 1 - axis))
    if not placed.shape:
        placed.memory[places] = values
    else:
        width = placed.shape[-1]
        for row, numbers in zip(places.view(-1, width), values.reshape(-1, width), strict=True):
            if placed.layout.strides[-1] == 0:
                row, numbers = row[:1], numbers[:1]
            placed.memory[row] = numbers


def _nonsense(count: int, dtype: torch.dtype) -> Tensor:
    """What nobody may read: it would show."""
    if dtype.is_floating_point:
        return torch.full((count,), torch.nan, dtype=dtype)
    if dtype == torch.bool:
        return torch.arange(count) % 2 == 0
    return torch.full((count,), torch.iinfo(dtype).max, dtype=dtype)


def _far_memory(count: int, dtype: torch.dtype) -> Tensor:
    """Gigabytes of addresses, of which only what is written takes memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)

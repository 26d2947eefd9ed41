"""Batches of completions, from several batches or from several processes, as one.

A batch is a tensor with a row per completion, ``[B]`` or ``[B, T]``, a dict or tuple of such batches, or None, which
stays None. Rows of ``[B, T]`` that are too short get zeros (False) at their end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:  # which comes with the trainers, and not with the operations
    from accelerate import Accelerator

V = TypeVar("V")


def united(parts: Sequence[V], unite: Callable[[Sequence[Tensor]], Tensor]) -> V:
    """One batch from several of one structure; ``unite`` is called for each tensor, with those of all batches.

    The order of the calls is that of the structure: processes that gather one tensor after the other agree on it.
    """
    first: Any = parts[0]
    several: Sequence[Any] = parts
    if isinstance(first, Tensor):
        one: Any = unite(several)
    elif isinstance(first, dict):
        one = {name: united([part[name] for part in several], unite) for name in first}
    elif isinstance(first, tuple):
        fields = [united(column, unite) for column in zip(*several, strict=True)]
        one = type(first)(*fields) if hasattr(first, "_fields") else tuple(fields)
    elif first is None:
        one = None
    else:
        raise TypeError(f"expected tensors, or dicts and tuples of them, got a {type(first).__name__}")
    return one


def joined(parts: Sequence[V]) -> V:
    """Several batches as one, the rows of the first before those of the second; padded to the longest row."""
    return united(parts, _concatenated)


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    return torch.cat([widened(part, width) for part in parts])


def widened(rows: Tensor, width: int) -> Tensor:
    """Rows [B, T, ...] with zeros at their end, [B, width, ...]."""
    behind = (0, 0) * (rows.dim() - 2)  # pad() counts axes from the last
    return torch.nn.functional.pad(rows, (*behind, 0, width - rows.shape[1]))


def gathered(batch: V, accelerator: Accelerator) -> V:
    """The rows of all processes, the same on each; padded to the longest row.

    Every process must call it, with as many rows.
    """
    if accelerator.num_processes == 1:
        return batch
    return united([batch], lambda tensors: _of_all_processes(tensors[0], accelerator))


def _of_all_processes(rows: Tensor, accelerator: Accelerator) -> Tensor:
    whole = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    if whole.dim() > 1:
        whole = accelerator.pad_across_processes(whole, dim=1)
    return accelerator.gather(whole.contiguous()).to(rows.dtype)


def of_this_process(count: int, accelerator: Accelerator) -> slice:
    """Where the ``count`` rows of this process lie among the gathered ones."""
    return slice(accelerator.process_index * count, (accelerator.process_index + 1) * count)

"""Whether a tensor's memory is still there: PyTorch lets a storage shrink, or be released, under the tensors in it."""

from __future__ import annotations

from torch import Tensor

LOST = "has lost memory: its storage has shrunk or was released"


def lost(t: Tensor) -> bool:
    """Whether the storage ends before the tensor does. To be asked of tensors that have one."""
    if t.is_contiguous():  # the common case, by one number that PyTorch holds
        size, offset = t.nbytes, t.storage_offset()
        begin = offset * t.itemsize if offset and size else 0
        return bool(begin + size > t.untyped_storage().nbytes())
    reach = t.storage_offset() + 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        reach += (size - 1) * stride
    return reach * t.itemsize > t.untyped_storage().nbytes()

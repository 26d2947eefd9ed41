"""The bytes of tensors that are alive while something runs, without memory for them: on shapes alone.

PyTorch's own tracker (`torch.distributed._tools.mem_tracker`) has the weights that autocast copies among the
activations; they are kept from one pass to the next, in the rollout too, and have to be told apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, each until the last tensor of it is gone.

    ``now`` and ``peak`` count all of them but those that were there before, the weights'. ``copies`` is the part of
    ``now`` that is weights in another dtype: those that autocast makes and keeps.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = [tensor.untyped_storage() for tensor in weights]  # or another could take the identity of one
        self._weights = {storage._cdata for storage in self._held}
        self._copied: set[int] = set()
        self._alive: dict[int, int] = {}
        self.now = self.peak = self.copies = self.most_copies = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_copy = function is torch.ops.aten._to_copy.default and self._is_weight(args[0])
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), is_copy)
        return result

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._weights

    def _add(self, storage: torch.UntypedStorage, is_copy: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights or key in self._alive:
            return
        self._alive[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        if is_copy:
            self._copied.add(key)
            self.copies += size
            self.most_copies = max(self.most_copies, self.copies)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        size = self._alive.pop(key)
        self.now -= size
        if key in self._copied:
            self._copied.remove(key)
            self.copies -= size


@contextmanager
def on_shapes(model: nn.Module) -> Iterator[LiveBytes]:
    """Operations of the body run on shapes alone; the counter, to be entered by the body, leaves the weights out.

    Gradients of the model's parameters are dropped as they appear, and its own stay as they were: a body may
    differentiate. RuntimeError from the body where a shape depends on a number.
    """
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    parameters = list(model.parameters())
    mode = detect_fake_mode(parameters) or FakeTensorMode(allow_non_fake_inputs=True)  # weights may be shapes already
    gradients = [parameter.grad for parameter in parameters]

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in parameters if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    try:
        with mode:
            held = [*parameters, *model.buffers()]
            yield LiveBytes([*held, *(mode.from_tensor(tensor) for tensor in held)])
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

"""Whether anything but autograd would see a call of an operator.

The dispatcher of torch is what lets others take part in a call: torch.compile and torch.export, modes such as
FakeTensorMode, make_fx and FlopCounterMode, the transforms of torch.func, the tracer of torch.jit, subclasses of Tensor
such as DTensor. It costs about 50 times a small addition, more than many a kernel. In plain eager mode nobody is there,
and a call may go straight to its function.

What the dispatcher would do is read from what it reads itself: the keys of the thread and those of the tensors.

Here is, too, whether autograd would see that a tensor which it saved has been overwritten: not through a hook, and not
in a backward pass that is compiled.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cmdp_fast.compiling import constant

_Key = torch._C.DispatchKey


def _keys(*names: str) -> torch._C.DispatchKeySet:
    keys = torch._C.DispatchKeySet(_Key.Undefined)
    for name in names:
        keys = keys.add(getattr(_Key, name))
    return keys


# Keys under which an operator of ours does nothing beside its function and its gradient. It has no rule for autocast.
_OF_A_THREAD = _keys("BackendSelect", "ADInplaceOrView")
_OF_A_TENSOR = _keys("Dense", "AutogradFunctionality", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA")
_DEVICES = ("cpu", "cuda")
_CLASSES = (Tensor, torch.nn.Parameter)

# Whether a set of keys is nothing beside those, by its bits: there are but few sets.
_plain_threads: dict[int, bool] = {}
_plain_tensors: dict[int, bool] = {}


def unobserved(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call with these tensors would reach its function by way of nothing but autograd."""
    included = torch._C._dispatch_tls_local_include_set()
    plain = _plain_threads.get(included.raw_repr())
    if plain is None:
        plain = _plain_threads[included.raw_repr()] = _within(included, _OF_A_THREAD)
    if not plain or torch._C._len_torch_function_stack() or forward_mode():
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _CLASSES:
            return False
        bits = torch._C._dispatch_keys(t).raw_repr()
        plain = _plain_tensors.get(bits)
        if plain is None:
            plain = _plain_tensors[bits] = _is_plain(t)
        if not plain:
            return False
    return True


def _is_plain(t: Tensor) -> bool:  # of all tensors with its keys, which tell the device too
    return t.device.type in _DEVICES and _within(torch._C._dispatch_keys(t), _OF_A_TENSOR)


def _within(keys: Any, allowed: Any) -> bool:
    return (keys - allowed).highestPriorityTypeId() == _Key.Undefined


def transformed() -> bool:
    """Whether a transform of torch.func, such as grad or vmap, is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode() -> bool:
    """Whether tangents are computed along with values."""
    return forward_ad._current_level >= 0


def any_tangent(arguments: Iterable[Any]) -> bool:
    """Whether one of an operator's arguments has a tangent. May be asked inside of its kernel."""
    if not forward_mode():
        return False
    with torch._C._SetExcludeDispatchKeyGuard(_Key.AutogradFunctionality, False):
        try:
            return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in arguments)
        except RuntimeError:  # beneath a transform of torch.func, which keeps tangents to itself
            return False


def transforms_of(t: Tensor) -> list[str]:
    """What the transforms of torch.func that are under way make of a tensor, the inner ones first: ``vmap`` a batch of
    it, ``grad`` a variable, ``jvp`` one with a tangent. Each is asked with those inside it out of the way: it alone
    knows its wrapper."""
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

    functorch, found = torch._C._functorch, []
    kinds = functorch.TransformType
    with contextlib.ExitStack() as popped:
        for level in reversed(functorch.get_interpreter_stack() or []):
            if functorch.maybe_get_level(t) == level.level():
                kind = level.key()
                if kind == kinds.Vmap:
                    found.append("vmap")
                elif kind == kinds.Grad and t.requires_grad:
                    found.append("grad")
                elif kind == kinds.Jvp and forward_ad.unpack_dual(t).tangent is not None:
                    found.append("jvp")
                t = functorch.get_unwrapped(t)
            popped.enter_context(temporarily_pop_interpreter_stack())
    return found


@constant
def forward_mode_in_graph() -> bool:
    """`forward_mode`, as a graph asks while it is made."""
    return forward_mode()


@constant
def gradient_in_graph() -> bool:
    """Whether a gradient of torch.func is under way, as a graph asks while it is made."""
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or []]
    return torch._C._functorch.TransformType.Grad in kinds


def autograd_excluded() -> bool:
    """Whether this thread is inside the kernel of an operator, where nothing is recorded for a gradient."""
    return torch._C._dispatch_tls_local_exclude_set().has(_Key.AutogradFunctionality)


# From PyTorch 2.8 on. It is private, and may be gone one day.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def saves_through_hooks() -> bool:
    """Whether a tensor that autograd saves now goes through hooks: in a checkpoint that is not reentrant, or where
    activations are offloaded.

    Autograd compares the version of what it saved itself, and never of what a hook hands back. All that a checkpoint
    recomputes is handed back so, and several operations may be given the same memory.
    """
    if not torch.is_grad_enabled():
        return False
    if _top_hooks is not None:
        return _top_hooks(False) is not None
    saved: Any = torch.ones((), requires_grad=True, device="cpu").exp().grad_fn
    try:
        saved._raw_saved_result.register_hooks(_unchanged, _unchanged)
    except RuntimeError:  # it has some already
        return True
    return False


def _unchanged(t: Tensor) -> Tensor:
    return t


def backward_is_compiled() -> bool:
    """Whether this backward pass is a graph of compiled autograd, which compares no versions."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    return compiled is not None and getattr(compiled, "in_compiled_autograd_region", True)

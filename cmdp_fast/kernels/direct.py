"""A kernel that finds what was compiled for it by a short way.

At every launch Triton's JIT binds the arguments, specialises each of them and looks the result up with a string of all
options, which for a few rows takes longer than the kernel runs. `direct` keeps what the JIT has returned under a key of
its own, and launches that.

Why it cannot take a kernel that was compiled for other arguments: the key tells apart all that Triton (3.4 to 3.9, on
NVIDIA's GPUs) specialises on, and more. Of a tensor it has the dtype and the address modulo 16. Of an integer or a bool
it has the type and the value, where Triton looks at its length, and whether it is 1 or divisible by 16. Of anything
else it has the type, None among them, and the value of a `tl.constexpr`. A float is never specialised on its value. To
these come all keyword arguments, the device and the driver. AMD's specialisation also looks at the sizes of tensors:
there, and in the interpreter, every launch is the JIT's. Hooks of a launch are called either way. A knob that changes
how kernels are compiled counts until a kernel's first launch.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Keys that a kernel remembers at most: integers count by value, so that a number of rows may have its own.
ROOM = 4096


def direct(kernel: Any) -> Any:
    """A `triton.jit` kernel that is launched as before, ``kernel[grid](*arguments, **keywords)``, in less time.

    ``grid`` has one axis. The keywords are the kernel's last parameters, if any, and options of the compiler.
    """
    return Direct(kernel) if type(kernel) is JITFunction else kernel


class Direct:
    """See `direct`."""

    def __init__(self, kernel: JITFunction):
        self.kernel, self.names = kernel, kernel.arg_names
        self.compiled: dict[tuple[object, ...], CompiledKernel] = {}

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *arguments, **keywords: self.launch(grid[0], arguments, keywords)

    def launch(self, programs: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        gpu = driver.active
        parts: list[object] = [gpu, gpu.get_current_device(), *keywords.items(), *map(type, keywords.values())]
        describe(arguments, parts)
        key = tuple(parts)
        compiled = self.compiled.get(key)
        if compiled is not None and not self.kernel.pre_run_hooks:
            last = [keywords[name] for name in self.names[len(arguments) :]]
            compiled[(programs, 1, 1)](*arguments, *last)
            return
        compiled = self.kernel[(programs,)](*arguments, **keywords)
        # What was only compiled, for a look at its code, has no module: it cannot be launched.
        launched = type(compiled) is CompiledKernel and compiled.module is not None
        if launched and compiled.metadata.target.backend == "cuda":
            if len(self.compiled) >= ROOM:
                self.compiled.clear()
            self.compiled[key] = compiled


def describe(values: tuple[Any, ...], key: list[object]) -> None:
    """Appends to a key all that a kernel may be compiled for: see the top of this file."""
    for value in values:
        kind = type(value)
        try:
            way = _ways[kind]
        except KeyError:
            way = _way_of(kind)
        if way is TENSOR:
            key += (value.dtype, value.data_ptr() & 15)
        elif way is FLOAT:
            key.append(kind)
        elif way is NUMBER:
            key += (kind, value)
        elif way is CONSTANT:
            key += (kind, type(value.value), value.value)
        elif value and type(value[0]) is tl.constexpr:
            key.append(_kept(value))
        elif way is INTEGERS:
            key += (value, *map(type, value))  # True is equal to 1, but another argument
        else:
            key += (kind, len(value))
            describe(value, key)


# How a type of argument is described. By identity, not in an Enum, whose members take longer to find.
TENSOR, FLOAT, NUMBER, CONSTANT, INTEGERS, TUPLE = "tensor", "float", "number", "constant", "integers", "tuple"
_ways: dict[type, str] = {float: FLOAT, int: NUMBER, bool: NUMBER, type(None): NUMBER, tl.constexpr: CONSTANT}


def _way_of(kind: type) -> str:
    """The way of a type seen for the first time."""
    if issubclass(kind, Tensor):
        way = TENSOR
    elif issubclass(kind, float):
        way = FLOAT
    elif issubclass(kind, int):
        way = NUMBER
    elif not issubclass(kind, tuple):
        raise TypeError(f"a kernel takes tensors, numbers, None and tuples of these, got a {kind.__name__}")
    elif hasattr(kind, "_fields") and all(hint is int for hint in get_type_hints(kind).values()):
        way = INTEGERS  # as a whole it is as good a key as its parts
    else:
        way = TUPLE
    _ways[kind] = way
    return way


# Tuples of constants, by identity: to compare them costs more than all other arguments together. A tuple that is kept
# here is alive, so that no other has its identity.
_constants: dict[int, tuple[tuple[Any, ...], tuple[object, ...]]] = {}


def _kept(constants: tuple[Any, ...]) -> object:
    """What stands for a tuple of constants."""
    held = _constants.get(id(constants))
    if held is None:
        if len(_constants) >= ROOM:
            _constants.clear()
        held = constants, (type(constants), *((type(c.value), c.value) for c in constants))
        _constants[id(constants)] = held
    return held[1]

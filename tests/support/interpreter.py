"""Triton's interpreter, made quick enough for a test suite, and to round as a GPU does.

At every call of a helper from a kernel the interpreter looks through all of `triton.language` for functions to replace,
although the launch has replaced them already; nine tenths of the time go there. Here it looks once a launch. Under
which names a module knows the language, and how a type is stored, it looks up once.

Before Triton 3.9 its `tl.fma` multiplies and adds, and rounds twice. Compiled code of every version rounds once
(fma.rn.f32), and the kernels count on it: where all logits are far from 0, the rounding of L x would be all that is
left of L x - M. Here it rounds once.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def look_once_a_launch() -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    named: dict[int, tuple[str, ...]] = {}  # of the names of a module, which stay where they are
    looked: dict[tuple[str, ...], Any] = {}

    def languages_of(names):
        return tuple(sorted(k for k, v in names.items() if v in (interpreter.tl, interpreter.tl.core)))

    def patch_once(function):
        names = function.__globals__
        languages = named.get(id(names))
        if languages is None:
            languages = named[id(names)] = languages_of(names)
        if languages not in looked:
            looked[languages] = patch(function)
        return looked[languages]

    def launch_afresh(self, *args, **settings):
        looked.clear()
        return launch(self, *args, **settings)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh


def look_types_up_once() -> None:
    """By the name of a block's elements: pointers and blocks have no hash."""
    stored_as, known = interpreter._get_np_dtype, dict[str, np.dtype]()

    def stored_as_once(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = stored_as(kind)
        return known[name]

    interpreter._get_np_dtype = stored_as_once


def round_once() -> None:
    """Float32 alone: the kernels fuse nothing else. The sum in double is rounded once more, which shows in float32 in
    one case of 2^29 or so."""
    fused = interpreter.InterpreterBuilder.create_fma

    def fma(self, x, y, z):
        if z.data.dtype != np.float32:
            return fused(self, x, y, z)
        total = x.data.astype(np.float64) * y.data + z.data  # a product of two float32 is exact in double
        return interpreter.TensorHandle(total.astype(np.float32), z.dtype.scalar)

    if not rounds_once(fused):
        interpreter.InterpreterBuilder.create_fma = fma


def rounds_once(fused) -> bool:
    """(1 + e)^2 - (1 + 2e) is e^2, of which nothing is left where the product is rounded."""
    e = 2.0**-12
    x, z = (interpreter.TensorHandle(np.array([v], np.float32), tl.float32) for v in (1 + e, -1 - 2 * e))
    return fused(interpreter.InterpreterBuilder(), x, x, z).data[0] == e * e

"""What code needs that torch.compile may trace: marks for functions, without an import of the tracer, and a detour.

The decorators of `torch.compiler` import `torch._dynamo` where they stand: 890 modules, as much time as torch itself
takes and 144 MiB, in each process that only imports this package. Most of them compile nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Record = TypeVar("Record", bound=tuple[Any, ...])  # a NamedTuple


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """As `torch.compiler.assume_constant_result`: a graph calls it while it is made, and keeps the result."""
    marked: Any = function
    marked._dynamo_marked_constant = True  # the whole of that decorator, from torch 2.8 to 2.14
    return function


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """As `torch.compiler.disable`, from the first call on in a process that has the tracer."""
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:  # so nobody watches frames
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    marked: Any = call
    marked._torchdynamo_disable = True  # a graph ends in front of it and does not look inside
    marked._torchdynamo_disable_msg = None
    _without_a_graph(marked.__code__)  # Python then calls it: its own frame is nothing to make a graph of
    return call


def _without_a_graph(code: CodeType) -> None:
    """As `torch._dynamo.eval_frame.skip_code`, from torch 2.8 to 2.14: frames that this one calls may have graphs."""
    with contextlib.suppress(AttributeError, TypeError):  # in a later torch: then there is one graph break more
        watcher: Any = torch._C._dynamo.eval_frame
        passed_over = watcher._FrameExecStrategy(watcher._FrameAction.SKIP, watcher._FrameAction.DEFAULT)
        watcher.set_code_exec_strategy(code, passed_over)


def replaced(record: Record, **fields: Any) -> Record:
    """As ``record._replace(**fields)``, which torch 2.8 does not trace into."""
    kind: Any = type(record)
    values = [fields.get(name, value) for name, value in zip(kind._fields, record, strict=True)]
    return cast(Record, kind(*values))


def varies(number: Any) -> bool:
    """Whether a number is no constant of the graph that is being made, but any number that it will be called with."""
    if isinstance(number, Tensor):  # in the trace of a backward pass
        return True
    return (
        number is not None
        and torch.compiler.is_compiling()
        and not torch.fx.experimental.symbolic_shapes.has_static_value(number)
    )


def in_tensor(number: Any) -> Tensor:
    """A number as a float64 scalar on the CPU.

    By a product: a graph that keeps a number variable keeps it so in the arithmetic of tensors alone. `torch.full` or
    `torch.tensor` would make it a constant, and each new value a new graph.
    """
    return number if isinstance(number, Tensor) else torch.ones((), dtype=torch.float64, device="cpu") * number

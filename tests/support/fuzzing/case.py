"""A case: an operation, what it is given, and what must be true of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fuzzing.draws import Draw
from fuzzing.layouts import Placed

Tensors = dict[str, Tensor]


@dataclass
class Case:
    """``call(tensors, backend)`` gives named outputs; ``truth(tensors)`` what they should be, in the dtype of the
    tensors that it is given."""

    operation: str
    call: Callable[[Tensors, str | None], Tensors]
    given: dict[str, Placed]
    settings: dict[str, Any]
    truth: Callable[[Tensors], Tensors] | None = None
    computed: torch.dtype = torch.float32  # of the outputs
    precision: torch.dtype | None = None  # to which outputs are exact, if it is not the one computed
    nan_gradient_is_free: bool = False  # rows in which the true gradient has a NaN may have any
    widened: tuple[str, ...] = ()  # what the truth is given in float64, or for eager in the dtype computed
    leaves: tuple[str, ...] = ()  # what gets a gradient
    upstream: Tensors = field(default_factory=dict)  # by the name of the output
    kinds: list[str] | None = None  # of the rows of each output: errors are compared among rows of a kind
    # Of the exact outputs: how large the terms of a gradient are, and [*rows] those of an output, if more than 1.
    sizes: Callable[[Tensors], Tensors] | None = None
    value_sizes: Callable[[Tensors], Tensors] | None = None
    terms: int = 1
    free_shapes: tuple[str, ...] = ()  # outputs without an entry per row
    rows: tuple[int, ...] = ()  # the leading axes that per-row arguments have
    by_row: tuple[str, ...] = ()  # arguments with an entry per row; empty: rows do not stand alone
    garbage: Callable[[Tensors], Tensors] | None = None  # the arguments with nonsense where the mask is False
    mask: str | None = None
    overwrites: str | None = None  # an argument that the backward pass may overwrite
    layout_matters: bool = False  # where a product of PyTorch's may round otherwise
    also: Callable[[Tensors, Tensors, str], None] | None = None  # (arguments, outputs, backend): more laws
    public: Callable[[dict[str, Any], dict[str, Any]], Any] | None = None  # the call with some settings changed
    needs: str = ""  # the backends' name of the operation
    float64_logits: bool = False  # so that the GPU backends refuse it
    threads: tuple[int, int] = (1, 1)
    draw: Draw | None = None

    def describe(self) -> str:
        lines = [f"{self.operation}({', '.join(f'{name}={shown(value)}' for name, value in self.settings.items())})"]
        for name, placed in self.given.items():
            where = f"strides {list(placed.layout.strides)}, offset {placed.layout.offset}"
            lines.append(f"  {name}: {str(placed.memory.dtype).removeprefix('torch.')}{list(placed.shape)}, {where}")
        if self.kinds is not None:
            lines.append(f"  rows: {' | '.join(self.kinds)}")
        if self.leaves:
            flowing = ", ".join(f"{name} {said(g)}" for name, g in self.upstream.items())
            lines.append(f"  gradient of {', '.join(self.leaves)} from {flowing}")
        return "\n".join([*lines, f"  threads {self.threads[0]} and {self.threads[1]}"])


def shown(value: Any) -> str:
    return f"tensor({value.tolist()}, {value.dtype})" if isinstance(value, Tensor) else repr(value)


def said(gradient: Tensor) -> str:
    what = "zeros" if not gradient.any() else "numbers"
    return f"{what} of strides {list(gradient.stride())}"


@dataclass
class Outcome:
    outputs: Tensors
    gradients: Tensors

    def everything(self) -> Tensors:
        return {**self.outputs, **{f"gradient of {name}": g for name, g in self.gradients.items()}}


def evaluate(
    case: Case, tensors: Tensors, backend: str | None = None, upstream: Tensors | None = None, call: Any = None
) -> Outcome:
    """The outputs of a call, and the gradients of what gets one."""
    upstream = case.upstream if upstream is None else upstream
    leaves = {name: tensors[name].detach().requires_grad_() for name in case.leaves}
    outputs = case.call({**tensors, **leaves}, backend) if call is None else call({**tensors, **leaves})
    gradients = {}
    if leaves and upstream:
        flowing = [(outputs[name], g.to(outputs[name].dtype)) for name, g in upstream.items()]
        found = torch.autograd.grad([o for o, _ in flowing], list(leaves.values()), [g for _, g in flowing])
        gradients = dict(zip(leaves, found, strict=True))
    return Outcome({name: o.detach() for name, o in outputs.items()}, gradients)


def drawn_upstream(draw: Draw, names: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    """A gradient for some of the outputs: numbers, zeros, one number for all rows, numbers that lie apart."""
    chosen = [name for name in names if draw.chance(f"upstream of {name}", 0.7)] or [draw.choice("upstream", names)]
    made = {}
    for name in chosen:
        kind = draw.choice("upstream gradient", ("numbers", "zeros", "some zeros", "expanded", "apart"))
        numbers = draw.normal(*shape).to(dtype)
        if kind == "zeros":
            numbers = torch.zeros_like(numbers)
        elif kind == "some zeros":
            numbers = numbers * draw.mostly(0.5, *shape)
        elif kind == "expanded":
            numbers = draw.normal().to(dtype).expand(shape)
        elif kind == "apart" and shape:
            apart = torch.full((*shape, 3), torch.nan, dtype=dtype)[..., 1]
            numbers = apart.copy_(numbers)
        made[name] = numbers
    return made


def drawn_threads(draw: Draw) -> tuple[int, int]:
    return 1, draw.choice("threads", range(1, 9))

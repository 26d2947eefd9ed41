"""A variant is one implementation of a case. Functions of tensors become variants here, which can be timed and checked.

The values of a variant are named, so that they can be compared with the truth and with one another. ``reverse_kl`` is
a statistic [rows], ``mean reverse_kl`` its mean, and ``gradient of logprob + reverse_kl`` the gradient that a backward
pass from that sum gives the logits (``hidden gradient of`` and ``head gradient of`` for other leaves).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Values = dict[str, Tensor]
Function = Callable[[Inputs], Values]

LOGITS = {"": "student"}  # leaves that get a gradient: a name before "gradient of", and the input's own
HIDDEN_AND_HEAD = {"hidden ": "student_hidden", "head ": "student_weight"}


class Absent(Exception):
    """A peer has no variant of this case; the message is the reason."""


@dataclass(frozen=True)
class Variant:
    """One implementation.

    ``run`` is timed. It takes the result of ``prepare``, which is called right before it (None: the inputs themselves).
    Neither changes the inputs, which all variants share. ``values`` picks the named values from the output of ``run``;
    they are checked, and counted as its outputs. ``phases`` gives the seconds of the parts of the last run.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[Inputs], Any] | None = None
    values: Callable[[Any], Values] = lambda output: output
    lacks: str = ""  # the values that it does not compute, in words
    peer: str = ""  # the name of its peer; empty: ours
    phases: Callable[[Any], dict[str, float]] | None = None

    def state(self, inputs: Inputs) -> Any:
        """The argument of ``run``."""
        return inputs if self.prepare is None else self.prepare(inputs)


def differentiable(
    mode: str,
    name: str,
    function: Function,
    terms: Sequence[str],
    leaves: Mapping[str, str] = LOGITS,
    *,
    lacks: str = "",
    peer: str = "",
) -> Variant:
    """A variant that runs a function of the inputs in a mode. A backward pass starts from the sum of ``terms``.

    forward: without a gradient. backward: the backward pass alone, after a forward pass that is not timed. both: the
    two. inplace: as both, on logits made for this run alone, since the gradient may take their memory.
    """

    def forward(inputs: Inputs) -> tuple[Inputs, Values]:
        attached = {leaf: inputs[leaf].detach().requires_grad_() for leaf in leaves.values()}
        return attached, function(inputs | attached)

    def backward(state: tuple[Inputs, Values]) -> Values:
        attached, values = state
        total = torch.stack([values[term].sum() for term in terms]).sum()
        gradients = torch.autograd.grad(total, list(attached.values()))
        names = (f"{leaf}gradient of {' + '.join(terms)}" for leaf in leaves)
        return {k: v.detach() for k, v in values.items()} | dict(zip(names, gradients, strict=True))

    def alone(inputs: Inputs) -> Inputs:
        return inputs | {leaf: inputs[leaf].clone() for leaf in leaves.values()}

    if mode == "forward":
        return Variant(name, function, lacks=lacks, peer=peer)
    if mode == "backward":
        return Variant(name, backward, prepare=forward, lacks=lacks, peer=peer)
    prepare = alone if mode == "inplace" else None
    return Variant(name, lambda inputs: backward(forward(inputs)), prepare=prepare, lacks=lacks, peer=peer)


def evaluate(names: Sequence[str], function: Function, inputs: Inputs, leaves: Mapping[str, str] = LOGITS) -> Values:
    """The named values of a differentiable function that returns statistics by their plain names."""
    inputs = inputs | {leaf: inputs[leaf].detach().requires_grad_() for leaf in leaves.values()}
    found = function(inputs)

    def plain(name: str) -> Tensor:
        return found[name.removeprefix("mean ")].mean() if name.startswith("mean ") else found[name]

    values: Values = {}
    for name in names:
        before, is_gradient, expression = name.rpartition("gradient of ")
        if is_gradient:
            total = torch.stack([plain(term).sum() for term in expression.split(" + ")]).sum()
            values[name] = torch.autograd.grad(total, inputs[leaves[before]], retain_graph=True)[0]
        else:
            values[name] = plain(name).detach()
    return values

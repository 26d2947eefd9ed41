"""torch.compile (Inductor) of the eager code, for the exact shape of a case."""

from __future__ import annotations

import types

import torch

from cmdp_fast.bench.case import Case
from cmdp_fast.bench.peers import eager
from cmdp_fast.bench.variant import HIDDEN_AND_HEAD, LOGITS, Function, Variant, differentiable

OPS = eager.OPS
NAME = "torch.compile"


def compiled(function: Function) -> Function:
    """A function of tensors by name, compiled for static shapes and the present number of threads.

    torch.compile keeps its graphs with the function's code. A copy of the code starts without the graphs of other
    cases: they would be used again for another number of threads, and their number is limited.
    """
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, dynamic=False)


def variants(case: Case) -> list[Variant]:
    if case.op == "budget_trace":
        return [Variant(NAME, compiled(eager.budget_trace), lacks=eager.NO_FIRST, peer="compile")]
    if case.op == "constrained_reward":
        lacks = "no entropies, no log-probability of the teacher's, no forward KL"
        return [Variant(NAME, compiled(eager.constrained_reward), lacks=lacks, peer="compile")]
    if case.op == "divergence":
        return [differentiable(case.mode, NAME, compiled(eager.jsd), ("jsd",), LOGITS, peer="compile")]
    if case.op == "linear_divergence":
        name, function = f"logits in full, {NAME}", compiled(eager.linear_jsd)
        return [differentiable(case.mode, name, function, ("jsd",), HIDDEN_AND_HEAD, peer="compile")]
    linear = case.op == "linear_token_stats"
    name = f"logits in full, {NAME}" if linear else NAME
    function = compiled(eager.linear_reverse_kl if linear else eager.reverse_kl)
    leaves = HIDDEN_AND_HEAD if linear else LOGITS
    return [differentiable(case.mode, name, function, ("reverse_kl",), leaves, lacks=eager.LACKS_FIVE, peer="compile")]

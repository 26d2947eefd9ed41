"""Marks that torch.compile reads, made without its tracer: they are those of torch's own decorators."""

from typing import NamedTuple

import pytest
import torch

from cmdp_fast.compiling import constant, replaced, untraced


def plain(x):
    return x + 1


def test_a_constant_has_torchs_own_mark():
    of_torch = torch.compiler.assume_constant_result(lambda: 1)
    assert vars(constant(lambda: 1)) == vars(of_torch)


def test_a_constant_is_called_while_a_graph_is_made():
    torch.compiler.reset()
    calls = []

    @constant
    def two():
        calls.append(torch.compiler.is_compiling())
        return 2

    compiled = torch.compile(lambda x: x * two(), fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(calls) == 1


def test_an_untraced_function_is_in_no_graph():
    torch.compiler.reset()
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    @untraced
    def outside(x):
        """Its own."""
        return plain(x).sin()

    def both(x):
        return outside(x.cos()).exp()

    x = torch.rand(3)
    assert torch.equal(torch.compile(both, backend=keep)(x), both(x)) and outside.__doc__ == "Its own."
    assert [len(calls) for calls in graphs] in ([1, 1], [0, 0])  # methods are none
    torch.compiler.reset()
    with pytest.raises(Exception, match="disable"):
        torch.compile(both, backend="eager", fullgraph=True)(x)


@pytest.mark.filterwarnings("error")
def test_an_untraced_function_costs_one_graph_break_and_no_warning():
    """The frame of the wrapper itself is not traced: torch warns of what it finds there."""
    from torch._dynamo.utils import counters  # not above: a process without the tracer is tried too

    torch.compiler.reset()
    counters.clear()

    @untraced
    def outside(x):
        return x.sin()

    def both(x):
        return outside(x).sum() * 2

    x = torch.rand(3)
    assert torch.equal(torch.compile(both, backend="eager")(x), both(x))
    assert sum(counters["graph_break"].values()) == 1, counters["graph_break"]


@pytest.mark.parametrize("moved", ["_dynamo", "eval_frame"])
def test_a_torch_without_the_private_call_costs_no_more_than_a_graph_break(moved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(*((torch._C, moved) if moved == "_dynamo" else (torch._C._dynamo, moved)))
        outside = untraced(torch.sin)
    x = torch.rand(3)
    assert torch.equal(outside(x), x.sin())


class Record(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor | None
    name: str


def test_a_field_is_replaced_in_a_graph():
    def changed(x):
        return replaced(Record(x, x, "a"), right=None, name="b")

    x = torch.rand(2)
    for found in (changed(x), torch.compile(changed, fullgraph=True, backend="eager")(x)):
        assert type(found) is Record and found[1:] == (None, "b") and torch.equal(found.left, x)

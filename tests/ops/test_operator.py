"""Operators that are declared as a function of one NamedTuple: names, schema, gradients by name, compiled graphs."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.cpu import native
from cmdp_fast.ops import operator as operators
from cmdp_fast.ops.arguments import flatten, leaves
from cmdp_fast.ops.operator import Backward, operator


class Factors(NamedTuple):
    left: Tensor
    right: Tensor | None


class Given(NamedTuple):
    of: Factors
    power: float
    shift: int


class Parts(NamedTuple):
    total: Tensor


class Made(NamedTuple):
    product: Tensor
    parts: Parts


class Kept(NamedTuple):
    of: Factors
    power: float


@operator("test_product")
def product(given: Given) -> Made:
    left, right = given.of
    value = left**given.power * (1.0 if right is None else right) + given.shift
    return Made(value, Parts(value.sum()))


@product.shapes
def _(given: Given) -> Made:
    return Made(torch.empty_like(given.of.left), Parts(given.of.left.new_empty(())))


@product.gradient(of=("product",), keep=lambda given, made: Kept(given.of, given.power))
def _(backward: Backward[Kept]) -> dict[str, Tensor]:
    (upstream,), ((left, right), power) = backward.upstream, backward.kept
    one = torch.ones_like(left) if right is None else right
    gradients = {"of_left": upstream * one * power * left ** (power - 1), "of_right": upstream * left**power}
    return {name: value for name, value in gradients.items() if name in backward.needed}


@operator("test_double_", mutates="of_left")
def double_(given: Given) -> None:
    given.of.left.mul_(2)


@double_.shapes
def _(given: Given) -> None:
    return None


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_schema_names_every_argument_by_the_fields_that_lead_to_it():
    assert [leaf.name for leaf in leaves(Given)] == ["of_left", "of_right", "power", "shift"]
    schema = str(torch.ops.cmdp_fast.test_product.default._schema)
    assert schema == (
        "cmdp_fast::test_product(Tensor of_left, Tensor? of_right, float power, SymInt shift, Tensor? numbers=None, "
        'str revision="") -> (Tensor, Tensor)'
    )
    assert "(Tensor(a!) of_left" in str(torch.ops.cmdp_fast.test_double_.default._schema)
    assert flatten(Given(Factors("l", "r"), 2.0, 1)) == ["l", "r", 2.0, 1]


def test_what_no_schema_knows_is_an_error_where_it_is_declared():
    class Wrong(NamedTuple):
        sizes: dict

    with pytest.raises(TypeError, match="an operator takes no <class 'dict'>"):
        list(leaves(Wrong))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_reach_the_arguments_that_are_named(needs):
    left, right = numbers(2.0, 3.0).requires_grad_(needs[0]), numbers(5.0, 7.0).requires_grad_(needs[1])
    made = product(Given(Factors(left, right), 2.0, 1))
    assert made.product.tolist() == [21.0, 64.0] and made.parts.total == 85.0
    assert made.product.requires_grad and not made.parts.total.requires_grad
    made.product.sum().backward()
    assert left.grad is None if not needs[0] else left.grad.tolist() == [20.0, 42.0]
    assert right.grad is None if not needs[1] else right.grad.tolist() == [4.0, 9.0]


def test_torch_accepts_them_and_traces_through():
    for right in (None, numbers(5.0, 7.0).requires_grad_()):
        left = numbers(2.0, 3.0).requires_grad_()
        torch.library.opcheck(torch.ops.cmdp_fast.test_product.default, (left, right, 2.0, 1))
    torch.library.opcheck(torch.ops.cmdp_fast.test_double_.default, (numbers(1.0), None, 1.0, 0))

    def loss(left, shift):
        return product(Given(Factors(left, None), 2.0, shift)).product.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for shift in (1, 4):
        left = numbers(2.0, 3.0).requires_grad_()
        value = compiled(left, shift)
        value.backward()
        assert value.item() == 13.0 + 2 * shift and left.grad.tolist() == [4.0, 6.0]


def test_what_the_backward_pass_kept_must_not_have_been_overwritten():
    left = numbers(2.0, 3.0).requires_grad_() * 1
    made = product(Given(Factors(left, None), 2.0, 0))
    double_(Given(Factors(left.detach(), None), 1.0, 0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.product.sum().backward()


@pytest.mark.skipif(native is None, reason="the native module is not built")
def test_a_graph_names_the_operators_it_was_made_for():
    """So that what torch.compile has left on disk is not taken for calls of operators that have changed since."""
    seen = []

    def record(graph, inputs):
        seen.extend(node.args[-1] for node in graph.graph.nodes if "token_stats" in str(node.target))
        return graph.forward

    x, tokens = torch.randn(2, 5), torch.zeros(2, dtype=torch.long)
    torch.compile(lambda x: cf.token_stats(x, x, tokens, backend="cpu").entropy, fullgraph=True, backend=record)(x)
    assert seen == [operators.REVISION] and len(seen[0]) == 12  # another test may have imported the package anew

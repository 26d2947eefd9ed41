"""What torch.func and forward-mode AD get from an operation: the right derivative, or an error that says what to do."""

from typing import NamedTuple

import pytest
import torch
from helpers import here, make_logits
from torch.autograd import forward_ad

import cmdp_fast as cf
from cmdp_fast.cpu import native

SHAPE, WIDTH = (2, 3), 7
needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")


class Data(NamedTuple):
    logits: torch.Tensor
    teacher: torch.Tensor
    tokens: torch.Tensor
    reward: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor


def data() -> Data:
    teacher, weight = make_logits(*SHAPE, WIDTH, seed=1), make_logits(WIDTH, 5, seed=2)
    ids = here(torch.tensor([4, 0, 2]).expand(*SHAPE, 3).contiguous())
    logprobs = teacher.log_softmax(-1).gather(-1, ids)
    tokens = here(torch.tensor([[0, 1, 2], [6, 5, 4]]))
    logits, hidden = make_logits(*SHAPE, WIDTH), make_logits(*SHAPE, 5, seed=3)
    return Data(logits, teacher, tokens, make_logits(*SHAPE, seed=4), hidden, weight, ids, logprobs)


def token_stats(d, x, backend):
    stats = cf.token_stats(x, d.teacher, d.tokens, backend=backend)
    return (stats.reverse_kl + stats.entropy).sum()


def divergence(d, x, backend):
    return cf.divergence(x, d.teacher, backend=backend).sum()


def constrained_reward(d, x, backend):
    return cf.constrained_reward(x, d.teacher, d.tokens, d.reward, 1.0, backend=backend).stats.forward_kl.sum()


def topk_stats(d, x, backend):
    return cf.topk_stats(x, d.ids, d.logprobs, d.tokens, backend=backend).reverse_kl.sum()


def linear_token_stats(d, h, backend):
    return cf.linear_token_stats(h, d.weight, d.hidden, d.weight, d.tokens, backend=backend).reverse_kl.sum()


def linear_divergence(d, h, backend):
    return cf.linear_divergence(h, d.weight, d.hidden, d.weight, backend=backend).sum()


def linear_constrained_reward(d, h, backend):
    heads = (h, d.weight, d.hidden, d.weight)
    return cf.linear_constrained_reward(*heads, d.tokens, d.reward, 1.0, backend=backend).stats.forward_kl.sum()


def linear_topk_stats(d, h, backend):
    return cf.linear_topk_stats(h, d.weight, d.ids, d.logprobs, d.tokens, backend=backend).reverse_kl.sum()


OF_LOGITS = (token_stats, divergence, constrained_reward, topk_stats)
OF_HIDDEN = (linear_token_stats, linear_divergence, linear_constrained_reward, linear_topk_stats)
HAS_ALL_DERIVATIVES = (token_stats, divergence, constrained_reward)  # on the torch backend
JVP = "has no forward-mode derivative .*; use reverse mode"
ONCE = "has no derivative: the operations of cmdp_fast are differentiated once, in reverse mode"


@pytest.fixture(params=OF_LOGITS + OF_HIDDEN, ids=lambda f: f.__name__)
def operation(request, backend):
    """(name, function of one tensor, the tensor)"""
    f, d = request.param, data()
    if backend == "cuda" and f not in (token_stats, constrained_reward, topk_stats):
        pytest.skip("the cuda backend leaves this operation to triton")
    x = d.logits if f in OF_LOGITS else d.hidden + 0.1
    return f, lambda x: f(d, x, backend), x


def dual(f, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent


def other_derivatives(f, x, tangent):
    """Every derivative but one in reverse mode, as functions that give it."""
    wanted = x.clone().requires_grad_()

    def twice():
        (gradient,) = torch.autograd.grad(f(wanted), wanted, create_graph=True)
        return torch.autograd.grad((gradient * tangent).sum(), wanted)[0]

    forward = {
        "jvp": lambda: torch.func.jvp(f, (x,), (tangent,))[1],
        "jvp in no_grad": lambda: torch.no_grad()(torch.func.jvp)(f, (x,), (tangent,))[1],
        "dual numbers": lambda: dual(f, x, tangent),
        "dual numbers that need a gradient": lambda: dual(f, wanted, tangent),
        "jvp of vmap": lambda: torch.func.jvp(torch.func.vmap(f), (x[None],), (tangent[None],))[1][0],
        "jvp in grad": lambda: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (tangent,))[1])(x),
        "jacfwd": lambda: (torch.func.jacfwd(f)(x) * tangent).sum(),
    }
    second = {
        "twice": twice,
        "grad of grad": lambda: torch.func.grad(lambda x: (torch.func.grad(f)(x) * tangent).sum())(x),
        "jvp of vmap of grad": lambda: torch.func.jvp(
            torch.func.vmap(torch.func.grad(f)), (x[None],), (tangent[None],)
        )[1][0],
        "hessian": lambda: torch.einsum("ijkabc,ijk->abc", torch.func.hessian(f)(x), tangent),
        "functional.hessian": lambda: torch.autograd.functional.hvp(f, x, tangent)[1],
    }
    return forward, second


def test_what_is_not_in_reverse_mode_is_right_or_an_error(operation, backend):
    name, f, x = operation
    tangent = make_logits(*x.shape, seed=5)
    (gradient,) = torch.autograd.grad(f(wanted := x.clone().requires_grad_()), wanted)
    forward, second = other_derivatives(f, x, tangent)
    if backend == "torch" and name in HAS_ALL_DERIVATIVES:
        for what, derivative in forward.items():
            if what != "jvp in grad":
                assert torch.allclose(derivative(), (gradient * tangent).sum(), rtol=1e-4), what
        hvp = forward["jvp in grad"]()
        for what, derivative in second.items():
            assert torch.allclose(derivative(), hvp, rtol=1e-4, atol=1e-5), what
        return
    called = "token_stats" if name is constrained_reward and backend == "triton" else name.__name__
    called = called.replace("linear_constrained_reward", "linear_token_stats")
    for derivative in forward.values():
        with pytest.raises(NotImplementedError, match=rf"cmdp_fast\.({called}|constrained_reward) {JVP}"):
            derivative()
    for derivative in second.values():
        with pytest.raises(NotImplementedError, match=f"({ONCE})|({JVP})"):
            derivative()


def test_reverse_mode_of_torch_func_is_that_of_autograd(operation, backend):
    _, f, x = operation
    expected = torch.autograd.grad(f(wanted := x.clone().requires_grad_()), wanted)[0]
    other = torch.autograd.grad(f(wanted := (x * 2).requires_grad_()), wanted)[0]
    close = {"rtol": 1e-5, "atol": 1e-6}  # a reference is differentiated by other operations
    assert torch.allclose(torch.func.grad(f)(x), expected, **close)
    value, back = torch.func.vjp(f, x)
    assert torch.allclose(value, f(x)) and torch.allclose(back(torch.ones_like(value))[0], expected, **close)
    assert torch.allclose(torch.func.jacrev(f)(x), expected, **close)
    both = torch.func.vmap(torch.func.grad(f))(torch.stack([x, x * 2]))
    assert torch.allclose(both, torch.stack([expected, other]), **close)
    assert torch.allclose(torch.func.vmap(f)(torch.stack([x, x * 2])), torch.stack([f(x), f(x * 2)]))
    jacobian = torch.autograd.functional.jacobian(lambda x: torch.stack([f(x), f(x)]), x, vectorize=True)
    assert torch.allclose(jacobian, torch.stack([expected, expected]), **close)


def test_a_transform_leaves_the_logits_as_they_are(backend):
    """Its argument is another's tensor too: a gradient over it would not be that of a function."""
    d = data()
    before = d.logits.clone()

    def f(x):
        return cf.token_stats(x, d.teacher, d.tokens, inplace_backward=True, backend=backend).reverse_kl.sum()

    once, again = torch.func.grad(f)(d.logits), torch.func.grad(f)(d.logits)
    assert torch.equal(d.logits, before) and torch.equal(once, again)


def test_what_is_no_argument_of_a_derivative_costs_none(backend):
    """The teacher, costs and tensors without a tangent are constants to forward mode as they are to reverse mode."""
    d = data()

    def of_the_teacher(y):
        return cf.token_stats(d.logits, y, d.tokens, backend=backend).reverse_kl.sum()

    def of_the_cost(cost):
        return cf.budget_trace(cost, 1.0, backend=backend).excess.sum()

    def beside(x):
        return token_stats(d, d.logits, backend) + x.sum()

    for f, x, expected in ((of_the_teacher, d.teacher, 0), (of_the_cost, d.reward, 0), (beside, d.reward, 6)):
        value, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
        assert torch.allclose(value, f(x)) and tangent == expected
        if f is not beside:
            assert torch.func.jvp(torch.func.vmap(f), (x[None],), (torch.ones_like(x[None]),))[1] == expected
        assert torch.equal(torch.func.grad(f)(x), torch.full_like(x, expected / 6))


@needs_native
def test_a_compiled_function_has_no_other_derivative_either():
    torch.compiler.reset()
    d = data()
    tangent = torch.ones_like(d.logits)

    def f(x):
        return token_stats(d, x, "cpu")

    compiled = torch.compile(f, backend="aot_eager")
    compiled(d.logits)
    with pytest.raises(NotImplementedError, match=JVP):  # of a graph that was made before
        dual(compiled, d.logits, tangent)
    for fullgraph in (False, True):
        jvp = torch.compile(lambda x: torch.func.jvp(f, (x,), (tangent,)), backend="aot_eager", fullgraph=fullgraph)
        with pytest.raises(Exception, match=f"(?s){JVP}"):
            jvp(d.logits)
    gradient = torch.compile(lambda x: torch.func.grad(f)(x), backend="aot_eager")
    assert torch.equal(gradient(d.logits), torch.func.grad(f)(d.logits))


@pytest.mark.tiles
def test_a_token_state_has_no_derivative_and_no_batches(backend):
    d = data()
    rows = [t.flatten(0, 1) for t in (d.logits, d.teacher, d.tokens)]

    def f(x, y=rows[1]):
        state = cf.TokenState.empty(6, device=x.device)
        return state.update(x, y, rows[2], backend=backend).finish().reverse_kl.sum()

    x, one = rows[0], torch.ones_like(rows[0])
    derivatives = {
        "grad": lambda: torch.func.grad(f)(x),
        "jvp": lambda: torch.func.jvp(f, (x,), (one,)),
        "dual numbers": lambda: dual(f, x, one),
        "grad of vmap": lambda: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(x[None]),
        "jvp of vmap": lambda: torch.func.jvp(torch.func.vmap(f), (x[None],), (one[None],)),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(f))(x[None]),
    }
    for derivative in derivatives.values():
        with pytest.raises(NotImplementedError, match=r"cmdp_fast\.TokenState has no derivative"):
            derivative()
    for of in (f, lambda y: f(x, y)):
        with pytest.raises(NotImplementedError, match=r"has no torch\.func\.vmap: it writes to the state"):
            torch.func.vmap(of)(x[None])
    # A constant of a transform is none of it, and nor is the teacher.
    assert torch.func.grad(lambda c: f(x * 1) + c)(x.sum()) == 1
    assert torch.func.jvp(lambda c: f(x * 1) + c, (x.sum(),), (one.sum() * 0 + 1,))[1] == 1
    assert torch.equal(torch.func.grad(lambda y: f(x, y))(rows[1]), torch.zeros_like(x))

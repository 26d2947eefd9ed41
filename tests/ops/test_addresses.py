"""What lies between a tensor and its address: layouts that nobody has checked, as graphs bring them, are made right."""

import math

import pytest
import torch
import torch.distributed as dist
from every_operator import copied, recorded
from helpers import here, make_logits, make_tokens
from torch.fx.experimental.proxy_tensor import make_fx

import cmdp_fast as cf
from cmdp_fast.cpu import native
from cmdp_fast.ops.arguments import flatten
from cmdp_fast.ops.operator import DECLARED

needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")
OURS = sorted(name for name in DECLARED if not name.startswith("test_"))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def scattered(t):
    """The same numbers, each of them far from the next, and others between them."""
    between = math.nan if t.is_floating_point() else 1
    apart = torch.full((*t.shape, 3), between, dtype=t.dtype, device=t.device)
    apart[..., 1] = t
    return apart[..., 1]


def zero(t):
    return torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device)


def outcome(operator, flat):
    """Results and what has been overwritten, or the error."""
    given = operator.takes.rebuild(flat)
    try:
        with torch.no_grad():
            made = operator.dispatched(given)
    except (ValueError, RuntimeError) as error:
        return str(error)
    results = [] if made is None else flatten(made) if isinstance(made, tuple) else [made]
    return [*results, *(t for t in operator.tensors_of(given) if t is not None)]


def same(found, expected):
    if isinstance(found, str) or isinstance(expected, str):
        return found == expected
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(found, expected, strict=True))


def plain(operator, given):
    """The arguments in memory of their own, as they are without a gradient."""
    return [t.detach() if isinstance(t, torch.Tensor) else t for t in flatten(copied(operator, given))]


@needs_native
@pytest.mark.parametrize("laid", [scattered, zero])
def test_every_operator_takes_every_layout(laid, monkeypatch, one_rank):
    seen = set()
    for operator, given, _ in recorded(monkeypatch, one_rank):
        written = operator.mutates and operator.names.index(operator.mutates)
        for i in operator.takes.tensors:
            left, right = plain(operator, given), plain(operator, given)
            if left[i] is None or (i == written and laid is zero):  # which torch itself refuses
                continue
            left[i], right[i] = laid(left[i]), laid(right[i]).clone(memory_format=torch.contiguous_format)
            found, expected = outcome(operator, left), outcome(operator, right)
            seen.add(operator.name)
            if operator.name == "update_states" and i == written:
                assert found.startswith("fields must be contiguous and float64, got torch.float64 of shape [15, 13]")
            else:
                assert same(found, expected), f"{operator.name}: {operator.names[i]}: {found} and {expected}"
    assert sorted(seen) == OURS


@needs_native
def test_every_operator_refuses_what_is_too_small(monkeypatch, one_rank):
    """No graph of make_fx looks at shapes."""
    for operator, given, _ in recorded(monkeypatch, one_rank):
        for i in operator.takes.tensors:
            flat, name = plain(operator, given), operator.names[i]
            # Fewer ids are others, and rows beyond a mask are not there for PyTorch either.
            harmless = name.endswith("ids") or (name.endswith("mask") and operator.name.startswith("linear_divergence"))
            if flat[i] is not None and flat[i].numel() > 0 and not harmless:
                flat[i] = flat[i][..., :-1].clone()
                assert isinstance(outcome(operator, flat), str), f"{operator.name}: {name}"


OF_CUDA = ("token_stats", "constrained", "budget_trace", "modified_reward", "tail_of_logits")


@needs_native
def test_every_operator_of_a_backend_takes_every_layout(backend, monkeypatch, one_rank):
    if backend == "torch":
        pytest.skip("it takes no address")
    with torch.device("cpu"):
        calls = recorded(monkeypatch, one_rank)
    for operator, given, _ in calls:
        if backend == "cuda" and not operator.name.startswith(OF_CUDA):
            continue
        if operator.name.startswith(("sharded", "linear_tok")):
            continue
        flat = [backend if leaf == "cpu" else here(leaf) for leaf in plain(operator, given)]
        apart = list(flat)
        for i in operator.takes.tensors:
            if flat[i] is not None:
                flat[i] = flat[i].clone()
                apart[i] = flat[i].clone() if operator.name == "update_states" and i == 7 else scattered(flat[i])
        found, expected = outcome(operator, apart), outcome(operator, flat)
        assert same(found, expected), f"{operator.name}: {found} and {expected}"


def everything(x, y, tokens, reward, hidden, head, ids):
    """A function that calls every public operation, in the forward pass."""
    trace = cf.budget_trace(reward.abs(), 1.0)
    logprobs = y.log_softmax(-1).gather(-1, ids)
    made = cf.constrained_reward(x, y, tokens, reward, 1.5)
    return (
        *cf.token_stats(x, y, tokens),
        cf.divergence(x, y),
        *made.stats,
        made.reward,
        *trace,
        cf.modified_reward(reward, reward.abs(), trace),
        *cf.topk_stats(x, ids, logprobs, tokens),
        *cf.linear_token_stats(hidden, head, hidden * 2, head, tokens),
        cf.linear_divergence(hidden, head, hidden * 2, head),
        *cf.linear_topk_stats(hidden, head, ids, logprobs, tokens),
        *cf.TokenState.empty(3).update(x[0], y[0], tokens[0]).finish(),
    )


def and_back(x, *others):
    """The same with the gradient of the logits."""
    x = x.detach().requires_grad_()
    made = everything(x, *others)
    return (*made, *torch.autograd.grad(sum(t.sum() for t in made if t.requires_grad), x))


def arguments():
    ids = torch.arange(2).expand(2, 3, 2).contiguous()
    logits = make_logits(2, 3, 7), make_logits(2, 3, 7, seed=1)
    head = make_logits(2, 3, 4, seed=3), make_logits(7, 4, seed=4)
    return (*logits, make_tokens(2, 3, vocab=7), make_logits(2, 3, seed=2), *head, ids)


def as_it_was_called(graph, call):
    """Whether a graph gives what the call gives, whatever the layout of what it is given."""
    for lay in (torch.clone, scattered, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)):
        given = [lay(t) for t in arguments()]
        expected = call(*given)
        for i, (found, value) in enumerate(zip(graph(*given), expected, strict=True)):
            torch.testing.assert_close(found, value, equal_nan=True, msg=lambda text, i=i: f"result {i}: {text}")
    # One number for each row, whose memory ends there.
    x, y, *others = arguments()
    x = x[..., :1].clone().expand_as(x)
    for found, value in zip(graph(x, y, *others), call(x, y, *others), strict=True):
        torch.testing.assert_close(found, value, equal_nan=True)


@needs_native
def test_an_exported_graph_takes_every_layout():
    class Module(torch.nn.Module):
        def forward(self, *given):
            return everything(*given)

    as_it_was_called(torch.export.export(Module(), arguments()).module(), everything)


@needs_native
def test_a_graph_of_make_fx_takes_every_layout():
    as_it_was_called(make_fx(and_back)(*arguments()), and_back)


@needs_native
def test_a_graph_overwrites_no_logits_that_others_read():
    """It was made for logits whose rows are apart; an overwritten row would be the next one's, too."""

    def gradient(x, y, tokens):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(cf.token_stats(x, y, tokens, inplace_backward=True).reverse_kl.sum(), x)[0]

    x, y, tokens = (t.flatten(0, 1) if t.dim() > 2 else t.flatten() for t in arguments()[:3])
    graph = make_fx(gradient)(x.clone(), y, tokens)
    assert "token_stats_backward_." in graph.code
    expected = gradient(x.clone(), y, tokens)
    assert torch.equal(graph(x.clone(), y, tokens), expected)
    assert torch.equal(graph(scattered(x), y, tokens), expected)
    with pytest.raises(RuntimeError, match="single memory location"):
        graph(x[:1].expand_as(x), y, tokens)


@needs_native
def test_what_torch_knows_to_be_zero_is_read_as_zeros():
    nothing, y, tokens = torch._efficientzerotensor(2, 7), make_logits(2, 7), make_tokens(2, vocab=7)
    for call in (
        lambda x: cf.token_stats(x, y, tokens).entropy,
        lambda x: cf.token_stats(y, y, tokens, mask=x[:, 0].bool()).entropy,
        lambda x: cf.divergence(y, x),
        lambda x: cf.budget_trace(x, 1.0).cumulative,
        lambda x: and_gradient(lambda x: cf.token_stats(x, y, tokens, inplace_backward=True).forward_kl, x),
    ):
        assert torch.equal(call(nothing), call(torch.zeros(2, 7)))
    cf.budget_trace(torch._efficientzerotensor(2000, 7000), 1.0)


def and_gradient(call, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(call(x).sum(), x)[0]


@needs_native
def test_costs_of_a_graph_are_of_a_dtype_that_can_be_read():
    cost = torch.rand(2, 3)
    graph = make_fx(lambda cost: cf.budget_trace(cost, 1.0).cumulative)(cost)
    assert torch.equal(graph(cost.double()), cf.budget_trace(cost.double(), 1.0).cumulative)
    with pytest.raises(TypeError, match=r"cost must be float32 or float64, got torch.float16"):
        graph(cost.half())


@needs_native
def test_where_there_are_no_rows_no_stride_matters():
    x, y = scattered(torch.zeros(0, 7)), torch.zeros(0, 7)
    assert x.is_contiguous() and x.stride(-1) == 3
    assert cf.divergence(x, y).shape == and_gradient(lambda x: cf.divergence(x, y), x)[:, 0].shape == (0,)

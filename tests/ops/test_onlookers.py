"""A call goes straight to its function where nobody looks on, and through the registered operator where somebody does:
with the same values, gradients and errors."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from every_operator import copied, inputs, recorded
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cmdp_fast as cf
from cmdp_fast.cpu import native
from cmdp_fast.ops.arguments import flatten
from cmdp_fast.ops.onlookers import unobserved
from cmdp_fast.ops.operator import DECLARED, Operator

needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")
OURS = sorted(name for name in DECLARED if not name.startswith("test_"))


class Watched(TorchDispatchMode):
    """Looks on, and does nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@needs_native
def test_both_ways_give_the_same(monkeypatch, one_rank):
    calls = recorded(monkeypatch, one_rank)
    assert sorted({operator.name for operator, _, _ in calls}) == OURS
    for operator, given, grad in calls:
        with torch.set_grad_enabled(grad):
            by_itself, dispatched = (outcome(operator, given, way) for way in (Operator.__call__, Operator.dispatched))
        assert by_itself.keys() == dispatched.keys()
        for name, value in dispatched.items():
            found = by_itself[name]
            same = torch.equal(found, value) if isinstance(value, Tensor) else found == value
            assert same, f"{operator.name}: {name} is {found} and {value}"


def outcome(operator, given, way):
    """Everything that can be seen of a call by name: results, their kind, gradients, what has been overwritten."""
    given = copied(operator, given)
    arguments = dict(zip(operator.tensor_names, operator.tensors_of(given), strict=True))
    made = way(operator, given)
    results = [] if made is None else list(flatten(made)) if isinstance(made, tuple) else [made]
    seen = {f"result {i}": t.detach() for i, t in enumerate(results)}
    seen |= {f"node {i}": t.grad_fn and t.grad_fn.name() for i, t in enumerate(results)}
    seen |= {f"version of {name}": t._version for name, t in arguments.items() if t is not None}
    leaves = {name: t for name, t in arguments.items() if t is not None and t.requires_grad}
    if any(t.requires_grad for t in results):
        total = sum((i + 1) * t.sum() for i, t in enumerate(results) if t.requires_grad)
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        seen |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return seen | {name: t.detach() for name, t in arguments.items() if t is not None}


def ways(call, monkeypatch):
    """How the operators were reached during a call: a set of "straight" and "dispatched"."""
    taken = set()
    compute, dispatched = Operator._compute, Operator.dispatched
    with monkeypatch.context() as patch:
        patch.setattr(Operator, "_compute", lambda *a: (taken.add("straight"), compute(*a))[1])
        patch.setattr(Operator, "dispatched", lambda *a: (taken.add("dispatched"), dispatched(*a))[1])
        call()
    return taken


X, Y, TOKENS, MASK, _ = inputs()


def statistics(x=X):
    return cf.token_stats(x, Y, TOKENS, mask=MASK)


@needs_native
def test_nobody_looks_on(monkeypatch):
    def there_and_back():
        statistics().reverse_kl.sum().backward()

    assert ways(there_and_back, monkeypatch) == {"straight"}
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            assert ways(statistics, monkeypatch) == {"straight"}


@needs_native
def test_inside_the_kernel_of_somebody_elses_operator_nothing_is_recorded(monkeypatch):
    with torch._C._AutoDispatchBelowAutograd():
        assert ways(statistics, monkeypatch) == {"dispatched"}
        assert not statistics().entropy.requires_grad


WATCHED = {
    "a mode of dispatch": Watched,
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "a mode of functions": lambda: torch.device("cpu"),
    "forward differentiation": forward_ad.dual_level,
}


@needs_native
@pytest.mark.parametrize("name", WATCHED)
def test_somebody_looks_on(name, monkeypatch):
    expected = statistics().reverse_kl
    with WATCHED[name]():
        assert ways(statistics, monkeypatch) == {"dispatched"}
        assert torch.equal(statistics().reverse_kl, expected)


def seen_inside(transform):
    """What `unobserved` says of a plain tensor inside a function that a transform runs."""
    seen = []

    def function(t):
        seen.append(unobserved([torch.ones(2)]))
        return t.sum()

    transform(function)
    return seen[0]


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(torch.ones(2)),
    "vmap": lambda f: torch.func.vmap(f)(torch.ones(2)),
    "jvp": lambda f: torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),)),
    "functionalize": lambda f: torch.func.functionalize(f)(torch.ones(2)),
    "make_fx": lambda f: make_fx(f)(torch.ones(2)),
    "make_fx of fake tensors": lambda f: make_fx(f, tracing_mode="fake")(torch.ones(2)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_looks_on(name):
    assert seen_inside(lambda f: f(torch.ones(2)))
    assert not seen_inside(TRANSFORMS[name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tracer_looks_on():
    assert not seen_inside(lambda f: torch.jit.trace(f, (torch.ones(2),), check_trace=False))


class Marked(Tensor):
    """A subclass, as DTensor is one."""


def test_tensors_that_are_more_than_numbers():
    plain = torch.ones(2)
    assert unobserved([plain, None, torch.nn.Parameter(plain)])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(plain)
    others = {
        "a subclass": plain.as_subclass(Marked),
        "meta": plain.to("meta"),
        "fake": fake,
        "sparse": plain.to_sparse(),
        "functional": torch._to_functional_tensor(plain),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "zero": torch._efficientzerotensor(2),
    }
    for name, other in others.items():
        assert not unobserved([plain, other]), name


@needs_native
def test_torch_compile_does_not_enter_a_function_that_was_called_straight(monkeypatch):
    """It leaves a frame that it cannot compile to Python, and looks at those that are called in it."""
    entered = []
    function = DECLARED["token_stats"].function

    def watched(given):
        entered.append(torch.compiler.is_compiling())
        return function(given)

    left_to_python = torch._dynamo.disable(Operator.__call__, recursive=False)
    monkeypatch.setattr(Operator, "__call__", lambda operator, given: left_to_python(operator, given))
    monkeypatch.setattr(DECLARED["token_stats"], "function", watched)
    with torch.no_grad():
        found = torch.compile(statistics, backend="eager")(X)
        assert entered == [False]
        assert torch.equal(found.reverse_kl, statistics().reverse_kl)


@needs_native
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpoints_and_hooks_on_what_is_saved(early_stop):
    def loss(x):
        return statistics(x * 1).reverse_kl.sum()

    x = X
    expected = torch.autograd.grad(loss(x), x)[0]
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        found = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)[0]
    assert torch.equal(found, expected)
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(torch.autograd.grad(loss(x), x)[0], expected)
    with torch.autograd.set_detect_anomaly(True):
        assert torch.equal(torch.autograd.grad(loss(x), x)[0], expected)


@needs_native
@pytest.mark.parametrize("watched", [contextlib.nullcontext, Watched])
def test_errors_are_the_same(watched):
    x, y, tokens, _, _ = inputs()
    with watched():
        logits = x * 1
        stats = cf.token_stats(logits, y, tokens)
        logits.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stats.entropy.sum().backward()
        stats = cf.token_stats(x, y, tokens)
        gradient = torch.autograd.grad(stats.reverse_kl.sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"token_stats_backward has no derivative"):
            gradient.sum().backward()
        stats.entropy.sum().backward()
        with pytest.raises(RuntimeError, match="a second time"):
            stats.entropy.sum().backward()
        with pytest.raises(ValueError, match=r"tokens\[0, 0\] = 37 is outside the vocabulary"):
            cf.token_stats(x, y, torch.full_like(tokens, 37))


@needs_native
def test_the_profiler_names_the_operator():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        statistics()
    assert "cmdp_fast::token_stats" in {event.key for event in profile.key_averages()}

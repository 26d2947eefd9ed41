"""What torch expects of an operator: torch.compile, opcheck, autocast, in-place gradients, clear errors."""

import copy

import pytest
import torch
from helpers import DIFFERENTIABLE, here, make_logits, make_tokens

import cmdp_fast as cf
from cmdp_fast.cpu import native

needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")
OPS = torch.ops.cmdp_fast


def everything(x, y, tokens, mask, reward):
    out = cf.constrained_reward(x, y, tokens, reward, 1.5, mask=mask)
    loss = sum(getattr(out.stats, name).sum() for name in DIFFERENTIABLE) + (out.stats.logprob * out.reward).sum()
    jsd = cf.divergence(x, y, mask=mask)
    return (*out.stats, *out.trace, out.reward, jsd), loss + jsd.sum()


def inputs(dtype=torch.float32):
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    x, y = make_logits(3, 5, 37, dtype=dtype), make_logits(3, 5, 37, dtype=dtype, seed=1)
    return x.requires_grad_(), y, make_tokens(3, 5, vocab=37), mask, make_logits(3, 5, scale=1.0, seed=2)


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_equal_results(dynamic):
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = inputs(dtype)
        plain, loss = everything(*arguments)
        gradient = torch.autograd.grad(loss, arguments[0])[0]
        got, compiled_loss = compiled(*arguments)
        for a, b in zip(got, plain, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
        assert torch.equal(torch.autograd.grad(compiled_loss, arguments[0])[0], gradient)


@needs_native
def test_compile_with_inplace_backward_keeps_the_logits():
    x, y, tokens, _, _ = inputs()
    before = x.detach().clone()

    def loss(x):
        return cf.token_stats(x, y, tokens, inplace_backward=True).reverse_kl.sum()

    gradient = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)[0]
    assert torch.equal(x, before)
    assert torch.equal(gradient, torch.autograd.grad(cf.token_stats(x, y, tokens).reverse_kl.sum(), x)[0])


@needs_native
def test_compile_of_a_token_state():
    x, y, tokens, _, _ = inputs()
    x, y, tokens = x.detach().flatten(0, 1), y.flatten(0, 1), tokens.flatten()

    def tiles(x, y, tokens):
        state = cf.TokenState.empty(len(x))
        for start in (0, 20):
            state.update(x[:, start : start + 20], y[:, start : start + 20], tokens, first_column=start)
        return state.finish()

    for a, b in zip(torch.compile(tiles, fullgraph=True)(x, y, tokens), tiles(x, y, tokens), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@needs_native
def test_under_fake_tensors():
    with torch._subclasses.FakeTensorMode() as mode:
        outputs, _ = everything(*(mode.from_tensor(t) for t in inputs()))
    assert outputs[0].shape == (3, 5) and outputs[-1].dtype == torch.float32


def samples():
    x, y, tokens, mask, reward = inputs()
    plain = x.detach()
    stats, cpu = (1.0, 37), "cpu"
    saved = OPS.token_stats(plain, y, tokens, mask, *stats, False, cpu)[6] if native else None
    g = torch.rand(3, 5)
    yield "token_stats", (x, y, tokens, mask, *stats, False, cpu)
    yield (
        "token_stats",
        (make_logits(4, 9, dtype=torch.bfloat16), make_logits(4, 9), tokens[0, :4] % 8, None, 0.5, 8, False, cpu),
    )
    yield "token_stats_backward", (plain, y, tokens, mask, *stats, saved, g, None, g, None, cpu)
    yield "token_stats_backward_", (plain.clone(), y, tokens, None, *stats, saved, None, g, None, g, cpu)
    weights = (0.5, 0.5, 0.5)
    yield "mixture_divergence", (x, y, None, mask, *stats, *weights, cpu)
    if native:
        _, saved, mean = OPS.mixture_divergence(plain, y, None, mask, *stats, *weights, cpu)
        yield "mixture_divergence_backward", (plain, y, None, mask, *stats, *weights, cpu, saved, mean, g)
    cost, offsets, limits = torch.rand(3, 5), torch.tensor([0, 5, 10, 15]), torch.ones(3, dtype=torch.float64)
    rule, paid = (1.0, False, False), ("cmdp", True, 1.0, 1.0, 0.0, 10.0)
    for backend in (cpu, "torch"):
        yield "budget_trace", (cost, mask, offsets, limits, *rule, backend)
        yield "constrained_scan", (cost, mask, offsets, reward, limits, *rule, *paid, backend)
        yield "modified_reward", (cost, None, offsets, cost, cost, mask, cost, reward, *paid, backend)
    for backend in (cpu, "torch"):
        fields = cf.TokenState.empty(3).fields
        yield "update_states", (x[0, :3].detach(), y[0, :3], tokens[0, :3], None, *stats, 0, fields, backend)


@needs_native
@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(OPS, name).default, copy.deepcopy(arguments))


@pytest.mark.mixture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_downcast_the_statistics(dtype, backend):
    x, y, tokens, mask, _ = inputs()
    plain = cf.token_stats(x, y, tokens, mask=mask, backend=backend)
    jsd = cf.divergence(x, y, mask=mask, backend=backend)
    with torch.autocast(x.device.type, dtype=dtype):
        under = cf.token_stats(x, y, tokens, mask=mask, backend=backend)
        jsd_under = cf.divergence(x, y, mask=mask, backend=backend)
    for a, b in zip((*plain, jsd), (*under, jsd_under), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)


@needs_native
def test_inplace_backward_writes_into_the_logits():
    x, y, tokens, mask, _ = inputs()
    expected = torch.autograd.grad(cf.token_stats(x, y, tokens, mask=mask).reverse_kl.sum(), x)[0]
    hidden = x.detach().clone().requires_grad_()
    logits = hidden * 1
    stats = cf.token_stats(logits, y, tokens, mask=mask, inplace_backward=True)
    gradient = torch.autograd.grad(stats.reverse_kl.sum(), logits, retain_graph=True)[0]
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, expected) and torch.equal(logits.detach(), expected)
    with pytest.raises(RuntimeError, match=r"differentiated a second time.*inplace_backward=False"):
        torch.autograd.grad(stats.reverse_kl.sum(), logits)


@needs_native
def test_inplace_backward_is_noticed_by_others_who_saved_the_logits():
    x, y, tokens, _, _ = inputs()
    logits = x * 1
    other = (logits**2).sum()
    cf.token_stats(logits, y, tokens, inplace_backward=True).reverse_kl.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@needs_native
def test_there_is_no_second_derivative():
    x, y, tokens, _, _ = inputs()
    stats = cf.token_stats(x, y, tokens)
    gradient = torch.autograd.grad(stats.reverse_kl.sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.mixture
def test_the_teacher_never_gets_a_gradient(backend):
    x, y, tokens, _, _ = inputs()
    y.requires_grad_()
    stats = cf.token_stats(x, y, tokens, backend=backend)
    (sum(s.sum() for s in stats) + cf.divergence(x, y, backend=backend).sum()).backward()
    assert y.grad is None and x.grad is not None


LOGITS, TOKENS = make_logits(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"student_logits": [1.0]}, TypeError, "student_logits must be a tensor, got list"),
        ({"student_logits": LOGITS.long()}, TypeError, "student_logits must be float32, bfloat16, float16 or float64"),
        ({"teacher_logits": LOGITS[:1]}, ValueError, r"got \[2, 3, 9\] and \[1, 3, 9\]"),
        ({"teacher_logits": LOGITS.to("meta")}, ValueError, "teacher_logits is on meta, but student_logits is on c"),
        ({"teacher_logits": LOGITS[..., :8]}, ValueError, "9 wide and teacher_logits 8; pass vocab_size="),
        ({"vocab_size": 10}, ValueError, r"min\(9, 9\) = 9"),
        ({"vocab_size": 0}, ValueError, "vocab_size=0 must be at least 1"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int"),
        ({"tokens": TOKENS.float()}, TypeError, "tokens must be int64, int32, int16 or uint8, got float32"),
        ({"tokens": TOKENS[0]}, ValueError, r"without its last axis, \[2, 3\], got \[3\]"),
        ({"tokens": TOKENS.to("meta")}, ValueError, "tokens is on meta"),
        ({"tokens": TOKENS + 9}, ValueError, r"tokens\[0, 0\] = 9 is outside the vocabulary \[0, 9\)"),
        ({"tokens": TOKENS - torch.eye(2, 3).long()}, ValueError, r"tokens\[0, 0\] = -1 is outside"),
        ({"mask": TOKENS}, TypeError, r"mask must be bool .* convert with mask.bool\(\)"),
        ({"mask": TOKENS[0].bool()}, ValueError, r"mask must have the shape of tokens, \[2, 3\], got \[3\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": torch.inf}, ValueError, "temperature must be positive and finite"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown; expected None or one of cpu, cuda, triton, torch"),
    ],
)
def test_errors(change, error, message, backend):
    if "outside" in message and torch.get_default_device().type != "cpu":
        pytest.skip("looking at the tokens would stall a GPU")
    arguments = {"student_logits": LOGITS, "teacher_logits": LOGITS, "tokens": TOKENS, "backend": backend, **change}
    arguments = {name: here(value) for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        cf.token_stats(**arguments)


def test_an_unavailable_backend_says_why():
    for name, problem in cf.available_backends().items():
        if problem is not None:
            with pytest.raises(ValueError, match=f"backend='{name}' is not available here: "):
                cf.token_stats(LOGITS, LOGITS, TOKENS, backend=name)
    assert cf.available_backends()["torch"] is None


def test_one_sequence_in_a_graph_of_any_number_of_sequences():
    """A shape that a graph does not know is in no tuple of shapes."""

    def trace(cost, offsets, budget):
        return tuple(cf.budget_trace(cost, budget, cu_seqlens=offsets))

    for dynamic, counts in ((True, (1, 3)), (None, (2, 3, 1))):
        torch.compiler.reset()
        compiled = torch.compile(trace, fullgraph=True, dynamic=dynamic, backend="eager")
        for count in counts:
            given = torch.rand(9), torch.tensor([*range(count), 9]), torch.ones(count)
            for found, expected in zip(compiled(*given), trace(*given), strict=True):
                assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"budget must be a number or have shape \[2\] \(sequences\), got \[1\]"):
        trace(torch.rand(9), torch.tensor([0, 3, 9]), torch.ones(1))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_packed_sequences_in_one_graph(backend):
    """Offsets hold data, on whose values no size may hang."""
    cost, offsets = torch.rand(6), torch.tensor([0, 2, 2, 6])

    def trace(cost, offsets):
        return cf.budget_trace(cost, 0.5, cu_seqlens=offsets, backend=backend)

    for found, expected in zip(torch.compile(trace, fullgraph=True)(cost, offsets), trace(cost, offsets), strict=True):
        assert torch.equal(found, expected)

"""token_stats against the float64 reference: values and gradients."""

import itertools

import pytest
import torch
from helpers import (
    DIFFERENTIABLE,
    DTYPES,
    assert_no_worse,
    check_token_stats,
    exact_and_eager,
    finest,
    make_logits,
    make_tokens,
    weighted_sum,
)

import cmdp_fast as cf
from cmdp_fast.cpu import native
from cmdp_fast.ops.backends import INTERPRETED

needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")
# One column; around one vector, one step of the loop, one block, one segment; several segments.
WIDTHS = (1, 2, 7, 16, 25, 48, 151, 4096, 4101, 16385, 50000)


@pytest.mark.parametrize("width", WIDTHS)
def test_values_and_gradients(width, backend):
    check_token_stats(make_logits(3, width), make_logits(3, width, seed=1), make_tokens(3, vocab=width), backend)


@pytest.mark.parametrize("student, teacher", list(itertools.product(DTYPES, DTYPES)))
def test_every_pair_of_dtypes(student, teacher, backend):
    check_token_stats(
        make_logits(4, 333, dtype=student),
        make_logits(4, 333, dtype=teacher, seed=1),
        make_tokens(4, vocab=333),
        backend,
    )


FAR = [(1e7, 0), (0, -1e9), (-1e12, 0), (0, 1e20), (1e30, -1e30), (-2e30, 1e37), (0, 3e38), (-3e38, 0)]


@pytest.mark.parametrize("student_offset, teacher_offset", [(100, 0), (0, -100), (1e4, -1e4), (-3000, 5000), *FAR])
def test_offsets_cost_no_precision(student_offset, teacher_offset, backend):
    x, y = make_logits(4, 5000, offset=student_offset), make_logits(4, 5000, offset=teacher_offset, seed=1)
    # The kernels' reference is a float32: it lies so many nats from the highest logit, and every statistic is a
    # difference of terms of that size. Where they would leave the range of 2^t, 88 nats, a slower loop has another.
    away = max(abs(student_offset), abs(teacher_offset)) * 2**-24
    check_token_stats(x, y, make_tokens(4, vocab=5000), backend, terms=away if away < 88 else 1.0)


@pytest.mark.parametrize("temperature", [0.25, 0.7, 3.0])
def test_temperature(temperature, backend):
    x, y = make_logits(4, 777), make_logits(4, 777, seed=1)
    check_token_stats(x, y, make_tokens(4, vocab=777), backend, temperature=temperature)


def test_nearly_equal_models(backend):
    """The KL of two models that differ by 1e-3 is about 1e-7: cancellation would show here."""
    x = make_logits(4, 3000)
    check_token_stats(x, x + make_logits(4, 3000, scale=1e-3, seed=1), make_tokens(4, vocab=3000), backend)


@pytest.mark.parametrize("jump", [14.0, 20.0, 40.0, 100.0, 3000.0, -50.0, -80.0, -3000.0])
@pytest.mark.parametrize("which", ["student", "teacher"] if INTERPRETED else ["student", "teacher", "both"])
def test_columns_far_from_the_first_ones(jump, which, backend):
    """The native kernel takes its reference from the first block; what lies far above or below it must not suffer."""
    x, y = make_logits(3, 40000), make_logits(3, 40000, seed=1)
    for logits in {"student": (x,), "teacher": (y,), "both": (x, y)}[which]:
        logits[0, 5000:9000] += jump
        logits[1, 39990:] += jump
        logits[2, :4000] += jump
    check_token_stats(x, y, torch.tensor([6000, 39999, 20]), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [3, 333, 5000])
@needs_native
def test_half_precision_gradients_are_the_rounded_float_gradients(dtype, width):
    """Bitwise: the same arithmetic on the same values, rounded to nearest at the end."""
    x, y = make_logits(3, width, dtype=dtype), make_logits(3, width, dtype=dtype, seed=1)
    tokens, gradients = make_tokens(3, vocab=width), []
    for logits in (x.clone(), x.float()):
        logits.requires_grad_()
        stats = cf.token_stats(logits, y, tokens, backend="cpu")
        total = 1e3 * stats.reverse_kl - stats.logprob + 1e-3 * stats.entropy
        gradients.append(torch.autograd.grad(total.sum(), logits)[0])
    assert torch.equal(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize("size", [1e-6, 1e10, 1e30])
def test_upstream_gradients_of_any_size(size, backend):
    x, y, tokens = make_logits(3, 500), make_logits(3, 500, seed=1), make_tokens(3, vocab=500)
    gradients = []
    for scale in (1.0, size):
        logits = x.clone().requires_grad_()
        stats = cf.token_stats(logits, y, tokens, backend=backend)
        weights = torch.tensor([1.0, -2.0, 0.5]) * scale
        total = (weights * (stats.reverse_kl + stats.forward_kl + stats.logprob - stats.entropy)).sum()
        gradients.append(torch.autograd.grad(total, logits)[0].double() / scale)
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@needs_native
def test_no_rounding_takes_a_statistic_across_zero(variant):
    """Of rows of few columns, or of one: what is certain has exactly no entropy, and no more than all probability."""
    for width in (1, 2, 5):
        x, y = (make_logits(500, width, scale=30.0, seed=seed) for seed in (0, 1))
        y = torch.where(torch.arange(500)[:, None] % 2 == 0, y, x + 1e-5 * y)  # half of them nearly agree
        for name, value in cf.token_stats(x, y, x.argmax(-1), backend="cpu")._asdict().items():
            assert (value <= 0 if "logprob" in name else value >= 0).all(), name


def test_equal_models_have_no_divergence(backend):
    x = make_logits(4, 3000)
    stats = cf.token_stats(x, x.clone(), make_tokens(4, vocab=3000), backend=backend)
    assert torch.equal(stats.reverse_kl, torch.zeros(4)) and torch.equal(stats.forward_kl, torch.zeros(4))
    assert torch.equal(stats.logprob, stats.teacher_logprob)
    assert torch.equal(stats.entropy, stats.teacher_entropy)


@needs_native
@pytest.mark.parametrize("inplace", [False, True])
def test_a_gradient_in_bfloat16_is_the_float32_gradient_rounded(variant, inplace):
    """To nearest, ties to even: of so many values some lie halfway between two."""
    x, y = (make_logits(8, 60_007, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    tokens = make_tokens(8, vocab=60_007)

    def gradient(x, y, inplace):
        leaf = x.clone().requires_grad_()
        stats = cf.token_stats(leaf, y, tokens, inplace_backward=inplace, backend="cpu")
        (stats.logprob + stats.entropy + stats.reverse_kl - stats.forward_kl).sum().backward()
        return leaf.grad

    exact = gradient(x.float(), y.float(), False)
    assert ((exact.view(torch.int32) & 0xFFFF) == 0x8000).any()
    assert torch.equal(gradient(x, y, inplace), exact.bfloat16())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 13, 2112, 4133, 17000])
@pytest.mark.parametrize("offsets", [(0, 0), (1e3, -1e3), (1e4, 30)])
def test_every_kernel_variant(variant, dtype, width, offsets):
    x, y = (make_logits(3, width, dtype=dtype, offset=o, seed=i) for i, o in enumerate(offsets))
    check_token_stats(x, y, make_tokens(3, vocab=width), "cpu")


@pytest.mark.parametrize("width", [100, 2040, 2112, 4224, 30000])
def test_constant_rows(width, backend):
    """Equal terms round to the same side, addition after addition: the worst that can happen to a sum."""
    x, y = make_logits(3, width, scale=2.0), torch.full((3, width), 0.3)
    check_token_stats(x, y, make_tokens(3, vocab=width), backend)
    check_token_stats(y, x, make_tokens(3, vocab=width), backend)


@pytest.mark.parametrize("size", [2907252.0, 6.54e6, 7.27e6, 1e9, 1e20, 1e37])
def test_one_logit_in_the_abyss(size, backend):
    """Finite, and so far down that it weighs nothing: the bits of such an exponent must not pass for a small one."""
    x, y = make_logits(2, 48), make_logits(2, 48, seed=1)
    tokens = torch.tensor([3, 4])
    kept = [i for i in range(48) if i != 7]
    expected = cf.token_stats(x[:, kept], y[:, kept], tokens, backend=backend)
    for step in range(-3, 4):
        x[:, 7] = y[:, 7] = -size - step * 7
        for got, want in zip(cf.token_stats(x, y, tokens, backend=backend), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-6, atol=1e-6), step


def test_worked_example(vectors, backend):
    v = vectors["worked_example"]["divergences"]
    dtype, exact, close = finest(backend)
    p = torch.tensor([v["p"]], dtype=torch.float64).log().repeat(3, 1).to(dtype).requires_grad_()
    q = torch.tensor([v["q"]], dtype=torch.float64).log().repeat(3, 1).to(dtype)
    tokens = torch.arange(3)
    stats = cf.token_stats(p, q, tokens, backend=backend)
    assert stats.reverse_kl[0].item() == pytest.approx(v["reverse_kl"], abs=exact)
    assert stats.forward_kl[0].item() == pytest.approx(v["forward_kl"], abs=exact)
    reverse = torch.autograd.grad(stats.reverse_kl.sum(), p, retain_graph=True)[0]
    forward = torch.autograd.grad(stats.forward_kl.sum(), p)[0]
    assert reverse[0].tolist() == pytest.approx(v["grad_reverse_kl"], abs=close)
    assert forward[0].tolist() == pytest.approx(v["grad_forward_kl"], abs=exact)
    assert cf.token_cost(stats, "k1").tolist() == pytest.approx(v["k1"], abs=close)
    assert cf.token_cost(stats, "k3").tolist() == pytest.approx(v["k3"], abs=close)
    assert torch.equal(cf.token_cost(stats, "nll"), -stats.teacher_logprob)


@pytest.mark.float64
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name, backend):
    x = make_logits(3, 9, dtype=torch.float64).requires_grad_()
    y, tokens = make_logits(3, 9, dtype=torch.float64, seed=1), make_tokens(3, vocab=9)
    mask = torch.tensor([True, False, True])

    def statistic(logits):
        return getattr(
            cf.token_stats(logits, y, tokens, mask=mask, temperature=0.7, vocab_size=8, backend=backend), name
        )

    assert torch.autograd.gradcheck(statistic, x)


@pytest.mark.parametrize("present", [c for n in range(1, 5) for c in itertools.combinations(DIFFERENTIABLE, n)])
def test_any_subset_of_upstream_gradients(present, backend):
    x, y, tokens = make_logits(4, 70), make_logits(4, 70, seed=1), make_tokens(4, vocab=70)
    weights = {name: make_logits(4, scale=1.0, seed=i) for i, name in enumerate(present)}
    exact, eager = exact_and_eager(x, y, tokens, weights)
    x.requires_grad_()
    stats = cf.token_stats(x, y, tokens, backend=backend)
    gradient = torch.autograd.grad(weighted_sum(stats, weights), x)[0]
    assert_no_worse(gradient, eager[1], exact[1])


def test_strided_and_expanded_upstream_gradients(backend):
    x, y, tokens = make_logits(4, 70), make_logits(4, 70, seed=1), make_tokens(4, vocab=70)
    x.requires_grad_()
    stats = cf.token_stats(x, y, tokens, backend=backend)
    strided = torch.arange(8.0)[::2]
    expanded = torch.tensor(0.5).expand(4)
    outputs = (stats.logprob, stats.reverse_kl)
    got = torch.autograd.grad(outputs, x, (strided, expanded), retain_graph=True)[0]
    plain = torch.autograd.grad(outputs, x, (strided.contiguous(), expanded.contiguous()))[0]
    assert torch.equal(got, plain)


def test_no_upstream_gradient_is_no_gradient():
    x, y, tokens = make_logits(2, 9).requires_grad_(), make_logits(2, 9), make_tokens(2, vocab=9)
    stats = cf.token_stats(x, y.requires_grad_(), tokens)
    assert not stats.teacher_logprob.requires_grad and not stats.teacher_entropy.requires_grad
    (stats.logprob * 0 + stats.teacher_logprob).sum().backward()
    assert y.grad is None and torch.equal(x.grad, torch.zeros_like(x))

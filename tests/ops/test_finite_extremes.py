"""Finite logits of any size, rows that are nearly one-hot, mixtures of models far apart: what cancels there, overflows
or is rounded off. The native kernels are held to it in every variant that this processor runs.
"""

import itertools
import math

import pytest
import torch
from helpers import DIFFERENTIABLE, assert_no_worse, exact_and_eager, here, make_logits, weighted_sum

import cmdp_fast as cf
from cmdp_fast import cpu, reference, tails, tiles
from cmdp_fast.layout import ListedRows, Mixture, Pair
from cmdp_fast.ops import backends
from cmdp_fast.ops.backends import INTERPRETED

HIGH, LOW = torch.finfo(torch.float64).max, torch.finfo(torch.float64).min
VARIANTS = [name for name, runs in cpu.native.variants() if runs] if cpu.native else [None]


@pytest.fixture(params=VARIANTS)
def variant(request, backend):
    """Each variant of the native kernels; of the other backends there is one."""
    if backend != "cpu" and request.param != VARIANTS[-1]:
        pytest.skip("of the native kernels only")
    if cpu.native is None:
        yield None
        return
    before = cpu.native.variant()
    cpu.native.set_variant(request.param)
    yield request.param
    cpu.native.set_variant(before)


# --------------------------------------------------------------------------------------------------------------
# As large as floats can be

ROWS = [(0, 0, LOW, LOW), (LOW, LOW, 0, 0), (HIGH, 0, LOW, LOW), (LOW, LOW, LOW, HIGH), (LOW, LOW, LOW, LOW)]
ROWS += [(HIGH, HIGH, HIGH, HIGH), (HIGH, HIGH, LOW, -math.inf), (5e-324, 0, LOW, LOW), (HIGH, HIGH, LOW, LOW)]


def by_tiles(x, y, tokens, width, backend):
    """The statistics by tiles of so many columns: one after another, and each by itself and then merged."""
    following, merged = cf.TokenState.empty(len(x)), cf.TokenState.empty(len(x))
    for first in range(0, x.shape[1], width):
        part = slice(first, first + width)
        following.update(x[:, part], y[:, part], tokens, first_column=first, backend=backend)
        alone = cf.TokenState.empty(len(x))
        merged.merge(alone.update(x[:, part], y[:, part], tokens, first_column=first, backend=backend))
    return following.finish(), merged.finish()


@pytest.mark.float64
@pytest.mark.tiles
@pytest.mark.parametrize("width", [1, 2, 4])
def test_entropies_of_the_largest_logits_by_tiles(width, backend):
    """No row is NaN: log-probabilities and divergences may be beyond what a float holds, and then are infinite."""
    for row, other in itertools.product(ROWS, [(0, 0, 0, 0), *ROWS]):
        x, y = (torch.tensor([r], dtype=torch.float64) for r in (row, other))
        tokens = torch.zeros(1, dtype=torch.int64)
        exact = reference.token_stats(x, y, tokens)
        for stats in by_tiles(x, y, tokens, width, backend):
            assert not any(value.isnan().any() for value in stats), (row, other)
            for name in ("entropy", "teacher_entropy"):
                assert torch.allclose(getattr(stats, name), getattr(exact, name)), (row, other, name)


@pytest.mark.parametrize("name", ["logprob", "entropy", "reverse_kl", "forward_kl"])
def test_gradients_of_float32_logits_near_the_largest(name, backend):
    """A difference of log-probabilities overflows in a column without a probability, which adds nothing."""
    x, y = torch.tensor([[3e38, -3e38, 1.0]], requires_grad=True), torch.tensor([[-3e38, 3e38, 2.0]])
    stats = cf.token_stats(x, y, torch.zeros(1, dtype=torch.int64), temperature=2.0, backend=backend)
    getattr(stats, name).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1e-3, 0.7, 1.0, 4.0])
def test_a_temperature_that_takes_float32_logits_beyond_the_largest(temperature, backend):
    """x / temperature is no float32 then: PyTorch's statistics were NaN, or took a column for one that is excluded."""
    for row in (
        (3e38, 0.0, 0.0),
        (-3e38, -3e38, -3e38),
        (3e38, 3e38, -3e38),
        (-3e38, -2e38, -3.2e38),
        (3e38, 2.9e38, 0),
    ):
        x, y = here(torch.tensor([row], requires_grad=True)), here(torch.tensor([[3e38, 3e38, -3e38]]))
        tokens = here(torch.tensor([0]))
        stats = cf.token_stats(x, y, tokens, temperature=temperature, backend=backend)
        exact = reference.token_stats(x.detach().double(), y.double(), tokens, temperature=temperature)
        for name, ours, right in zip(stats._fields, stats, exact, strict=True):
            beyond = name not in ("entropy", "teacher_entropy") and right.abs() > 1e37  # a term of it may be infinite
            assert (ours.isinf() | (ours / right - 1 < 1e-5)) if beyond else torch.allclose(ours, right.float()), row
        for name in DIFFERENTIABLE:
            gradient = torch.autograd.grad(getattr(stats, name).sum(), x, retain_graph=True)[0]
            assert not gradient.isnan().any(), (row, name)
    x = torch.tensor([[3e38, 3e38, -3e38, 0.0], [-3.3e38, -3e38, -3e38, -3e38]])
    mass = cf.dropped_teacher_mass(x, 2, temperature=temperature)
    assert torch.equal(mass, cf.dropped_teacher_mass(x.double(), 2, temperature=temperature).float())


def test_what_is_subtracted_was_divided():
    """To the last bit: float64 kernels divide first, and logits of 1e9 are rounded by 1e-7 then."""
    for temperature in (1.0, 0.7, 1.3, 0.05, 1e-3, 1e3, 0.5, 1 - 2**-53):
        for dtype in (torch.float32, torch.float64):
            x = make_logits(5, 100, dtype=dtype) * torch.tensor([1e-6, 1.0, 1e3, 1e9, -1e20], dtype=dtype)[:, None]
            divided = x / temperature
            expected = divided - divided.amax(-1, keepdim=True)
            assert torch.equal(reference.below_the_largest(x, temperature), expected), (temperature, dtype)


@pytest.mark.mixture
def test_a_divergence_of_float32_logits_near_the_largest(backend):
    x, y = here(torch.tensor([[3e38, 3e38, -3e38, 0.0]])), here(torch.tensor([[3e38, -3e38, -3e38, 0.0]]))
    value = cf.divergence(x, y, temperature=0.5, backend=backend)
    assert abs(value.item() - 0.2157616) < 1e-6  # (log 4/3 + log 2/3 / 2 + log 2 / 2) / 2


@pytest.mark.float64
def test_the_largest_logits_in_one_piece(backend):
    """Values, and gradients that are finite for finite values."""
    for row, other in itertools.product(ROWS, [(0, 0, 0, 0), *ROWS]):
        x, y = (torch.tensor([r], dtype=torch.float64) for r in (row, other))
        x.requires_grad_()
        stats = cf.token_stats(x, y, torch.zeros(1, dtype=torch.int64), backend=backend)
        exact = reference.token_stats(x, y, torch.zeros(1, dtype=torch.int64))
        for name in stats._fields:
            assert not getattr(stats, name).isnan().any(), (row, other, name)
            # The reference takes a difference that no float holds for an exclusion.
            told = -math.inf not in (*row, *other) or name in ("entropy", "teacher_entropy")
            if told and getattr(exact, name) < 1e307:  # a sum of four columns holds no more
                assert torch.allclose(getattr(stats, name), getattr(exact, name)), (row, other, name)
        if backend == "torch":
            continue  # autograd's own
        for name in DIFFERENTIABLE:
            gradient = torch.autograd.grad(getattr(stats, name).sum(), x, retain_graph=True)[0]
            assert gradient.isfinite().all(), (row, other, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.tiles
def test_the_largest_logits_of_narrow_dtypes_by_tiles(dtype, backend):
    high, low = torch.finfo(dtype).max, torch.finfo(dtype).min
    for row in ((0, 0, low, low), (low, low, 0, 0), (high, 0, low, low), (low, low, low, high), (high, high, low, low)):
        x, y = here(torch.tensor([row], dtype=dtype)), here(torch.zeros(1, 4, dtype=dtype))
        tokens = here(torch.zeros(1, dtype=torch.int64))
        exact = reference.token_stats(x.double(), y.double(), tokens)
        for stats in by_tiles(x, y, tokens, 2, backend):
            for got, right in zip(stats, exact, strict=True):
                assert torch.allclose(got, right.float(), rtol=1e-5, atol=1e-6), row


@pytest.mark.tiles
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_reference_that_a_float_rounds_serves_no_other_tile(which, backend):
    far, near = torch.tensor([[1e10, 1e10 - 2048, 1e10, 1e10]]), torch.zeros(1, 4)  # floats lie 1024 apart there
    x, y = (here(each) for each in ((far, near) if which == "student" else (near, far)))
    tokens = here(torch.zeros(1, dtype=torch.int64))
    exact = reference.token_stats(x.double(), y.double(), tokens)
    for stats in by_tiles(x, y, tokens, 2, backend):
        for got, right in zip(stats, exact, strict=True):
            assert torch.allclose(got, right.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [name for name in ("torch", "cpu") if cf.available_backends()[name] is None])
def test_tails_of_the_largest_logits(module):
    """As many columns as make the product of a rise and a weight overflow."""
    for row in ((0, 0, LOW, LOW, 0), (LOW, LOW, 0, 0, 0), (LOW, LOW, HIGH, LOW, 0), (HIGH, LOW, 0, 0, LOW)):
        x = torch.tensor([row], dtype=torch.float64)
        ids, tokens, state = torch.tensor([[4]]), torch.zeros(1, dtype=torch.int64), tails.empty(1, 1, x.device)
        for first in (0, 2, 4):
            part = x[:, first : first + 2].contiguous()
            backends.get(module).update_tails(ListedRows(part, ids, tokens, None, 1.0, part.shape[1]), first, state)
        tail = tails.finished(state)
        p = x[0, :4].softmax(-1)
        assert torch.allclose(tail.entropy[0], torch.special.entr(p).sum()), row


# --------------------------------------------------------------------------------------------------------------
# Nearly one-hot


def leading(dtype, width, column, lead, spread, seed):
    """A row whose column leads the others by so many nats."""
    x = make_logits(1, width, scale=spread, dtype=torch.float64, seed=seed)
    x[0, column] = lead
    return x.to(dtype)


def check(x, y, tokens, backend):
    weights = dict.fromkeys(DIFFERENTIABLE, 1.0)
    leaf = x.detach().clone().requires_grad_()
    stats = cf.token_stats(leaf, y, tokens, backend=backend)
    gradient = torch.autograd.grad(weighted_sum(stats, {"entropy": 1.0}), leaf)[0]
    (exact, _), (eager, _) = exact_and_eager(x, y, tokens, weights)
    for name in stats._fields:
        assert_no_worse(*(getattr(s, name) for s in (stats, eager, exact)), name)
    (_, exact_gradient), (_, eager_gradient) = exact_and_eager(x, y, tokens, {"entropy": 1.0})
    assert_no_worse(gradient, eager_gradient.to(x.dtype), exact_gradient, "gradient of the entropy")


PLACES = [(300, 0), (9000, 8000)] if INTERPRETED else [(60, 0), (300, 0), (300, 7), (9000, 0), (9000, 8000)]


@pytest.mark.parametrize("width, column", PLACES)
def test_a_row_with_one_leading_column(width, column, backend, variant):
    """The others are lost beside it one by one where they are 2^-24 of it (16.6 nats below), and digits of h where its
    block has a reference far below it."""
    for lead, seed in itertools.product((8.0, 16.7, 17.4, 23.0, 40.0), range(1 if INTERPRETED else 2)):
        x = leading(torch.float32, width, column, lead, 0.02, seed)
        y = make_logits(1, width, seed=seed + 9)
        check(here(x), here(y), here(torch.tensor([column])), backend)
        check(here(y), here(x), here(torch.tensor([column])), backend)


@pytest.mark.float64
def test_a_leading_column_in_double(backend, variant):
    """36.7 nats below it the others are 2^-53 of it: added to it one by one, none would be left."""
    for lead, width in itertools.product((36.5, 37.5, 39.0), (300, 20000)):
        x = leading(torch.float64, width, 1, lead, 0.05, 0)
        stats = cf.token_stats(x, torch.zeros_like(x), torch.tensor([1]), backend=backend)
        rest = (x[0, 2:] - x[0, 1]).exp().sum() + (x[0, 0] - x[0, 1]).exp()
        assert abs(stats.logprob + rest.log1p()) <= (8 + width**0.5) * 2**-53


# --------------------------------------------------------------------------------------------------------------
# Mixtures


def divergence_and_gradient(x, y, kind, beta, backend):
    leaf = x.detach().clone().requires_grad_()
    value = cf.divergence(leaf, y, kind, beta=beta, backend=backend)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def far_apart(kind, beta):
    """Of two models that are certain of different columns: each is a mixture's share of itself."""
    student, teacher = {
        "jsd": (1 - beta, beta),
        "skew_forward_kl": (0.0, 1.0),
        "skew_reverse_kl": (1.0, 0.0),
    }[kind]
    b, rest = (1 - beta, beta) if kind == "skew_reverse_kl" else (beta, 1 - beta)
    of = {beta: math.log(beta), 1 - beta: math.log1p(-beta)}
    return -student * of[rest] - teacher * of[b]


@pytest.mark.mixture
@pytest.mark.parametrize("kind", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("beta", [1e-6, 0.01, 0.5, 0.9, 0.99, 0.999, 0.999999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_of_models_far_apart(dtype, beta, kind, backend, variant):
    x, y = torch.zeros(2, 2, dtype=dtype), torch.zeros(2, 2, dtype=dtype)
    x[:, 0], y[:, 1] = 200.0, torch.tensor([200.0, 60.0])
    value, gradient = divergence_and_gradient(here(x), here(y), kind, beta, backend)
    right = far_apart(kind, beta)
    # Shares are kept as 1 - beta, which has lost what is small of beta: 2^-53 / beta. On a GPU the bound is absolute.
    relative = 4 * torch.finfo(dtype).eps + (2**-52 / beta if kind == "skew_reverse_kl" else 0)
    absolute = 2e-7 if backend == "triton" else 0
    if dtype == torch.float64 and backend == "torch":
        relative += 1e-15
    assert ((value - right).abs() <= relative * right + absolute).all(), (value - right) / right
    # Nothing but a difference of the slope from its mean, which are logarithms of the shares.
    size = max(1.0, -math.log(beta), -math.log1p(-beta))
    assert gradient.isfinite().all() and gradient[0].abs().max() <= 8 * torch.finfo(dtype).eps * size


@pytest.mark.mixture
@pytest.mark.float64
@pytest.mark.parametrize("gap", [1e3, 1e300, math.inf])
def test_a_mixture_in_double_of_models_that_share_no_column(gap, backend, variant):
    """Of each column one probability is exactly 0, the other 1."""
    x = torch.tensor([[0.0, -gap], [-gap, 0.0]], dtype=torch.float64)
    for kind in ("jsd", "skew_forward_kl"):
        value, gradient = divergence_and_gradient(x, x.flip(1), kind, 0.25, backend)
        assert value.tolist() == pytest.approx([far_apart(kind, 0.25)] * 2, rel=1e-13), kind
        assert not gradient.any(), kind


@pytest.mark.mixture
@pytest.mark.parametrize("beta", [1e-60, 1e-40, 1e-25])
def test_a_share_that_no_float_holds(beta, backend, variant):
    """Models 200 nats apart: log(1/beta) where that is less."""
    if backend == "triton" and beta < 2**-126:
        pytest.skip("a share below 2^-126 counts as none there")
    x, y = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    value, _ = divergence_and_gradient(here(x), here(y), "skew_forward_kl", beta, backend)
    assert value.item() == pytest.approx(-math.log(beta), rel=1e-6)


@pytest.mark.parametrize("beta", [1e-6, 0.5, 0.999999])
def test_mixtures_of_plain_pytorch(beta):
    """What the linear divergence takes where there are no kernels, in double: the native kernels' own numbers."""
    x, y = (
        make_logits(4, 50, dtype=torch.float64, scale=9.0),
        make_logits(4, 50, dtype=torch.float64, seed=1, scale=9.0),
    )
    x[0], y[0] = 0.0, 0.0
    x[0, 0], y[0, 1] = 200.0, 200.0
    weights, pair = Mixture(*reference.divergence_weights("jsd", beta)), Pair(x, y, None, None, 1.0, 50)
    value, saved, mean = tiles.mixture(pair, weights)
    assert value[0].item() == pytest.approx(far_apart("jsd", beta), rel=1e-14)
    gradient = torch.empty_like(x)
    tiles.mixture_backward(pair, saved, mean, torch.ones(4, dtype=torch.float64), weights, gradient)
    leaf = x.clone().requires_grad_()
    exact = reference.divergence(leaf, y, "jsd", beta=beta)
    assert torch.allclose(value, exact, rtol=1e-13, atol=1e-15)
    assert torch.allclose(gradient, torch.autograd.grad(exact.sum(), leaf)[0], rtol=1e-11, atol=1e-15)

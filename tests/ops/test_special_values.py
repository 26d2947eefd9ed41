"""-inf, NaN, +inf, one-hot and huge logits, forward and backward, at columns in the vector body and in the tail."""

import functools
import math

import pytest
import torch
from helpers import (
    DIFFERENTIABLE,
    DTYPES,
    assert_no_worse,
    exact_and_eager,
    here,
    make_logits,
    make_tokens,
    weighted_sum,
)

import cmdp_fast as cf
from cmdp_fast.ops.backends import INTERPRETED

INF, NAN = torch.inf, torch.nan
PLACES = [(width, column) for width in (5, 130, 5000) for column in (0, width // 2, width - 1)]
if INTERPRETED:  # in what is no whole tile, in the first, in the tail
    PLACES = [(5, 2), (5000, 0), (5000, 4999)]


@pytest.fixture(params=PLACES)
def place(request):
    """(width, column): where the special value stands."""
    return request.param


def run(x, y, tokens, backend, **settings):
    x = x.detach().clone().requires_grad_()
    stats = cf.token_stats(x, y, tokens, backend=backend, **settings)
    gradients = {
        name: torch.autograd.grad(getattr(stats, name).sum(), x, retain_graph=True)[0] for name in DIFFERENTIABLE
    }
    return stats, gradients


def pair(width, dtype=torch.float32):
    return make_logits(3, width, dtype=dtype), make_logits(3, width, dtype=dtype, seed=1), torch.tensor([1, 2, 3])


@functools.cache
def untouched(width, dtype, backend):
    """What `pair` gives as it is: the same for every value that a test puts into it."""
    return run(*pair(width, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_student_excludes_a_column(place, dtype, backend):
    """p = 0 there: nothing for R and H, F = +inf with its usual gradient p - w."""
    width, column = place
    x, y, tokens = pair(width, dtype)
    x[1, column] = -INF
    tokens[1] = (column + 1) % width
    stats, gradients = run(x, y, tokens, backend)
    (exact, _), (eager, _) = exact_and_eager(x, y, tokens)
    for name in ("logprob", "entropy", "reverse_kl", "teacher_entropy", "teacher_logprob"):
        assert_no_worse(getattr(stats, name), getattr(eager, name), getattr(exact, name), name, terms=width)
    assert stats.forward_kl[1] == INF and stats.forward_kl[0].isfinite()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    p, w = x.double().softmax(-1), y.double().softmax(-1)
    tolerance = 4 * torch.finfo(dtype).eps + 1e-6
    assert torch.allclose(gradients["forward_kl"].double(), p - w, atol=tolerance, rtol=tolerance)
    for name in ("entropy", "reverse_kl"):
        assert gradients[name][1, column] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_teacher_excludes_a_column(place, dtype, backend):
    """R = +inf, and R passes no gradient in that row; F and the rest are as usual."""
    width, column = place
    x, y, tokens = pair(width, dtype)
    y[1, column] = -INF
    tokens[1] = (column + 1) % width
    stats, gradients = run(x, y, tokens, backend)
    (exact, _), (eager, _) = exact_and_eager(x, y, tokens)
    for name in ("logprob", "entropy", "forward_kl", "teacher_entropy", "teacher_logprob"):
        assert_no_worse(getattr(stats, name), getattr(eager, name), getattr(exact, name), name, terms=width)
    assert stats.reverse_kl[1] == INF and stats.reverse_kl[0].isfinite()
    assert torch.equal(gradients["reverse_kl"][1], torch.zeros(width, dtype=dtype))
    assert gradients["reverse_kl"][0].abs().max() > 0
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name


def test_an_infinite_reverse_kl_leaves_the_other_gradients_alone(backend):
    x, y, tokens = pair(130)
    y[1, 7] = -INF
    logits = x.clone().requires_grad_()
    stats = cf.token_stats(logits, y, tokens, backend=backend)
    both = torch.autograd.grad((stats.reverse_kl + stats.logprob + stats.forward_kl)[1], logits, retain_graph=True)[0]
    rest = torch.autograd.grad((stats.logprob + stats.forward_kl)[1], logits)[0]
    assert torch.allclose(both, rest, atol=1e-7)


def test_both_exclude_a_column(place, backend):
    """As if the column were not there."""
    width, column = place
    x, y, tokens = pair(width)
    x[:, column], y[:, column] = -INF, -INF
    kept = [i for i in range(width) if i != column]
    tokens = torch.tensor([kept[0], kept[1], kept[-1]])
    stats, gradients = run(x, y, tokens, backend)
    index = torch.tensor([kept.index(int(t)) for t in tokens])
    fewer, fewer_gradients = run(x[:, kept], y[:, kept], index, backend)
    for got, want in zip(stats, fewer, strict=True):
        assert got.isfinite().all() and torch.allclose(got, want, rtol=2e-6, atol=2e-6)
    for name, gradient in gradients.items():
        assert torch.equal(gradient[:, column], torch.zeros(3)), name
        assert torch.allclose(gradient[:, kept], fewer_gradients[name], atol=2e-6), name


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_most_columns_are_excluded(which, backend):
    """A model restricted to 50 tokens of 40000: whole blocks and segments are -inf."""
    x, y, _ = pair(40000)
    restricted = x if which == "student" else y
    allowed = here(torch.randperm(40000, generator=torch.Generator().manual_seed(3), device="cpu"))[:50]
    low = torch.full_like(restricted, -INF)
    low[:, allowed] = restricted[:, allowed] - 1000  # far below whatever reference an empty block might leave
    x, y = (low, y) if which == "student" else (x, low)
    tokens = allowed[:3]
    stats, gradients = run(x, y, tokens, backend)
    (exact, _), _ = exact_and_eager(x, y, tokens)
    for name in stats._fields:
        got, want = getattr(stats, name).double(), getattr(exact, name).double()
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5), name
    assert (stats.forward_kl if which == "student" else stats.reverse_kl).isposinf().all()
    for gradient in gradients.values():
        assert gradient.isfinite().all()


@pytest.mark.parametrize("token_logit", ["student", "teacher"])
def test_the_token_itself_is_excluded(token_logit, backend):
    x, y, tokens = pair(130)
    (x if token_logit == "student" else y)[1, tokens[1]] = -INF
    stats, gradients = run(x, y, tokens, backend)
    excluded = stats.logprob if token_logit == "student" else stats.teacher_logprob
    assert excluded[1] == -INF and excluded[0].isfinite()
    assert all(g.isfinite().all() for g in gradients.values())
    expected = torch.nn.functional.one_hot(tokens, 130) - x.double().softmax(-1)
    assert torch.allclose(gradients["logprob"].double(), expected, atol=1e-6)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row(place, value, which, dtype, backend):
    width, column = place
    x, y, tokens = pair(width, dtype)
    clean, clean_gradients = untouched(width, dtype, backend)
    (x if which == "student" else y)[1, column] = value
    stats, gradients = run(x, y, tokens, backend)
    others = torch.tensor([0, 2])
    for name in stats._fields:
        assert getattr(stats, name)[1].isnan(), name
        assert torch.equal(getattr(stats, name)[others], getattr(clean, name)[others]), name
    for name, gradient in gradients.items():
        assert gradient[1].isnan().any(), name
        assert torch.equal(gradient[others], clean_gradients[name][others]), name


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_row_without_any_column_is_nan(which, backend):
    x, y, tokens = pair(5000)
    (x if which == "student" else y)[1] = -INF
    stats, _ = run(x, y, tokens, backend)
    for name in stats._fields:
        assert getattr(stats, name).isnan().tolist() == [False, True, False], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_one_hot(size, dtype, backend):
    """Two models that are certain, of the same token in one row and of different ones in the others."""
    width = 300
    x, y = torch.zeros(3, width, dtype=dtype), torch.zeros(3, width, dtype=dtype)
    x[:, 7], y[0, 7], y[1, 8], y[2, width - 1] = size, size, size, size
    tokens = torch.tensor([7, 7, 8])
    stats, gradients = run(x, y, tokens, backend)
    (exact, _), (eager, _) = exact_and_eager(x, y, tokens)
    for name in stats._fields:
        assert_no_worse(getattr(stats, name), getattr(eager, name), getattr(exact, name), name, terms=width)
    assert stats.reverse_kl[1].item() == pytest.approx(float(x[1, 7]), rel=1e-5)
    assert stats.entropy.abs().max() < 1e-6
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("width", [64, 5000])
def test_logits_of_ten_thousand(width, backend):
    """±1e4: most probabilities underflow to zero, divergences are of the order of 1e4."""
    x, y, tokens = (make_logits(4, width, seed=0).sign() * 1e4, make_logits(4, width, scale=1e4, seed=1), None)
    tokens = make_tokens(4, vocab=width)
    weights = {name: torch.ones(4) for name in DIFFERENTIABLE}
    logits = x.clone().requires_grad_()
    stats = cf.token_stats(logits, y, tokens, backend=backend)
    gradient = torch.autograd.grad(weighted_sum(stats, weights), logits)[0]
    (exact, exact_gradient), (eager, eager_gradient) = exact_and_eager(x, y, tokens, weights)
    for name in stats._fields:
        assert_no_worse(getattr(stats, name), getattr(eager, name), getattr(exact, name), name, terms=width)
    assert gradient.isfinite().all()
    assert_no_worse(gradient, eager_gradient, exact_gradient, "gradient", size=float(exact.reverse_kl.max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_the_lowest_finite_number(dtype, backend):
    """Columns masked with finfo.min weigh nothing, but are not excluded: divergences stay finite where they fit."""
    x, y, tokens = pair(5000, dtype)
    lowest = torch.finfo(dtype).min
    x[:, 100:2000], y[:, 100:2000] = lowest, lowest
    stats, gradients = run(x, y, tokens, backend)
    kept = [*range(100), *range(2000, 5000)]
    fewer, _ = run(x[:, kept], y[:, kept], tokens, backend)
    for got, want in zip(stats, fewer, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients.values())


def test_a_finite_abyss_is_not_an_exclusion(backend):
    """The teacher at -3e38 where the student has weight: R is about p · 3e38 and finite, not +inf."""
    x, y, tokens = pair(200)
    y[:, 9] = -3e38
    stats, gradients = run(x, y, tokens, backend)
    p = x.double().softmax(-1)[:, 9]
    assert torch.allclose(stats.reverse_kl.double(), p * 3e38, rtol=1e-4)
    assert gradients["reverse_kl"].isfinite().all()


@pytest.mark.parametrize("width", [100, 40000])  # of one block, and in the first of several segments
def test_the_gradient_at_a_finite_abyss(width, backend):
    """The teacher at finfo.min where the student has e^-80 of the weight: R is thousands, nearly all of it there."""
    x, y = torch.zeros(1, width), torch.zeros(1, width)
    x[0, 7], y[0, 7] = math.log(width) - 80, torch.finfo(torch.float32).min
    tokens, weights = torch.tensor([0]), {"reverse_kl": torch.ones(1)}
    (_, exact), (_, eager) = exact_and_eager(x, y, tokens, weights)
    x.requires_grad_()
    gradient = torch.autograd.grad(cf.token_stats(x, y, tokens, backend=backend).reverse_kl.sum(), x)[0]
    assert_no_worse(gradient, eager, exact)
    assert gradient[0, 7] > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_rows_that_are_finfo_min_throughout(dtype, which, backend):
    """What a mask leaves of a row that is masked altogether: a uniform distribution, very far down."""
    x, y = make_logits(2, 50, dtype=dtype), make_logits(2, 50, dtype=dtype, seed=1)
    flat_x, flat_y = x.clone(), y.clone()
    for logits, flat in {"student": [(x, flat_x)], "teacher": [(y, flat_y)]}.get(which, [(x, flat_x), (y, flat_y)]):
        logits[1], flat[1] = torch.finfo(dtype).min, 0.0
    stats, gradients = run(x, y, torch.tensor([3, 4]), backend)
    expected, expected_gradients = run(flat_x, flat_y, torch.tensor([3, 4]), backend)
    for got, want in zip(stats, expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], rtol=1e-2, atol=1e-6), name


@pytest.mark.mixture
def test_divergences_with_excluded_columns(place, backend):
    width, column = place
    x, y, _ = pair(width)
    x[1, column], y[2, column] = -INF, -INF
    for kind, beta in (("jsd", 0.5), ("jsd", 0.1), ("skew_forward_kl", 0.1), ("skew_reverse_kl", 0.3)):
        logits, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        value = cf.divergence(logits, y, kind, beta=beta, backend=backend)
        gradient = torch.autograd.grad(value.sum(), logits)[0]
        exact = cf.reference.divergence(wide, y.double(), kind, beta=beta)
        exact_gradient = torch.autograd.grad(exact.sum(), wide)[0]
        assert value.isfinite().all() and gradient.isfinite().all()
        assert torch.allclose(value.double(), exact, atol=4e-6, rtol=1e-5), kind
        assert torch.allclose(gradient.double(), exact_gradient, atol=2e-6), kind


@pytest.mark.mixture
def test_divergence_of_disjoint_models_is_log_two(backend):
    x, y = torch.full((1, 40), -INF), torch.full((1, 40), -INF)
    x[0, :20], y[0, 20:] = 0.0, 0.0
    assert cf.divergence(x, y, "jsd", backend=backend).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.mixture
@pytest.mark.parametrize("value", [NAN, INF])
def test_divergence_of_a_bad_row_is_nan(value, backend):
    x, y, _ = pair(130)
    y[1, 100] = value
    assert cf.divergence(x, y, "jsd", backend=backend).isnan().tolist() == [False, True, False]

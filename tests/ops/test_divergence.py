"""divergence against the float64 reference and the worked numbers."""

import itertools

import pytest
import torch
from helpers import DTYPES, assert_no_worse, finest, make_logits, make_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import cmdp_fast as cf
from cmdp_fast import reference

pytestmark = pytest.mark.mixture

KINDS = (
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("jsd", 0.0),
    ("jsd", 0.1),
    ("jsd", 0.5),
    ("jsd", 1.0),
    ("skew_forward_kl", 0.0),
    ("skew_forward_kl", 0.1),
    ("skew_reverse_kl", 0.1),
    ("skew_reverse_kl", 0.9),
)


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("width", [1, 7, 33, 4101, 20000])
def test_values_and_gradients(kind, beta, width, backend):
    check(make_logits(3, width), make_logits(3, width, seed=1), kind, beta, backend)


@pytest.mark.parametrize(
    "student_offset, teacher_offset",
    [(100, 0), (0, -100), (1e4, -1e4), (4e6, -3e6), (1e9, 0), (0, -1e12), (1e20, 1e30), (0, 3e38), (-3e38, 0)],
)
def test_offsets_cost_no_precision(student_offset, teacher_offset, backend):
    x, y = make_logits(3, 3000, offset=student_offset), make_logits(3, 3000, offset=teacher_offset, seed=1)
    check(x, y, "jsd", 0.3, backend)


@pytest.mark.parametrize("student, teacher", list(itertools.product(DTYPES, DTYPES)))
def test_every_pair_of_dtypes(student, teacher, backend):
    x, y = make_logits(3, 333, dtype=student), make_logits(3, 333, dtype=teacher, seed=1)
    check(x, y, "jsd", 0.3, backend, temperature=0.7)


def check(x, y, kind, beta, backend, **given):
    def run(function, cast, **extra):
        logits = cast(x.detach().clone()).requires_grad_()
        value = function(logits, cast(y), kind, beta=beta, **given, **extra)
        weight = torch.arange(1.0, len(x) + 1)
        return value, torch.autograd.grad((value * weight).sum(), logits)[0]

    value, gradient = run(cf.divergence, lambda t: t, backend=backend)
    plain = {("jsd", 0.0): "forward_kl", ("jsd", 1.0): "reverse_kl"}.get((kind, beta))
    if kind.startswith("skew") and beta == 0:
        plain = kind.removeprefix("skew_")
    if plain:  # the reference's mixture has no ends
        kind = plain
    exact, eager = (run(reference.divergence, lambda t, d=d: t.to(d)) for d in _dtypes(x, y))
    width = x.shape[-1]
    assert value.dtype == reference.compute_dtype(x, y) and gradient.dtype == x.dtype
    assert_no_worse(value, eager[0], exact[0], kind, terms=width)
    size = 3 * float(exact[0].detach().abs().max()) / given.get("temperature", 1.0)
    assert_no_worse(gradient, eager[1].to(x.dtype), exact[1], f"gradient of {kind}", size=size, terms=width)


def _dtypes(x, y):
    return torch.float64, reference.compute_dtype(x, y)


def test_worked_example(vectors, backend):
    v = vectors["worked_example"]["divergences"]
    dtype, exact, _ = finest(backend)
    p, q = (torch.tensor([v[name]], dtype=torch.float64).log().to(dtype) for name in "pq")
    for beta, expected in v["jsd"].items():
        assert cf.divergence(p, q, "jsd", beta=float(beta), backend=backend).item() == pytest.approx(
            expected, abs=exact
        )
    assert cf.divergence(p, q, "reverse_kl", backend=backend).item() == pytest.approx(v["reverse_kl"], abs=exact)
    assert cf.divergence(p, q, "forward_kl", backend=backend).item() == pytest.approx(v["forward_kl"], abs=exact)
    assert cf.divergence(p, q, "jsd", beta=0.0, backend=backend).item() == pytest.approx(v["forward_kl"], abs=exact)
    assert cf.divergence(p, q, "jsd", beta=1.0, backend=backend).item() == pytest.approx(v["reverse_kl"], abs=exact)


@pytest.mark.float64
@pytest.mark.parametrize("kind, beta", KINDS)
def test_gradcheck(kind, beta, backend):
    x, y = make_logits(3, 9, dtype=torch.float64).requires_grad_(), make_logits(3, 9, dtype=torch.float64, seed=1)
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(
        lambda logits: cf.divergence(
            logits, y, kind, beta=beta, mask=mask, temperature=0.7, vocab_size=8, backend=backend
        ),
        x,
    )


def test_mask_and_vocab_size(backend):
    x, y = make_logits(4, 60), make_logits(4, 70, seed=1)
    mask = torch.tensor([True, False, True, False])
    expected = cf.divergence(x[:, :50], y[:, :50], backend=backend)
    x[~mask], x[:, 50:] = torch.nan, torch.nan
    x.requires_grad_()
    value = cf.divergence(x, y, mask=mask, vocab_size=50, backend=backend)
    assert torch.equal(value, torch.where(mask, expected, 0.0))
    gradient = torch.autograd.grad(value.sum(), x)[0]
    assert gradient.isfinite().all() and not gradient[~mask].any() and not gradient[:, 50:].any()


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_jsd_is_symmetric_bounded_and_not_negative(seed, beta):
    x, y = make_logits(3, 41, seed=seed), make_logits(3, 41, seed=seed + 1)
    value = cf.divergence(x, y, "jsd", beta=beta)
    entropy = -(beta * torch.tensor(beta).log() + (1 - beta) * torch.tensor(1 - beta).log())
    assert (value >= 0).all() and (value <= entropy + 1e-6).all()
    assert torch.allclose(value, cf.divergence(y, x, "jsd", beta=1 - beta), atol=2e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "kl"}, "kind='kl' is unknown; expected one of reverse_kl"),
        ({"beta": 1.5}, r"beta must lie in \[0, 1\], got 1.5"),
        ({"kind": "skew_forward_kl", "beta": 1}, "beta must be below 1"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask must have the shape of .*\[4\], got \[3\]"),
        ({"temperature": -1.0}, "temperature must be positive"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        cf.divergence(make_logits(4, 9), make_logits(4, 9), **arguments)


def test_a_kl_equals_the_statistic(backend):
    x, y, tokens = make_logits(4, 90), make_logits(4, 90, seed=1), make_tokens(4, vocab=90)
    stats = cf.token_stats(x, y, tokens, backend=backend)
    assert torch.equal(cf.divergence(x, y, "reverse_kl", backend=backend), stats.reverse_kl)
    assert torch.equal(cf.divergence(x, y, "forward_kl", backend=backend), stats.forward_kl)


@pytest.mark.parametrize("beta", [5e-324, 1e-17, 2.0**-54, 2.0**-53])
def test_a_skew_too_small_for_the_other_weight(beta, backend):
    """1 - beta may be 1, which is no weight of a mixture."""
    x, y = make_logits(3, 7).requires_grad_(), make_logits(3, 7, seed=1)
    value, plain = (cf.divergence(x, y, "skew_reverse_kl", beta=b, backend=backend) for b in (beta, 0.0))
    gradient, expected = (torch.autograd.grad(v.sum(), x)[0] for v in (value, plain))
    assert torch.allclose(value, plain) and torch.allclose(gradient, expected, atol=1e-6)
    jsd = cf.divergence(x, y, "jsd", beta=beta, backend=backend)  # of a mixture, however small; of beta 0 a KL
    assert (jsd < 1e-6).all()

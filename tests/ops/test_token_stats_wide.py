"""Rows as wide as a language model's vocabulary, padded, in float32: right to rounding, whatever eager PyTorch's error.

A sum in sequence, such as `torch.log_softmax` makes on a CPU, is off by 1e-5 of such a row, and with it every
probability: where the teacher all but excludes columns that the student uses, the reverse KL by thousandths.
"""

import math
from typing import NamedTuple

import pytest
import torch
from helpers import DIFFERENTIABLE, assert_no_worse, make_logits, make_tokens

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.ops.backends import INTERPRETED

VOCAB = 152064
LOWEST = torch.finfo(torch.float32).min

# The last columns: how many, what the student has there and what the teacher; None for what a real column has.
PADDED = {
    "not at all": (0, None, None),
    "alike": (400, 0.0, 0.0),
    "by the lowest number": (400, LOWEST, LOWEST),
    "by -inf": (400, -torch.inf, -torch.inf),
    "the teacher": (4000, None, -1e4),
    "a third of the teacher": (50000, None, -1e4),
    "the student": (400, -1e4, None),
}


def padded(name, scale):
    count, student, teacher = PADDED[name]
    rows = 1 if INTERPRETED else 2
    x, y = make_logits(rows, VOCAB, scale=scale), make_logits(rows, VOCAB, scale=scale, seed=1)
    for logits, value in ((x, student), (y, teacher)):
        if value is not None:
            logits[:, VOCAB - count :] = value
    return x, y


def with_gradient(value, leaf):
    """A value, and the gradient of its sum."""
    return value.detach(), torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0]


class Sizes(NamedTuple):
    """What a value and its gradient are differences of, as far as that is larger than they are."""

    value: float = 1.0
    gradient: float = 1.0


def assert_rounded(ours, exact, name, sizes):
    """The criterion against an eager PyTorch that makes no error: eight units in the last place."""
    for what, a, b, size in zip((name, f"gradient of {name}"), ours, exact, sizes, strict=True):
        assert_no_worse(a, b, b, what, size=size)


@pytest.mark.parametrize("scale", [3.0] if INTERPRETED else [1.0, 3.0, 6.0])
@pytest.mark.parametrize("name", ["alike", "the teacher"] if INTERPRETED else PADDED)
def test_statistics_are_right_to_rounding(name, scale, backend):
    x, y = padded(name, scale)
    tokens = make_tokens(len(x), vocab=VOCAB - 50000)
    leaf, wide = x.requires_grad_(), x.detach().double().requires_grad_()
    ours = cf.token_stats(leaf, y, tokens, backend=backend)
    exact = reference.token_stats(wide, y.double(), tokens)
    for statistic in DIFFERENTIABLE:
        value = getattr(exact, statistic)
        # Divergences are differences of cross-entropy and entropy. The gradients p (log p + H) and
        # p (log p - log w - R) have the rounding of H and R.
        itself = float(value.detach().max()) if statistic in ("entropy", "reverse_kl") else 1.0
        assert_rounded(
            with_gradient(getattr(ours, statistic), leaf),
            with_gradient(value, wide),
            statistic,
            Sizes(value=math.log(VOCAB), gradient=itself),
        )


@pytest.mark.mixture
@pytest.mark.parametrize("kind", ["jsd"] if INTERPRETED else ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("name", ["not at all", "the teacher"])
def test_divergences_are_right_to_rounding(name, kind, backend):
    x, y = padded(name, 3.0)
    leaf, wide = x.requires_grad_(), x.detach().double().requires_grad_()
    ours = cf.divergence(leaf, y, kind, beta=0.1, backend=backend)
    exact = reference.divergence(wide, y.double(), kind, beta=0.1)
    assert_rounded(with_gradient(ours, leaf), with_gradient(exact, wide), kind, Sizes())


def test_dropped_mass_is_right_to_rounding():
    y = make_logits(4, VOCAB)
    exact = y.double().softmax(-1)[:, 100000:].sum(-1)
    assert_no_worse(cf.dropped_teacher_mass(y, 100000), exact, exact)

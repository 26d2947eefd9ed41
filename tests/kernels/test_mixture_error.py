"""The mixture's kernels with the largest errors that an NVIDIA GPU's approximate instructions may make.

The interpreter knows no such instruction. Here log2 and the reciprocal are exact, and then wrong by as much as the PTX
ISA allows, in each direction at random and always in the same one; the result is held to the criterion of all others.
"""

import sys

import pytest
import torch
from helpers import assert_no_worse, make_logits

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.ops import backends
from cmdp_fast.ops.backends import INTERPRETED

kernels = backends.get("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.mixture,
    pytest.mark.skipif(not INTERPRETED, reason="a GPU has errors of its own; these are put in by the interpreter"),
]
triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

if INTERPRETED:
    OF_LOG = tl.constexpr(2.0**-22)  # lg2.approx: absolute for 1/2 < g < 2, relative elsewhere
    OF_RECIPROCAL = tl.constexpr(2.0**-23)  # rcp.approx: one unit in the last place

    @triton.jit
    def coin(g):
        """+1 or -1, by the bits of a number."""
        bits = (g.to(tl.int32, bitcast=True) * 40503) >> 9
        return tl.where((bits & 1) == 0, 1.0, -1.0)

    @triton.jit
    def log2_up(g, PTX: tl.constexpr):
        exact = tl.log2(g)
        return exact + OF_LOG * tl.maximum(tl.abs(exact), 1.0)

    @triton.jit
    def log2_down(g, PTX: tl.constexpr):
        exact = tl.log2(g)
        return exact - OF_LOG * tl.maximum(tl.abs(exact), 1.0)

    @triton.jit
    def log2_either(g, PTX: tl.constexpr):
        exact = tl.log2(g)
        return exact + coin(g) * OF_LOG * tl.maximum(tl.abs(exact), 1.0)

    @triton.jit
    def reciprocal_up(g, PTX: tl.constexpr):
        return (1.0 / g) * (1 + OF_RECIPROCAL)

    @triton.jit
    def reciprocal_down(g, PTX: tl.constexpr):
        return (1.0 / g) * (1 - OF_RECIPROCAL)

    @triton.jit
    def reciprocal_either(g, PTX: tl.constexpr):
        return (1.0 / g) * (1 + coin(g) * OF_RECIPROCAL)

    ERRORS = {
        "up": (log2_up, reciprocal_up),
        "down": (log2_down, reciprocal_down),
        "apart": (log2_up, reciprocal_down),
        "either": (log2_either, reciprocal_either),
    }


def pairs():
    """Student and teacher: unrelated, nearly equal, equal, far apart, and of one column."""
    x = make_logits(3, 2500)
    yield "unrelated", x, make_logits(3, 2500, seed=1)
    yield "near", x, x + make_logits(3, 2500, seed=2, scale=1e-3)
    yield "equal", x, x.clone()
    yield "shifted", x, x + 7.0
    yield "far", make_logits(3, 2500, scale=40.0), make_logits(3, 2500, scale=40.0, seed=3)
    certain = torch.zeros(3, 2500)
    certain[:, 7] = 60.0
    yield "certain", certain, certain.roll(1, -1)


@pytest.mark.parametrize(
    "kind, beta, error",
    [
        *(("jsd", 0.5, error) for error in ("up", "down", "apart", "either")),
        *(("jsd", beta, error) for beta in (0.01, 0.9) for error in ("apart", "either")),
        *((kind, 0.1, error) for kind in ("skew_reverse_kl", "skew_forward_kl") for error in ("apart", "either")),
    ],
)
def test_the_largest_errors_are_no_worse_than_eager(error, kind, beta, monkeypatch):
    mixture = sys.modules[f"{kernels.__name__}.mixture"]
    log2, reciprocal = ERRORS[error]
    monkeypatch.setattr(mixture, "log2_of", log2)
    monkeypatch.setattr(mixture, "reciprocal", reciprocal)
    for name, x, y in pairs():

        def run(function, dtype, x=x, y=y, **settings):
            logits = x.detach().to(dtype).requires_grad_()
            value = function(logits, y.to(dtype), kind, beta=beta, **settings)
            return value.detach(), torch.autograd.grad(value.sum(), logits)[0]

        ours = run(cf.divergence, torch.float32, backend="triton")
        eager, exact = (run(reference.divergence, dtype) for dtype in (torch.float32, torch.float64))
        assert_no_worse(ours[0], eager[0], exact[0], f"value, {name}")
        assert_no_worse(ours[1], eager[1], exact[1], f"gradient, {name}", size=3 * float(exact[0].max()))

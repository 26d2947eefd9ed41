"""The gradient as every operation writes it: into memory that may hold anything, all columns of it."""

import pytest
import torch
from helpers import make_logits, make_tokens

import cmdp_fast as cf
from cmdp_fast.layout import Pair, Upstream
from cmdp_fast.ops import backends
from cmdp_fast.states import saved_scalars, statistics


@pytest.mark.parametrize("first, last", [(0, 20), (0, 37), (11, 30)])
def test_columns_beyond_those_that_count_get_zero(first, last, backend):
    """A tile [first, last) of 37 columns, in rows 5 columns wider, of which the gradient alone is NaN before."""
    x, y, tokens = make_logits(3, 37), make_logits(3, 37, seed=1), make_tokens(3, vocab=37)
    upstream = Upstream(*(make_logits(3, scale=1.0, seed=i) for i in range(4)))
    fields = cf.TokenState.empty(3).update(x, y, tokens).fields
    saved = saved_scalars(fields, statistics(fields))
    tile = slice(first, last)
    wide = torch.nn.functional.pad(x[:, tile], (0, 5)), torch.nn.functional.pad(y[:, tile], (0, 5))
    out = torch.full_like(wide[0], torch.nan)
    pair = Pair(*wide, tokens, None, 1.0, last - first)
    backends.get(backend).token_stats_backward(pair, saved, upstream, out, first)

    leaf = x.double().requires_grad_()
    stats = cf.token_stats(leaf, y.double(), tokens, backend="torch")
    values = (stats.logprob, stats.entropy, stats.reverse_kl, stats.forward_kl)
    expected = torch.autograd.grad(sum((v * g).sum() for v, g in zip(values, upstream, strict=True)), leaf)[0]
    assert torch.equal(out[:, last - first :], torch.zeros(3, 5))
    # Sums of four float32 terms no larger than a few units: some roundings of 1e-7.
    torch.testing.assert_close(out[:, : last - first].double(), expected[:, tile], rtol=0, atol=3e-6)


def test_a_rank_without_columns_has_a_gradient_of_zero(backend):
    x, tokens = make_logits(3, 37), make_tokens(3, vocab=37)
    garbage = torch.full_like(x, torch.nan)
    del garbage  # whose memory comes back next
    upstream = (torch.ones(3), None, None, None)
    out = torch.ops.cmdp_fast.sharded_token_stats_backward(
        x, x, tokens, None, 1.0, 0, torch.zeros(3, 7, dtype=torch.float64), 37, backend, *upstream
    )
    assert torch.equal(out, torch.zeros_like(x))

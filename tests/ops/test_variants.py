"""Every variant of the native kernels that this processor runs, of which only the best is chosen: special values, and
rows of more segments than lie on a thread's stack."""

import pytest
import torch
from helpers import DIFFERENTIABLE, assert_no_worse, exact_and_eager, make_logits, weighted_sum
from topk_inputs import given

import cmdp_fast as cf
from cmdp_fast.cpu import native

pytestmark = pytest.mark.skipif(native is None, reason="the native module is not built")
INF, NAN = torch.inf, torch.nan
WIDTH = 4237  # a block of the widest vectors, a vector, and a rest
PLACES = (0, 4223, 4224, WIDTH - 1)  # the first column, the edge of all variants' blocks, the rest


def special_rows(dtype):
    """Two rows of a pair's logits for each of some special values at each of some places, and tokens elsewhere."""
    kinds = ((NAN, None), (None, NAN), (INF, None), (None, INF), (-INF, None), (None, -INF), (-INF, -INF), (60, 50))
    pairs = [(*values, place) for values in kinds for place in PLACES]
    x, y = (make_logits(len(pairs) + 3, WIDTH, dtype=dtype, seed=seed) for seed in (0, 1))
    for row, (mine, theirs, place) in enumerate(pairs):
        for logits, value in ((x, mine), (y, theirs)):
            if value is not None:
                logits[row, place] = value
    x[-1], y[-2] = -INF, -INF  # one of the two has no distribution
    y[-3, 5:] = -INF
    return x, y, torch.full((len(x),), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_special_values(variant, dtype):
    x, y, tokens = special_rows(dtype)
    weights = {name: make_logits(len(x), scale=1.0, seed=i) for i, name in enumerate(DIFFERENTIABLE)}
    leaf = x.clone().requires_grad_()
    stats = cf.token_stats(leaf, y, tokens, backend="cpu")
    (gradient,) = torch.autograd.grad(weighted_sum(stats, weights), leaf)
    exact, eager = exact_and_eager(x, y, tokens)
    for name in stats._fields:
        ours, theirs, right = (getattr(source, name) for source in (stats, eager[0], exact[0]))
        assert torch.equal(ours.isnan(), right.isnan()) and torch.equal(ours.isinf(), right.isinf()), name
        fine = right.isfinite()
        assert_no_worse(ours[fine], theirs[fine], right[fine], name, size=60.0, terms=WIDTH)
    lost = stats.logprob.isnan()
    assert torch.equal(gradient.isnan().any(-1), lost) and gradient[~lost].isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("place", PLACES)
def test_a_bad_logit_of_a_tail(variant, place, bad):
    student, message, tokens = given(2, vocab=WIDTH, k=4)
    assert not (message.topk_ids[1] == place).any()
    student[1, place] = bad
    stats = cf.topk_stats(student, *message[:2], tokens, backend="cpu")
    assert stats.logprob.isnan().tolist() == stats.forward_kl.isnan().tolist() == [False, True]


def test_more_segments_than_a_stack_holds(variant):
    """65 of the widest variant's, and 130 or 260 of the others'."""
    width = 65 * 33_792 - 5
    logits, tokens = make_logits(1, width), torch.tensor([width - 3])
    stats = cf.token_stats(logits, logits.flip(1), tokens, backend="cpu")
    right = logits.double().log_softmax(-1)
    assert stats.logprob.item() == pytest.approx(right[0, -3].item(), abs=1e-5)
    assert stats.teacher_logprob.item() == pytest.approx(right[0, 2].item(), abs=1e-5)
    assert stats.entropy.item() == pytest.approx(-(right.exp() * right).sum().item(), abs=1e-4)

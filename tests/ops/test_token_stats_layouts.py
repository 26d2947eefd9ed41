"""token_stats wherever its rows lie, and whatever lies beside them: layouts, invariances, the reference itself."""

import itertools
import math

import pytest
import torch
from helpers import (
    DIFFERENTIABLE,
    check_token_stats,
    make_logits,
    make_tokens,
    needs_memory,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.cpu import native
from cmdp_fast.ops.backends import INTERPRETED

needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")

LAYOUTS = {
    "shifted": lambda base: base[:, :-1],
    "transposed rows": lambda base: base.transpose(0, 1),
    "strided rows": lambda base: base[::2, 1::3],
    "columns of a wider matrix": lambda base: base[..., 7:50],
    "strided columns": lambda base: base[..., ::2],
    "transposed columns": lambda base: base[:2].transpose(1, 2),
    "expanded": lambda base: base[:1].expand(6, 5, 64),
    "one row": lambda base: base[0, 0],
    "four dimensions": lambda base: base.view(2, 3, 5, 64).permute(2, 0, 1, 3),
    "three strides": lambda base: base.view(2, 3, 5, 64).permute(1, 2, 0, 3)[:, ::2],
}


@pytest.mark.parametrize(
    "name, inplace",
    # Interpreted, every layout once: overwritten or not by turns
    zip(LAYOUTS, itertools.cycle([False, True])) if INTERPRETED else itertools.product(LAYOUTS, [False, True]),
)
def test_layouts(name, inplace, backend):
    x = LAYOUTS[name](make_logits(6, 5, 64))
    y = make_logits(*x.shape, seed=1)
    tokens = make_tokens(*x.shape[:-1], vocab=x.shape[-1])
    plain, strided = x.contiguous().requires_grad_(), x.clone(memory_format=torch.preserve_format)
    if not inplace:
        strided = x.detach()
    strided.requires_grad_()
    expected = cf.token_stats(plain, y, tokens, backend=backend)
    got = cf.token_stats(strided, y, tokens, inplace_backward=inplace, backend=backend)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    of = [torch.autograd.grad((s.reverse_kl + s.logprob).sum(), t)[0] for s, t in ((got, strided), (expected, plain))]
    assert torch.equal(*of)


SHARING = {
    "expanded": lambda base: base[:1].expand(5, 64),
    "windows": lambda base: base[:1].unfold(0, 1, 1).transpose(1, 2).expand(5, 1, 64).squeeze(1),
    "overlapping windows": lambda base: base.unfold(0, 2, 1).transpose(1, 2)[:, 0],
    "two windows": lambda base: base.unfold(0, 2, 1).transpose(1, 2),
}


@pytest.mark.parametrize("layout", SHARING)
def test_inplace_backward_of_rows_that_share_memory(layout, backend):
    """Where overwriting one row would change another, the gradient goes elsewhere; it is right in any case."""
    leaf = make_logits(6, 64).requires_grad_()
    shape = SHARING[layout](leaf).shape
    y, tokens = make_logits(*shape, seed=1), make_tokens(*shape[:-1], vocab=64)
    gradients = []
    for inplace in (False, True):
        base = leaf.detach().clone().requires_grad_()
        stats = cf.token_stats(SHARING[layout](base), y, tokens, inplace_backward=inplace, backend=backend)
        gradients.append(torch.autograd.grad(stats.reverse_kl.sum(), base)[0])
    assert torch.equal(*gradients)


def test_inplace_backward_with_a_teacher_in_the_same_memory(backend):
    """A shifted teacher is read after the student's row before it has been written; the same rows are no problem."""
    tokens = make_tokens(5, vocab=64)
    for teacher, copied in ((slice(0, 5), True), (slice(1, 6), False)):
        gradients = []
        for inplace in (False, True):
            base = make_logits(6, 64)
            student = base[1:].requires_grad_()
            stats = cf.token_stats(student, base.detach()[teacher], tokens, inplace_backward=inplace, backend=backend)
            gradients.append(torch.autograd.grad((stats.reverse_kl + stats.logprob).sum(), student)[0])
        assert torch.equal(*gradients)
        assert (gradients[1].data_ptr() != student.data_ptr()) == (copied or backend == "torch")


def test_inplace_backward_of_a_slice_copies_nothing(backend):
    base = make_logits(4, 6, 64)
    x = base[:, :-1].requires_grad_()
    y, tokens = make_logits(4, 5, 64, seed=1), make_tokens(4, 5, vocab=64)
    stats = cf.token_stats(x, y, tokens, inplace_backward=True, backend=backend)
    gradient = torch.autograd.grad(stats.reverse_kl.sum(), x)[0]
    if backend != "torch":  # which allocates the gradient
        assert gradient.data_ptr() == base.data_ptr() and gradient.stride() == x.stride()
    assert torch.equal(base[:, -1], make_logits(4, 6, 64)[:, -1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_narrow_tokens(dtype, backend):
    """The vocabulary may be larger than the type of the tokens can say."""
    x, y = make_logits(2, 70000), make_logits(2, 70000, seed=1)
    tokens = torch.tensor([100, 7])
    for got, want in zip(
        cf.token_stats(x, y, tokens.to(dtype), backend=backend), cf.token_stats(x, y, tokens), strict=True
    ):
        assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows(shape, backend):
    x = make_logits(*shape, 11).requires_grad_()
    stats = cf.token_stats(x, make_logits(*shape, 11), make_tokens(*shape, vocab=11), backend=backend)
    assert all(s.shape == shape for s in stats)
    stats.reverse_kl.sum().backward()
    assert x.grad.shape == x.shape


def test_beyond_two_to_the_eighteen_columns(backend):
    width = 2**18 + 1
    check_token_stats(make_logits(1, width), make_logits(1, width, seed=1), torch.tensor([width - 1]), backend)


@needs_native
@needs_memory(7)
def test_beyond_two_to_the_thirty_one_elements():
    """Offsets are 64-bit: the last rows of a 4.3 GB matrix come out as they do alone, forward and backward."""
    rows, width = 14200, 151936
    x = torch.empty(rows, width, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x.copy_(make_logits(width, dtype=torch.bfloat16))
    x[-1] = make_logits(width, dtype=torch.bfloat16, seed=2)
    y = make_logits(1, width, dtype=torch.bfloat16, seed=1).expand(rows, width)
    tokens = make_tokens(rows, vocab=width)
    alone = x[-2:].clone().requires_grad_()
    expected = cf.token_stats(alone, y[-2:], tokens[-2:])
    (expected.reverse_kl - expected.logprob).sum().backward()
    x.requires_grad_()
    stats = cf.token_stats(x, y, tokens, inplace_backward=True)
    for name in stats._fields:
        assert torch.equal(getattr(stats, name)[-2:], getattr(expected, name))
    assert stats.reverse_kl[0] == stats.reverse_kl[1] == stats.reverse_kl[-2] != stats.reverse_kl[-1]
    gradient = torch.autograd.grad((stats.reverse_kl - stats.logprob).sum(), x)[0]
    assert gradient.data_ptr() == x.data_ptr()
    assert torch.equal(gradient[-2:], alone.grad)


@needs_native
@needs_memory(2)
def test_strides_beyond_two_to_the_thirty_one():
    """Two rows more than 2^31 elements apart; the pages between them are never touched."""
    width, apart = 300, 2**31 + 7
    far = torch.empty(apart + width, dtype=torch.bfloat16).as_strided((2, width), (apart, 1))
    far.copy_(make_logits(2, width, dtype=torch.bfloat16))
    y, tokens = make_logits(2, width, seed=1), make_tokens(2, vocab=width)
    for a, b in zip(cf.token_stats(far, y, tokens), cf.token_stats(far.contiguous(), y, tokens), strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------------------
# Invariances


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_does_not_depend_on_the_others_or_on_threads(dtype, threads):
    x = make_logits(9, 40000, dtype=dtype)
    y, tokens = make_logits(9, 40000, dtype=dtype, seed=1), make_tokens(9, vocab=40000)

    def run(rows, count):
        threads(count)
        logits = x[rows].clone().requires_grad_()
        stats = cf.token_stats(logits, y[rows], tokens[rows])
        gradient = torch.autograd.grad(sum(getattr(stats, n).sum() for n in DIFFERENTIABLE), logits)[0]
        return (*stats, gradient)

    everything = run(slice(0, 9), 1)
    for rows, count in itertools.product((slice(0, 9), slice(0, 1), slice(3, 5), slice(2, 9)), (1, 2, 3, 7)):
        for whole, part in zip(everything, run(rows, count), strict=True):
            assert torch.equal(whole[rows], part), (rows, count)


@needs_native
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_masked_row_among_few(rows, threads):
    """When rows are split over threads a masked one is still not read."""
    threads(7)
    x, y, tokens = make_logits(rows, 120000), make_logits(rows, 120000, seed=1), make_tokens(rows, vocab=120000)
    expected = cf.token_stats(x, y, tokens)
    x[0], tokens[0] = torch.nan, -1
    stats = cf.token_stats(x, y, tokens, mask=torch.arange(rows) > 0)
    for got, want in zip(stats, expected, strict=True):
        assert got[0] == 0 and torch.equal(got[1:], want[1:])


def test_masked_rows_are_exactly_zero_and_not_read(backend):
    x, y, tokens = make_logits(5, 300), make_logits(5, 300, seed=1), make_tokens(5, vocab=300)
    mask = torch.tensor([True, False, True, False, True])
    expected = cf.token_stats(x, y, tokens, backend=backend)
    x[~mask], y[~mask], tokens[~mask] = torch.nan, torch.inf, -100
    x.requires_grad_()
    stats = cf.token_stats(x, y, tokens, mask=mask, backend=backend)
    stats_sum = sum(getattr(stats, name).sum() for name in DIFFERENTIABLE)
    gradient = torch.autograd.grad(stats_sum, x)[0]
    for got, full in zip(stats, expected, strict=True):
        assert torch.equal(got, torch.where(mask, full, 0.0))
    assert torch.equal(gradient[~mask], torch.zeros(2, 300)) and gradient[mask].isfinite().all()
    nothing = cf.token_stats(x, y, tokens, mask=torch.zeros(5, dtype=torch.bool), backend=backend)
    assert all(torch.equal(s, torch.zeros(5)) for s in nothing)


def test_vocab_size_compares_a_common_prefix(backend):
    x, y, tokens = make_logits(4, 60), make_logits(4, 75, seed=1), make_tokens(4, vocab=50)
    x[:, 55] = torch.nan  # beyond the prefix nothing is read
    x.requires_grad_()
    stats = cf.token_stats(x, y, tokens, vocab_size=50, backend=backend)
    expected = cf.token_stats(x[:, :50].detach(), y[:, :50], tokens, backend=backend)
    for got, same in zip(stats, expected, strict=True):
        assert torch.equal(got, same)
    gradient = torch.autograd.grad(stats.reverse_kl.sum(), x)[0]
    assert torch.equal(gradient[:, 50:], torch.zeros(4, 10)) and gradient[:, :50].isfinite().all()
    for temperature in (1.0, 3.0):
        mass = cf.dropped_teacher_mass(y, 50, temperature=temperature, rows_at_once=3)
        assert torch.allclose(mass, (y / temperature).softmax(-1)[:, 50:].sum(-1))


logit_rows = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.floats(-30, 30, width=32), min_size=n, max_size=n) for _ in range(2)))
)


@settings(max_examples=60)
@given(logit_rows, st.randoms(use_true_random=False), st.sampled_from([-50.0, 3.0, 1000.0]))
def test_properties(rows, random, shift):
    """KL >= 0, H in [0, log V], invariance under permuted columns and under a shift of either model's logits."""
    x, y = (torch.tensor([row], dtype=torch.float64) for row in rows)
    width = x.shape[1]
    tokens = torch.tensor([random.randrange(width)])
    order = list(range(width))
    random.shuffle(order)
    permuted = torch.tensor([order.index(int(tokens))])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        a, b = x.to(dtype), y.to(dtype)
        base = cf.token_stats(a, b, tokens)
        assert base.reverse_kl >= 0 and base.forward_kl >= 0
        assert base.logprob <= 0 and base.teacher_logprob <= 0
        top = math.log(width) + tolerance
        assert 0 <= base.entropy <= top and 0 <= base.teacher_entropy <= top
        scale = max(1.0, float(base.reverse_kl), float(base.forward_kl))
        for other in (
            cf.token_stats(a[:, order], b[:, order], permuted),
            cf.token_stats((x + shift).to(dtype), b, tokens),
            cf.token_stats(a, (y + shift).to(dtype), tokens),
        ):
            # A shifted float32 logit is rounded to a unit of the shift before we see it.
            slack = tolerance * scale + (4 * abs(shift) * torch.finfo(dtype).eps if other is not base else 0)
            for p, q in zip(base, other, strict=True):
                assert abs(float(p) - float(q)) <= slack


def test_reference_is_the_textbook():
    """The reference against formulas written out once more, so that it is not only compared with itself."""
    x, y = make_logits(5, 13, dtype=torch.float64), make_logits(5, 13, dtype=torch.float64, seed=1)
    tokens = make_tokens(5, vocab=13)
    stats = reference.token_stats(x, y, tokens)
    for i in range(5):
        p, w = x[i].exp() / x[i].exp().sum(), y[i].exp() / y[i].exp().sum()
        assert stats.logprob[i].item() == pytest.approx(float(p[tokens[i]].log()), abs=1e-13)
        assert stats.entropy[i].item() == pytest.approx(-float((p * p.log()).sum()), abs=1e-13)
        assert stats.reverse_kl[i].item() == pytest.approx(float((p * (p / w).log()).sum()), abs=1e-13)
        assert stats.forward_kl[i].item() == pytest.approx(float((w * (w / p).log()).sum()), abs=1e-13)


@pytest.mark.parametrize("axes", [8, 9])
def test_any_number_of_axes_may_lie_scattered(axes, backend):
    """Beyond what the kernels follow, rows are copied; the gradient lies where the logits lie."""
    counts = [3, 2, *[1] * (axes - 2)] if backend in ("triton", "cuda") else [2] * axes  # a row takes them some time
    every_other = tuple(slice(None, None, 2) for _ in range(axes))
    whole = make_logits(*(2 * n - 1 for n in counts), 3)
    tokens = torch.zeros(counts, dtype=torch.long)
    scattered, packed = whole.clone().requires_grad_(), whole[every_other].clone().requires_grad_()
    losses = []
    for logits in (scattered[every_other], packed):
        stats = cf.token_stats(logits, whole[every_other] * 2, tokens, backend=backend)
        tail = cf.topk_stats(logits, tokens[..., None], -1.0 - tokens[..., None].float(), tokens, backend=backend)
        losses.append(sum(getattr(stats, name).sum() for name in DIFFERENTIABLE) + tail.forward_kl.sum())
        if backend != "cuda":
            losses[-1] = losses[-1] + cf.divergence(logits, whole[every_other] * 2, backend=backend).sum()
        losses[-1].backward()
    assert torch.equal(*losses) and torch.equal(scattered.grad[every_other], packed.grad)
    assert scattered.grad.count_nonzero() == packed.grad.count_nonzero()

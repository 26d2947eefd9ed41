"""Where no row counts nothing is read and every result is exactly 0, whatever stood in memory before."""

from __future__ import annotations

import pytest
import torch

import cmdp_fast as cf
from cmdp_fast.ops import budget, constrained
from cmdp_fast.reference import DIVERGENCES

SAVED = ("recompute", "teacher", "tiles")
# Head and hidden states: those whose gradient is summed in a wider type than the head's, and the one that is not.
DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16 head": (torch.bfloat16, torch.float32),
    "bfloat16 hidden": (torch.float32, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "float64 hidden": (torch.float32, torch.float64),
}
SHAPES = [(0,), (1,), (5,), (2, 3), (2, 0)]


def head_inputs(dtypes, shape, vocab=4, width=3):
    torch.manual_seed(0)
    head, hidden = dtypes
    x = torch.randn(*shape, width).to(hidden).requires_grad_()
    w, b = (torch.randn(*size).to(head).requires_grad_() for size in ((vocab, width), (vocab,)))
    teacher = torch.randn(*shape, width).to(hidden), torch.randn(vocab, width).to(head)
    return x, w, b, teacher, torch.zeros(shape, dtype=torch.long)


def assert_zero(*tensors):
    for t in tensors:
        assert t is not None and torch.equal(t, torch.zeros_like(t)), t


def only_float64(name, backend):
    if "float64" in name and backend in ("triton", "cuda"):
        pytest.skip("the GPU kernels take no float64 logits")


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_gradient_of_a_head(name, shape, saved, backend):
    if backend == "cuda":
        pytest.skip("the cuda backend leaves this operation to triton")
    only_float64(name, backend)
    x, w, b, (teacher, teacher_head), tokens = head_inputs(DTYPES[name], shape)
    mask = torch.zeros(shape, dtype=torch.bool)
    stats = cf.linear_token_stats(
        x,
        w,
        teacher,
        teacher_head,
        tokens,
        student_bias=b,
        student_scale=0.5,
        student_softcap=3.0,
        mask=mask,
        vocab_size=3,
        saved=saved,
        backend=backend,
    )
    assert_zero(*stats)
    sum(s.sum() for s in (stats.logprob, stats.entropy, stats.reverse_kl, stats.forward_kl)).backward()
    assert_zero(x.grad, w.grad, b.grad)


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("name", DTYPES)
def test_gradient_through_the_constrained_reward(name, saved, backend):
    if backend == "cuda":
        pytest.skip("the cuda backend leaves this operation to triton")
    only_float64(name, backend)
    shape = (2, 3)
    x, w, b, (teacher, teacher_head), tokens = head_inputs(DTYPES[name], shape)
    out = cf.linear_constrained_reward(
        x,
        w,
        teacher,
        teacher_head,
        tokens,
        torch.ones(shape),
        1.0,
        student_bias=b,
        mask=torch.zeros(shape, dtype=torch.bool),
        saved=saved,
        backend=backend,
    )
    assert_zero(*out.stats, out.reward, out.trace.cumulative, out.trace.excess)
    (out.stats.reverse_kl.sum() + out.stats.logprob.sum()).backward()
    assert_zero(x.grad, w.grad, b.grad)


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("name", DTYPES)
def test_one_row_of_many(name, saved, backend, monkeypatch):
    """Tiles of two rows, of which all but the last hold no row that counts; the gradient is that of the row alone."""
    if backend == "cuda":
        pytest.skip("the cuda backend leaves this operation to triton")
    only_float64(name, backend)
    from cmdp_fast.ops import linear_tiles

    monkeypatch.setattr(linear_tiles, "tile_shape", lambda *_: (2, 3))
    x, w, b, (teacher, teacher_head), tokens = head_inputs(DTYPES[name], (7,))
    mask = torch.arange(7) == 6
    options = {"student_bias": b, "saved": saved, "backend": backend}
    cf.linear_token_stats(x, w, teacher, teacher_head, tokens, mask=mask, **options).reverse_kl.sum().backward()
    found = [x.grad.clone(), w.grad.clone(), b.grad.clone()]
    x.grad = w.grad = b.grad = None
    cf.linear_token_stats(x[6:], w, teacher[6:], teacher_head, tokens[6:], **options).reverse_kl.sum().backward()
    for one, other in zip(found, (x.grad, w.grad, b.grad), strict=True):
        assert torch.equal(one, other) and one.isfinite().all() and one.abs().sum() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_of_logits(inplace, shape, backend):
    torch.manual_seed(0)
    x, y = torch.randn(*shape, 5, requires_grad=True), torch.randn(*shape, 5)
    mask, tokens = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.long)
    stats = cf.token_stats(x * 1, y, tokens, mask=mask, inplace_backward=inplace, vocab_size=4, backend=backend)
    assert_zero(*stats)
    sum(s.sum() for s in (stats.logprob, stats.entropy, stats.reverse_kl, stats.forward_kl)).backward()
    assert_zero(x.grad)


@pytest.mark.mixture
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradient_of_a_divergence(kind, shape, backend):
    torch.manual_seed(0)
    x, y = torch.randn(*shape, 5, requires_grad=True), torch.randn(*shape, 5)
    value = cf.divergence(
        x, y, kind, beta=0.3, mask=torch.zeros(shape, dtype=torch.bool), vocab_size=4, backend=backend
    )
    assert_zero(value)
    value.sum().backward()
    assert_zero(x.grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offsets", [[0], [1, 3], [0, 2, 2], [0, 0]], ids=str)
def test_tokens_of_no_sequence(offsets, masked, backend, monkeypatch):
    """On the CPU such offsets are an error; on a GPU nobody looks, and an account of what no sequence holds is 0."""
    if backend not in ("triton", "cuda"):
        pytest.skip("offsets are checked")
    for module in (budget, constrained):
        monkeypatch.setattr(module, "check_values", lambda *_: None)
    monkeypatch.setattr(budget, "check_offsets", lambda *_: None)
    torch.manual_seed(0)
    x, y, cost, tokens = torch.randn(6, 9), torch.randn(6, 9), torch.ones(6), torch.zeros(6, dtype=torch.long)
    layout = {"cu_seqlens": torch.tensor(offsets), "mask": torch.arange(6) < 3 if masked else None}
    outside = torch.tensor([not offsets[0] <= i < offsets[-1] for i in range(6)])
    trace = cf.budget_trace(cost, 0.5, backend=backend, **layout)
    reward = cf.modified_reward(cost, cost, trace, backend=backend, **layout)
    whole = cf.constrained_reward(x, y, tokens, cost, 0.5, backend=backend, **layout)
    for lines in (trace, whole.trace):
        assert_zero(*(t[outside] for t in (lines.cumulative, lines.remaining, lines.violated, lines.excess)))
    assert_zero(reward[outside], whole.reward[outside])
    assert all(t.isfinite().all() for t in (*whole.stats, reward, whole.reward))
    rows = cf.token_stats(x, y, tokens, mask=layout["mask"], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(whole.stats, rows, strict=True))

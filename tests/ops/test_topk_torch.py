"""What torch expects of the operators of topk_stats: torch.compile, opcheck, fake tensors, autocast, vmap's absence."""

import copy

import pytest
import torch
from helpers import make_logits
from topk_inputs import DIFFERENTIABLE, given, weighted

import cmdp_fast as cf
from cmdp_fast.cpu import native
from cmdp_fast.ops.topk_stats import FoldedTail

pytestmark = [pytest.mark.tiles, pytest.mark.skipif(native is None, reason="the native module is not built")]
OPS = torch.ops.cmdp_fast
HEAD = make_logits(37, 12, scale=0.5, seed=8)


def both(x, hidden, ids, logprobs, floor, tokens, mask):
    stats = cf.topk_stats(x, ids, logprobs, tokens, mask=mask, min_logprob=floor)
    linear = cf.linear_topk_stats(hidden, HEAD, ids, logprobs, tokens, mask=mask, top_k=3)
    verdict = cf.budget_verdict(stats.forward_kl, stats.forward_kl_upper, 1.5, mask=mask)
    parts = (getattr(s, name).sum() for s in (stats, linear) for name in DIFFERENTIABLE)
    return (*stats, *linear, *verdict), sum(i * part for i, part in enumerate(parts, 1))


def inputs(dtype=torch.float32):
    student, message, tokens = given(3, 5, vocab=37, dtype=dtype)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    hidden = make_logits(3, 5, 12, dtype=dtype, scale=1.0, seed=3)
    return student.requires_grad_(), hidden.requires_grad_(), *message, tokens, mask


def test_compile_gives_equal_results():
    """There is one graph, forward and backward. (Inductor compiles [N, k] for most of a minute.)"""
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    arguments = inputs()
    plain, loss = both(*arguments)
    got, compiled_loss = compiled(*arguments)
    for a, b in zip(got, plain, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    ours, theirs = (torch.autograd.grad(value, arguments[:2]) for value in (compiled_loss, loss))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_under_fake_tensors():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs, _ = both(*(mode.from_tensor(t) for t in inputs()))
    assert outputs[0].shape == (3, 5) and outputs[2].dtype == torch.float32


def samples():
    x, hidden, ids, _, _, tokens, mask = inputs()
    ids = ids.sort(-1).values
    rows = (ids, tokens, mask, 0.9, 37)
    for backend in ("cpu", "torch"):
        yield "tail_of_logits", (x, *rows, backend)
        plain = x.detach()
        tail = OPS.tail_of_logits(plain, *rows, backend)
        reference, _, listed, own, log_mass, entropy, _ = tail
        folded = FoldedTail(reference, log_mass, entropy)
        upstream = (torch.rand_like(listed), torch.rand_like(own), None, torch.rand_like(entropy))
        yield "tail_of_logits_backward", (plain, *rows, backend, *folded, *upstream)
        linear = (hidden, HEAD, None, None, 1.0, mask, 37, "", ids, tokens, 0.9, backend)
        yield "linear_tail", linear
        yield (
            "linear_tail_backward",
            (hidden.detach(), *linear[1:], *folded, *upstream, True, True, False),
        )


@pytest.mark.parametrize("name, arguments", list(samples()) if native else [])
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(OPS, name).default, copy.deepcopy(arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_downcast_the_statistics(dtype):
    x, _, ids, logprobs, floor, tokens, mask = inputs()
    plain = cf.topk_stats(x, ids, logprobs, tokens, mask=mask, min_logprob=floor)
    with torch.autocast("cpu", dtype=dtype):
        under = cf.topk_stats(x, ids, logprobs, tokens, mask=mask, min_logprob=floor)
    for a, b in zip(plain, under, strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)


def test_there_is_no_second_derivative():
    x, _, ids, logprobs, _, tokens, _ = inputs()
    stats = cf.topk_stats(x, ids, logprobs, tokens)
    gradient = torch.autograd.grad(stats.reverse_kl.sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_a_checkpoint_and_a_second_backward_pass():
    x, _, ids, logprobs, _, tokens, _ = inputs()

    def loss(x):
        return weighted(cf.topk_stats(x * 1, ids, logprobs, tokens))

    plain = torch.autograd.grad(loss(x), x)[0]
    again = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
    first = torch.autograd.grad(again, x, retain_graph=True)[0]
    assert torch.equal(first, plain) and torch.equal(torch.autograd.grad(again, x)[0], plain)

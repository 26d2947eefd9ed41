"""On a GPU, for both of its backends: graphs, streams, a second device, no waiting for the host."""

import hosted
import pytest
import torch
from helpers import DIFFERENTIABLE, make_logits, make_tokens

import cmdp_fast as cf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
WORKS = cf.available_backends()


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("triton", "cuda")])
def gpu(request):
    """A GPU backend by name."""
    if WORKS[request.param] is not None or (request.param == "cuda" and hosted.HOSTED):
        pytest.skip(f"the {request.param} backend does not work here")
    return request.param


def batch(rows, width, dtype=torch.bfloat16):
    x, y = make_logits(rows, width, dtype=dtype), make_logits(rows, width, dtype=dtype, seed=1)
    return x.cuda(), y.cuda(), make_tokens(rows, vocab=width).cuda()


def everything(x, y, tokens, backend):
    """All statistics and the gradient of all of them."""
    x = x.detach().requires_grad_()
    stats = cf.token_stats(x, y, tokens, backend=backend)
    return [*stats, *torch.autograd.grad(sum(getattr(stats, name).sum() for name in DIFFERENTIABLE), x)]


@pytest.mark.parametrize("width", [5000, 50000])  # of one segment, and of several, whose counters a replay finds clear
def test_graph_capture_and_replay(width, gpu):
    x, y, tokens = batch(8, width)
    x, y, tokens = x.view(2, 4, -1).requires_grad_(), y.view(2, 4, -1), tokens.view(2, 4)
    reward = torch.ones(2, 4, device="cuda")

    def step():
        out = cf.constrained_reward(x, y, tokens, reward, 3.0, backend=gpu)
        return (*out.stats, *out.trace, out.reward, *torch.autograd.grad(out.stats.reverse_kl.sum(), x))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (7, 8):
        with torch.no_grad():
            x.copy_(make_logits(2, 4, width, seed=seed))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


def test_the_recipe_for_a_graph(gpu):
    """What cmdp_fast/ops/README.md says under "CUDA graphs", step by step: forward and backward, three batches."""
    rows, width = (2, 64), 20000
    student = torch.empty(*rows, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    teacher, reward = torch.empty_like(student, requires_grad=False), torch.empty(rows, device="cuda")
    tokens = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def fill(seed):
        with torch.no_grad():
            student.copy_(make_logits(*rows, width, seed=seed))
            teacher.copy_(make_logits(*rows, width, seed=seed + 1))
            tokens.copy_(make_tokens(*rows, vocab=width, seed=seed))
            reward.copy_(make_logits(*rows, seed=seed))

    def step():
        out = cf.constrained_reward(student, teacher, tokens, reward, 40.0, backend=gpu)
        loss = -(out.stats.logprob * out.reward).mean() + 0.1 * out.stats.reverse_kl.mean()
        return loss, out.reward, *torch.autograd.grad(loss, student)

    fill(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (0, 10, 20):
        fill(seed)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert a.isfinite().all() and torch.equal(a, b)


def test_where_rows_begin_changes_no_bit(gpu):
    """In turn at a multiple of 16 bytes and beside one: what was compiled for the one is not launched for the other."""
    for width in (5000, 50000):
        x, y, tokens = batch(8, width)
        expected = everything(x, y, tokens, gpu)
        for shift in (0, 1, 8, 3, 0, 1):
            a, b = (torch.empty(t.numel() + shift, dtype=t.dtype, device="cuda")[shift:].view_as(t) for t in (x, y))
            for first, second in zip(everything(a.copy_(x), b.copy_(y), tokens, gpu), expected, strict=True):
                assert torch.equal(first, second), (width, shift)


def test_a_stream_of_its_own(gpu):
    x, y, tokens = batch(64, 50000)
    expected = everything(x, y, tokens, gpu)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Busy with something else first: a kernel launched on the wrong stream would not wait for it.
        torch.cuda._sleep(50_000_000)
        late = x.clone()
        got = everything(late, y, tokens, gpu)
    everything(x, y, tokens, gpu)  # beside it: neither sees the other's scratch memory
    side.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_two_devices(gpu):
    x, y, tokens = batch(4, 5000)
    first, second = (everything(*(t.to(f"cuda:{i}") for t in (x, y, tokens)), gpu) for i in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert b.device.index == 1 and torch.equal(a.cpu(), b.cpu())


def test_compiled_by_inductor(gpu):
    x, y, tokens = batch(4, 5000)
    step = torch.compile(lambda x: cf.token_stats(x, y, tokens, backend=gpu).reverse_kl.sum(), fullgraph=True)
    x.requires_grad_()
    gradient = torch.autograd.grad(step(x), x)[0]
    plain = cf.token_stats(x, y, tokens, backend=gpu).reverse_kl.sum()
    assert torch.equal(gradient, torch.autograd.grad(plain, x)[0])


def test_the_chosen_backend_compiles_too():
    x, y, tokens = batch(4, 5000)
    step = torch.compile(lambda x: cf.token_stats(x, y, tokens).reverse_kl, fullgraph=True)
    assert torch.equal(step(x), cf.token_stats(x, y, tokens).reverse_kl)


def test_no_host_synchronisation(gpu):
    x, y, tokens = batch(4, 5000)
    x, y, tokens = x.view(2, 2, -1), y.view(2, 2, -1), tokens.view(2, 2)
    reward = torch.ones(2, 2, device="cuda")
    x.requires_grad_()

    def step():
        out = cf.constrained_reward(x, y, tokens, reward, 3.0, backend=gpu)
        torch.autograd.grad(out.stats.reverse_kl.sum(), x)
        cf.budget_trace(reward, 1.0, backend=gpu)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""CMDP_FAST_AUTOTUNE=1: what it chooses from is right, and measuring leaves no trace in anybody's memory."""

import pytest
import torch
from helpers import DIFFERENTIABLE, assert_no_worse, exact_and_eager, make_logits, make_tokens, weighted_sum

import cmdp_fast as cf
from cmdp_fast import reference, states, tails, tiles
from cmdp_fast.layout import ListedRows, Pair, TailGradient, Upstream
from cmdp_fast.ops import backends
from cmdp_fast.ops.backends import INTERPRETED

kernels = backends.get("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(kernels is None, reason="the triton backend does not work here"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
WIDTH = 1101  # rows at several alignments, a tail, and settings of more than one warp


class Bench:
    """In place of Triton's `do_bench`: launches a few times, and finds the launch of a number the fastest."""

    def __init__(self):
        self.pick, self.measured, self.times = 0, 0, 2

    def __call__(self, launch):
        for _ in range(self.times):
            launch()
        self.measured += 1
        return 1.0 if self.measured - 1 == self.pick else 2.0


@pytest.fixture
def bench(monkeypatch):
    stub = Bench()
    monkeypatch.setattr("triton.testing.do_bench", stub)
    monkeypatch.setattr(kernels.launch, "AUTOTUNE", True)
    monkeypatch.setattr(kernels.launch, "_chosen", {})
    return stub


def batch(rows=3, width=WIDTH, dtype=torch.float32):
    x, y = make_logits(rows, width, dtype=dtype), make_logits(rows, width, dtype=dtype, seed=1)
    return x.to(DEVICE), y.to(DEVICE), make_tokens(rows, vocab=width).to(DEVICE)


def tables(width=WIDTH, dtype=torch.float32):
    """How many settings each kernel may choose from."""
    launch = kernels.launch
    forward = launch.forward_choices(launch.forward_settings(width, dtype), width)
    columns = launch.column_choices(launch.halved(launch.column_settings(width)))
    assert forward[0] == launch.forward_settings(width, dtype) and columns[0].tile == 1024
    return len(set(forward)), len(set(columns))


FORWARD, COLUMNS = tables() if kernels is not None else (0, 0)


@pytest.mark.parametrize("pick", range(max(FORWARD, COLUMNS)))
def test_every_choice_is_right(pick, bench):
    """Values and gradients of the statistics and of a mixture against float64, whichever settings are the fastest."""
    x, y, tokens = (t.cpu() for t in batch())
    weights = {name: torch.full(tokens.shape, 0.5 + i) for i, name in enumerate(DIFFERENTIABLE)}
    exact, eager = exact_and_eager(x, y, tokens, weights)
    logits = x.to(DEVICE).requires_grad_()
    on_device = {name: w.to(DEVICE) for name, w in weights.items()}
    bench.pick, bench.times = pick % FORWARD, 0
    stats = cf.token_stats(logits, y.to(DEVICE), tokens.to(DEVICE), backend="triton")
    assert bench.measured == FORWARD
    bench.measured, bench.pick = 0, pick % COLUMNS
    (gradient,) = torch.autograd.grad(weighted_sum(stats, on_device), logits)
    assert bench.measured == COLUMNS
    for name in stats._fields:
        assert_no_worse(getattr(stats, name).cpu(), getattr(eager[0], name), getattr(exact[0], name), name)
    size = float(3 * exact[0].reverse_kl.detach().abs().max())
    assert_no_worse(gradient.cpu(), eager[1], exact[1], "gradient", size=size)

    def mixture(function, logits, teacher, **settings):
        value = function(logits, teacher, "jsd", beta=0.3, **settings)
        return value.detach().cpu(), torch.autograd.grad(value.sum(), logits)[0].cpu()

    bench.measured = 0
    ours = mixture(cf.divergence, logits, y.to(DEVICE), backend="triton")
    eager, exact = (
        mixture(reference.divergence, x.to(d).requires_grad_(), y.to(d)) for d in (torch.float32, torch.float64)
    )
    assert_no_worse(ours[0], eager[0], exact[0], "jsd")
    assert_no_worse(ours[1], eager[1], exact[1], "gradient of jsd", size=3 * float(exact[0].max()))
    assert [name.split()[0] for name in kernels.launch.choices()] == [
        "fold",
        "token_stats_backward",
        "mixture",
        "mixture_backward",
    ]


def test_a_measurement_is_made_once_whatever_the_rows(bench):
    x, y, tokens = batch()
    first = cf.token_stats(x, y, tokens, backend="triton")
    measured, chosen = bench.measured, kernels.launch.choices()
    one = cf.token_stats(x[:1], y[:1], tokens[:1], backend="triton")
    again = cf.token_stats(x, y, tokens, backend="triton")
    assert bench.measured == measured == FORWARD and kernels.launch.choices() == chosen and len(chosen) == 1
    for a, b, c in zip(first, one, again, strict=True):
        assert torch.equal(a[:1], b) and torch.equal(a, c)
    cf.token_stats(*(t[..., : WIDTH - 1] if t.dim() > 1 else t.clamp(max=9) for t in (x, y, tokens)), backend="triton")
    assert len(kernels.launch.choices()) == 2


@pytest.mark.parametrize("inplace", [False, True])
def test_inputs_are_what_they_were_and_the_gradient_is_the_untuned_one(inplace, bench, monkeypatch):
    """Settings of the backward pass change no bit of the gradient; measuring them, none of the logits before it."""
    x, y, tokens = batch(dtype=torch.bfloat16)
    _, saved = kernels.token_stats(Pair(x, y, tokens, None, 1.0, WIDTH))
    kept = [t.clone() for t in (x, y, tokens, saved)]
    flow = Upstream(*(make_logits(3, seed=seed).to(DEVICE) for seed in range(4)))

    def gradient():
        logits = x.clone()
        out = logits if inplace else torch.empty_like(logits)
        kernels.token_stats_backward(Pair(logits, y, tokens, None, 1.0, WIDTH), saved, flow, out)
        assert inplace or torch.equal(logits, x)
        return out

    bench.measured, bench.pick = 0, COLUMNS - 1
    tuned = gradient()
    assert bench.measured == COLUMNS
    monkeypatch.setattr(kernels.launch, "AUTOTUNE", False)
    assert torch.equal(tuned, gradient())
    for before, after in zip(kept, (x, y, tokens, saved), strict=True):
        assert torch.equal(before, after)


def test_a_tile_is_folded_once(bench, monkeypatch):
    """Into the states that go in and out; were it folded at each measurement, its weight would count many times."""
    x, y, tokens = batch()

    def folded():
        fields = torch.zeros(3, len(states.FIELDS), dtype=torch.float64, device=DEVICE)
        fields[:, :2] = -torch.inf
        for first in (0, 551):
            tile = [t[:, first : first + 550] for t in (x, y)]
            kernels.update_states(Pair(*tile, tokens, None, 1.0, 550), first, fields)
        return fields

    tuned = folded()
    assert bench.measured > 1 and [name.split()[0] for name in kernels.launch.choices()] == ["tile"]
    monkeypatch.setattr(kernels.launch, "AUTOTUNE", False)
    assert torch.equal(tuned, folded())


@pytest.mark.parametrize("pick", range(0, max(FORWARD, COLUMNS), 3))
def test_every_choice_of_a_tail_is_right_and_folds_it_once(pick, bench):
    """Against plain PyTorch: a state that goes in and out, and a gradient that is written over the logits."""
    x, _, tokens = batch()
    ids = torch.tensor([[0, 511, -1, 512, 1023, 1024, 1100]], device=DEVICE).repeat(3, 1)
    rows = ListedRows(x, ids, tokens, None, 0.9, WIDTH)
    found = []
    for module in (kernels, tiles):
        state = tails.empty(3, 7, x.device)
        bench.pick, bench.measured = pick % FORWARD, 0
        module.update_tails(rows, 0, state)
        tail = tails.finished(state)
        numbers = (torch.ones_like(tail.own), torch.full_like(tail.own, 0.3), tail.own, tail.listed)
        out = x.clone()
        bench.pick, bench.measured = pick % COLUMNS, 0
        module.tail_backward(rows._replace(student=out), TailGradient(tail.reference, tail.log_mass, *numbers), out)
        found.append((tail.reference + tail.log_mass, tail.entropy, tail.reference + tail.own, out.double()))
    for ours, right in zip(*found, strict=True):
        assert_no_worse(ours.float(), right.float(), right, size=10)
    assert [name.split()[0] for name in kernels.launch.choices()] == ["tail", "tail_backward"]


def test_nothing_is_measured_while_a_graph_is_captured(bench, monkeypatch):
    x, y, tokens = batch()
    monkeypatch.setattr(kernels.launch, "capturing", lambda t: True)
    with pytest.raises(RuntimeError, match="run the step once before it is captured"):
        cf.token_stats(x, y, tokens, backend="triton")
    assert bench.measured == 0
    monkeypatch.setattr(kernels.launch, "capturing", lambda t: False)
    cf.token_stats(x, y, tokens, backend="triton")
    monkeypatch.setattr(kernels.launch, "capturing", lambda t: True)
    cf.token_stats(x, y, tokens, backend="triton")


def test_scratch_memory_lies_as_the_gradient_does():
    """Alignment and strides decide how wide the stores are."""
    memory = torch.empty(50_000, dtype=torch.bfloat16, device=DEVICE)
    out = memory[3:].as_strided((4, 1001), (1003, 1))
    scratch = kernels.launch.scratch_for(out, kernels.launch.rows_of(out)[1], 4)
    assert scratch.out.data_ptr() % 16 == out.data_ptr() % 16 and -scratch.rows.stride % 16 == 1003 % 16
    assert scratch.count == 4 and scratch.out.numel() == 4 * -scratch.rows.stride
    wide = torch.empty(1, device=DEVICE).expand(4000, 151936)
    assert kernels.launch.scratch_for(wide, kernels.launch.Rows(4000, -151936, 0), 4000).count == 220

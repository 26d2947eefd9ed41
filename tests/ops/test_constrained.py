"""constrained_reward: bitwise what its three parts give in turn, padded and packed, for every cost and kind."""

import itertools
import math
import warnings

import pytest
import torch
from helpers import DTYPES, here, make_logits, make_tokens

import cmdp_fast as cf
from cmdp_fast.constraint import KINDS
from cmdp_fast.ops.backends import INTERPRETED
from cmdp_fast.reference import COSTS

COEFFICIENT = {"cmdp": 0.25, "hinge": 0.25, "lagrangian": 0.5, "pid": 0.5, "barrier": 0.1}
pytestmark = pytest.mark.filterwarnings("ignore:kind='saute'")


def batch(dtype=torch.float32):
    x, y = make_logits(3, 6, 40, dtype=dtype), make_logits(3, 6, 40, dtype=dtype, scale=2.5, seed=1)
    tokens, reward = make_tokens(3, 6, vocab=40), make_logits(3, 6, scale=1.0, seed=4)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:], mask[2, 0] = False, False
    return x, y, tokens, reward, mask


def in_turn(x, y, tokens, reward, budget, cost, kind, *, mask, cu_seqlens=None, backend, **settings):
    stats = cf.token_stats(x, y, tokens, mask=mask, backend=backend)
    c = cf.divergence(x, y, "jsd", mask=mask, backend=backend) if cost == "jsd" else cf.token_cost(stats, cost)
    layout = {"mask": mask, "cu_seqlens": cu_seqlens, "backend": backend}
    trace = cf.budget_trace(c, budget, reduction="mean" if kind == "worst_case" else "sum", **layout)
    return stats, trace, cf.modified_reward(reward, c, trace, kind=kind, **settings, **layout)


def pairs():
    """Interpreted, every cost and every kind: the kernel of one knows nothing of the other."""
    for cost, kind in itertools.product(COSTS, KINDS):
        if (kind != "worst_case" or cost == "nll") and (not INTERPRETED or cost == "nll" or kind == "cmdp"):
            yield cost, kind


@pytest.mark.parametrize("cost, kind", list(pairs()))
@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float64])
def test_equals_its_parts_bitwise(cost, kind, dtype, backend):
    x, y, tokens, reward, mask = batch(dtype)
    settings = {"discrepancy_weight": 2.0, "penalty": 0.5, "coefficient": COEFFICIENT.get(kind), "backend": backend}
    got = cf.constrained_reward(x, y, tokens, reward, 1.5, mask=mask, cost=cost, kind=kind, **settings)
    stats, trace, modified = in_turn(x, y, tokens, reward, 1.5, cost, kind, mask=mask, **settings)
    for a, b in zip((*got.stats, *got.trace, got.reward), (*stats, *trace, modified), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cost", ["k1", "k3", "nll"])
def test_a_clamp_bounds_what_a_token_costs(cost, backend):
    """A token that the student all but rules out and the teacher is sure of: 1e13 nats of k3, which is off by default
    in no operation."""
    x, y, tokens, reward, mask = batch()
    x[0, 0], y[0, 0] = 0.0, 0.0
    x[0, 0, tokens[0, 0]], y[0, 0, tokens[0, 0]] = -30.0 + math.log(39), 60.0
    stats = cf.token_stats(x, y, tokens, mask=mask, backend=backend)
    plain, bounded = cf.token_cost(stats, cost), cf.token_cost(stats, cost, clamp=1.5)
    assert torch.equal(bounded, plain.clamp(-1.5, 1.5)) and bounded.abs().max() == 1.5 < plain.abs().max()
    if cost == "k3":
        assert plain[0, 0].item() == pytest.approx(math.exp(30), rel=1e-4)
    settings = {"mask": mask, "kind": "hinge", "backend": backend}
    got = cf.constrained_reward(x, y, tokens, reward, 2.0, cost=cost, cost_clamp=1.5, **settings)
    trace = cf.budget_trace(bounded, 2.0, mask=mask, backend=backend)
    for a, b in zip((*got.stats, *got.trace), (*stats, *trace), strict=True):
        assert torch.equal(a, b)
    without = cf.constrained_reward(x, y, tokens, reward, 2.0, cost=cost, **settings)
    assert torch.equal(without.trace.cumulative, cf.budget_trace(plain, 2.0, mask=mask, backend=backend).cumulative)


@pytest.mark.parametrize("clamp", [None, 10.0])
def test_a_token_that_the_student_excludes(clamp, backend):
    """Its k3 was inf - inf, which no clamp bounds."""
    x, y = here(torch.tensor([[[-math.inf, 0.0, 1.0]]])), here(torch.zeros(1, 1, 3))
    tokens, reward = here(torch.tensor([[0]])), here(torch.ones(1, 1))
    settings = {"cost_clamp": clamp, "discrepancy_weight": 2.0, "kind": "hinge", "backend": backend}
    for cost, sign in (("k3", 1.0), ("k1", -1.0)):
        out = cf.constrained_reward(x, y, tokens, reward, 1.0, cost=cost, **settings)
        spent = sign * (math.inf if clamp is None else clamp)
        assert out.trace.cumulative.item() == spent and out.reward.item() == 1.0 - 2.0 * max(spent - 1.0, 0.0)
    stats = out.stats._replace(teacher_logprob=out.stats.logprob)  # both exclude it: nothing is known
    assert cf.token_cost(stats, "k3", clamp=clamp).isnan().all()


def test_a_cost_has_memory_of_its_own():
    stats = cf.token_stats(torch.eye(3), torch.zeros(3, 3), torch.tensor([0, 1, 2]))
    before = [value.clone() for value in stats]
    for kind in ("reverse_kl", "forward_kl", "k1", "k3", "nll"):
        cf.token_cost(stats, kind).fill_(7.0)
    assert all(torch.equal(value, earlier) for value, earlier in zip(stats, before, strict=True))


def test_a_clamp_that_would_take_a_gradient_is_refused():
    x, y, tokens, reward, _ = batch()
    stats = cf.token_stats(x, y, tokens)
    for cost in ("reverse_kl", "forward_kl"):
        with pytest.raises(ValueError, match=f"clamp=1.0 with cost='{cost}': where it takes effect the cost would"):
            cf.token_cost(stats, cost, clamp=1.0)
    with pytest.raises(ValueError, match=r"cost_clamp=1\.0 with cost='jsd'"):
        cf.constrained_reward(x, y, tokens, reward, 1.0, cost="jsd", cost_clamp=1.0)


@pytest.mark.parametrize(
    "kind, extra",
    [
        ("cmdp", {"gamma": 0.5, "penalty_at": "every"}),
        ("saute", {"edge": "saute", "penalty_at": "crossing", "reduction": "mean"}),
        ("barrier", {"coefficient": 0.3, "barrier_slope": 4.0, "per_token": True}),
    ],
)
@pytest.mark.parametrize("cost", ["jsd"] if INTERPRETED else ["jsd", "reverse_kl"])
def test_every_setting_reaches_its_part(kind, extra, cost, backend):
    x, y, tokens, reward, mask = batch()
    tokens, logits = tokens % 30, {"temperature": 0.7, "vocab_size": 30, "backend": backend}
    x.requires_grad_()
    given = {"mask": mask, "cost": cost, "kind": kind, "beta": 0.2, "penalty": 0.5, **logits, **extra}
    got = cf.constrained_reward(x, y, tokens, reward, 0.4, inplace_backward=True, **given)

    stats = cf.token_stats(x.detach(), y, tokens, mask=mask, **logits)
    c = stats.reverse_kl if cost == "reverse_kl" else cf.divergence(x.detach(), y, beta=0.2, mask=mask, **logits)
    account = {k: v for k, v in extra.items() if k in ("gamma", "edge", "per_token", "reduction")}
    trace = cf.budget_trace(c, 0.4, mask=mask, backend=backend, **account)
    rule = {k: v for k, v in extra.items() if k not in account}
    modified = cf.modified_reward(reward, c, trace, kind=kind, penalty=0.5, mask=mask, backend=backend, **rule)
    for a, b in zip((*got.stats, *got.trace, got.reward), (*stats, *trace, modified), strict=True):
        assert torch.equal(a, b)
    assert trace.violated.any() and not trace.violated.all()
    gradient = torch.autograd.grad(got.stats.reverse_kl.sum(), x)[0]
    assert (gradient.data_ptr() == x.data_ptr()) == (backend != "torch")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_equals_padded(dtype, backend):
    x, y, tokens, reward, mask = batch(dtype)
    lengths = mask.sum(1)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    budget = torch.tensor([0.5, 1.0, 2.0])
    padded = cf.constrained_reward(x, y, tokens, reward, budget, mask=mask, backend=backend)
    packed = cf.constrained_reward(x[mask], y[mask], tokens[mask], reward[mask], budget, cu_seqlens=cu, backend=backend)
    for a, b in zip(padded.stats, packed.stats, strict=True):
        assert torch.equal(a[mask], b)
    assert torch.equal(padded.reward[mask], packed.reward)
    assert torch.equal(padded.trace.cumulative[mask], packed.trace.cumulative)


def test_the_statistics_stay_differentiable(backend):
    x, y, tokens, reward, mask = batch()
    x.requires_grad_()
    out = cf.constrained_reward(x, y, tokens, reward, 1.5, mask=mask, backend=backend)
    assert not out.reward.requires_grad and not out.trace.excess.requires_grad
    loss = -(out.stats.logprob * out.reward).sum() + 0.1 * out.stats.reverse_kl.sum()
    gradient = torch.autograd.grad(loss, x)[0]
    apart = cf.token_stats(x, y, tokens, mask=mask, backend=backend)
    again = torch.autograd.grad(-(apart.logprob * out.reward).sum() + 0.1 * apart.reverse_kl.sum(), x)[0]
    assert torch.equal(gradient, again) and not gradient[~mask].any()


def test_a_token_that_the_teacher_excludes_is_not_nan(backend):
    x, y, tokens, reward, mask = batch()
    y[0, 2, 5] = -torch.inf
    out = cf.constrained_reward(x, y, tokens, reward, 1.5, mask=mask, backend=backend)
    assert out.stats.reverse_kl[0, 2] == torch.inf and out.trace.violated[0, 2:].all()
    assert out.reward[0, 2] == -torch.inf and out.reward[0, 3:].isfinite().all()


def test_worst_case_defaults_to_its_own_cost(backend):
    x, y, tokens, reward, mask = batch()
    out = cf.constrained_reward(x, y, tokens, reward, 2.0, mask=mask, kind="worst_case", backend=backend)
    expected = cf.budget_trace(-out.stats.teacher_logprob, 2.0, mask=mask, reduction="mean", backend=backend)
    assert torch.equal(out.trace.cumulative, expected.cumulative)
    with pytest.raises(ValueError, match="kind='worst_case' is defined for cost='nll'"):
        cf.constrained_reward(x, y, tokens, reward, 2.0, kind="worst_case", cost="reverse_kl")


def test_saute_warns_where_its_penalty_has_no_gradient():
    x, y, tokens, reward, _ = batch()
    with pytest.warns(UserWarning, match="no direct gradient"):
        cf.constrained_reward(x, y, tokens, reward, 2.0, kind="saute")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cf.constrained_reward(x, y, tokens, reward, 2.0, kind="saute", cost="k1")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"cost": "kl"}, ValueError, "cost='kl' is unknown; expected one of reverse_kl"),
        ({"budget": -1.0}, ValueError, "budget must be at least 0"),
        ({"budget": torch.ones(2)}, ValueError, r"shape \[3\] \(sequences\), got \[2\]"),
        ({"task_reward": torch.ones(3)}, ValueError, r"task_reward must have the shape of tokens, \[3, 6\]"),
        ({"tokens": torch.ones(3, 5, dtype=torch.int64)}, ValueError, "task_reward must have the shape of tokens"),
        ({"tokens": torch.full((3, 6), 40)}, ValueError, r"tokens\[0, 0\] = 40 is outside the vocabulary \[0, 40\)"),
        ({"kind": "barrier"}, ValueError, "needs coefficient="),
        ({"teacher_logits": make_logits(3, 6, 41)}, ValueError, "pass vocab_size="),
        ({"cost": "jsd", "beta": 2.0}, ValueError, r"beta must lie in \[0, 1\], got 2.0"),
        ({"edge": "hard"}, ValueError, "edge='hard' is unknown"),
    ],
)
def test_errors(change, error, message):
    x, y, tokens, reward, _ = batch()
    arguments = {"student_logits": x, "teacher_logits": y, "tokens": tokens, "task_reward": reward, "budget": 1.0}
    with pytest.raises(error, match=message):
        cf.constrained_reward(**{**arguments, **change})


@pytest.mark.parametrize("layout", ["mask", "packed"])
@pytest.mark.parametrize("given", ["number", "float32", "double", "bfloat16", "strided", "scalar"])
def test_budgets_of_every_form_agree_with_the_reference(layout, given, backend):
    x, tokens = make_logits(6, 50), make_tokens(6, vocab=50)
    y = x + make_logits(6, 50, scale=1.0, seed=1)
    reward = make_logits(6, scale=1.0, seed=5)
    budget = {
        "number": 0.4,
        "strided": torch.tensor([0.4, 9.0, 0.3, 9.0])[::2],
        "scalar": torch.tensor(0.4),
        **{name: torch.tensor([0.4, 0.3], dtype=getattr(torch, name)) for name in ("float32", "double", "bfloat16")},
    }[given]
    settings = {"mask": torch.tensor([True, True, False, True, True, True]), "per_token": True}
    if layout == "packed":
        settings["cu_seqlens"] = torch.tensor([0, 2, 6], dtype=torch.int32)
    else:
        x, y, tokens, reward = x.view(2, 3, 50), y.view(2, 3, 50), tokens.view(2, 3), reward.view(2, 3)
        settings["mask"] = settings["mask"].view(2, 3)
    got, want = (
        cf.constrained_reward(x, y, tokens, reward, budget, backend=name, **settings) for name in (backend, "torch")
    )
    assert want.trace.violated.any() and not want.trace.violated.all()
    assert torch.equal(got.trace.violated, want.trace.violated)
    assert torch.equal(got.trace.first_violation, want.trace.first_violation)
    assert torch.allclose(got.reward, want.reward, atol=1e-5)
    assert torch.allclose(got.trace.remaining, want.trace.remaining, atol=1e-5)


def test_a_budget_is_rounded_as_the_costs_are(backend):
    """A completion whose float32 cost is what the budget becomes in float32 is within it, although the budget as it was
    given is a little smaller."""
    x, y, tokens, reward, _ = batch()
    cost = float(cf.token_stats(x[:1, :1], y[:1, :1], tokens[:1, :1], backend=backend).reverse_kl)
    budget = cost * (1 - 2**-30)
    assert budget < cost and torch.tensor(budget).item() == cost
    got = cf.constrained_reward(x[:1, :1], y[:1, :1], tokens[:1, :1], reward[:1, :1], budget, backend=backend)
    assert not got.trace.violated.any() and got.trace.remaining.item() == 0

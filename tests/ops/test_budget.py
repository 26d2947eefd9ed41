"""budget_trace and modified_reward: the worked example to the last digit, layouts, properties, errors."""

import itertools
import math

import hosted
import pytest
import torch
from helpers import here, make_logits
from hypothesis import given, settings
from hypothesis import strategies as st

import cmdp_fast as cf
from cmdp_fast.constraint import KINDS
from cmdp_fast.ops.backends import INTERPRETED

pytestmark = pytest.mark.scan

COEFFICIENT = {"cmdp": 0.25, "hinge": 0.25, "lagrangian": 0.5, "pid": 0.5, "barrier": 0.1}


@pytest.fixture(params=[torch.float32, torch.float64])
def example(request, vectors, backend):  # the backend first: it decides on the device
    v = vectors["worked_example"]
    cost, reward = (torch.tensor([v[name]], dtype=request.param) for name in ("cost", "task_reward"))
    return v, cost, reward


def same(tensor, numbers):
    """Binary-exact: no tolerance."""
    return tensor.flatten().tolist() == [pytest.approx(n, abs=0, rel=0) for n in numbers]


def test_trace_of_the_worked_example(example, backend):
    v, cost, _ = example
    trace = cf.budget_trace(cost, v["budget"], backend=backend)
    assert same(trace.cumulative, v["cumulative"]) and same(trace.remaining, v["remaining"])
    assert trace.violated.int().flatten().tolist() == v["violated"]
    assert trace.first_violation.tolist() == [v["first_violation"]]
    assert same(trace.excess, v["excess"])
    assert all(t.dtype == cost.dtype for t in (trace.cumulative, trace.remaining, trace.excess))


@pytest.mark.parametrize("gamma", [1.0, 1 - 1e-12, 0.99, 0.5])
def test_a_discounted_budget_is_what_public_codes_of_saute_rl_bound(gamma, backend):
    """Both conventions: the budget bounds the discounted sum as it stands; or it is scaled to the discount, as those
    codes do, which then keep a share z of it by z <- (z - c / budget) / gamma."""
    horizon, budget = 12, 3.0
    scaled = cf.discounted_budget(budget, gamma, horizon)
    assert scaled == pytest.approx(budget * sum(gamma**t for t in range(horizon)) / horizon, rel=1e-9)
    each = torch.tensor([budget, 1.0])
    assert torch.equal(cf.discounted_budget(each, gamma, horizon), each * (scaled / budget))
    generator = torch.Generator("cpu").manual_seed(3)
    cost = here(torch.rand(50, horizon, dtype=torch.float64, generator=generator, device="cpu") * 0.6)
    raw, other = (cf.budget_trace(cost, d, gamma=gamma, edge="saute", backend=backend) for d in (budget, scaled))
    share, violated = torch.ones_like(cost[:, 0]), torch.zeros_like(cost[:, 0], dtype=torch.bool)
    for t in range(horizon):
        share = (share - cost[:, t] / scaled) / gamma
        violated = violated | (share <= 0)
        assert torch.equal(other.violated[:, t], violated)
    assert torch.equal(raw.cumulative, other.cumulative)
    if gamma == 0.5:
        assert not raw.violated.any() and 0 < other.violated[:, -1].double().mean() < 1
    # equal costs that spend the budget at the last token without a discount spend the scaled one at the last token
    even = torch.full((1, horizon), budget / horizon, dtype=torch.float64)
    last = cf.budget_trace(even, scaled, gamma=gamma, backend=backend).remaining[0, -1]
    assert last.item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"budget": -1.0}, ValueError, "budget must be at least 0, got -1.0"),
        ({"budget": "2"}, TypeError, "budget must be a number, got str '2'"),
        ({"gamma": 0.0}, ValueError, r"gamma must lie in \(0, 1\], got 0.0"),
        ({"horizon": 0}, ValueError, "horizon must be at least 1 token, got 0"),
        ({"horizon": 4.0}, TypeError, "horizon must be an int, got float 4.0"),
    ],
)
def test_a_discounted_budget_of_nonsense(settings, error, message):
    with pytest.raises(error, match=message):
        cf.discounted_budget(**({"budget": 1.0, "gamma": 0.9, "horizon": 4} | settings))


@pytest.mark.parametrize(
    "name, kind, given_settings",
    [
        ("cmdp", "cmdp", {"discrepancy_weight": 2}),
        ("cmdp_every", "cmdp", {"discrepancy_weight": 2, "penalty_at": "every"}),
        ("hinge", "hinge", {"discrepancy_weight": 2}),
        ("saute", "saute", {}),
        ("saute", "worst_case", {}),
        ("saute_crossing", "saute", {"penalty_at": "crossing"}),
        ("lagrangian", "lagrangian", {"coefficient": 0.5}),
        ("lagrangian", "pid", {"coefficient": 0.5}),
    ],
)
def test_rewards_of_the_worked_example(name, kind, given_settings, example, backend):
    v, cost, reward = example
    trace = cf.budget_trace(cost, v["budget"], backend=backend)
    got = cf.modified_reward(reward, cost, trace, kind=kind, backend=backend, **given_settings)
    assert same(got, v[name]["modified_reward"]) and got.dtype == cost.dtype


def test_discount_mean_edge_and_barrier_of_the_worked_example(example, backend):
    v, cost, reward = example
    discounted = cf.budget_trace(cost, 1.0, gamma=v["discounted"]["gamma_c"], backend=backend)
    assert same(discounted.cumulative, v["discounted"]["cumulative"])
    mean = cf.budget_trace(cost, v["prefix_mean"]["budget_mean"], reduction="mean", backend=backend)
    assert mean.cumulative.flatten().tolist() == pytest.approx(v["prefix_mean"]["values"], rel=1e-7)
    # m_5 = .2 = d is feasible on its own; the violation of token 4 is absorbing
    assert mean.violated.int().flatten().tolist() == v["prefix_mean"]["violated"]
    for edge in ("strict", "saute"):
        trace = cf.budget_trace(cost, v["edge"]["budget"], edge=edge, backend=backend)
        assert trace.violated.int().flatten().tolist() == v["edge"][f"violated_{edge}"]
    b = v["barrier"]
    trace = cf.budget_trace(cost, b["budget"], backend=backend)
    steps = cf.modified_reward(
        torch.zeros_like(reward), cost, trace, kind="barrier", coefficient=b["kappa"], backend=backend
    )
    assert steps.sum().item() == pytest.approx(b["total"], rel=4 * torch.finfo(cost.dtype).eps)


def test_barrier_by_hand(backend):
    """Inside: kappa times the logarithm's fall; outside, the crossing token included: -slope times the cost."""
    cost, reward = torch.tensor([[0.25, 0.25, 0.75, 0.5]]).double(), torch.tensor([[0.0, 1.0, 1.0, 1.0]]).double()
    trace = cf.budget_trace(cost, 1.0, backend=backend)
    got = cf.modified_reward(reward, cost, trace, kind="barrier", coefficient=0.5, barrier_slope=3.0, backend=backend)
    expected = [0.5 * math.log(0.75), 1 + 0.5 * (math.log(0.5) - math.log(0.75)), -2.25, -1.5]
    assert got.flatten().tolist() == pytest.approx(expected, abs=1e-15)


def test_one_budget_a_sequence_and_per_token(backend):
    cost = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    trace = cf.budget_trace(cost, torch.tensor([0.75, 3.0]), mask=mask, backend=backend)
    assert trace.first_violation.tolist() == [1, 4]
    trace = cf.budget_trace(cost, 0.25, mask=mask, per_token=True, backend=backend)
    assert trace.remaining[:, -1].tolist() == [1.0 - 2.0, 0.5 - 1.0]
    assert trace.first_violation.tolist() == [2, 1]


def test_a_budget_per_token_that_is_spent_to_the_last_is_met(backend):
    """Of however many tokens, whose costs are rounded and whose sum is not."""
    lengths = 1, 5, 7, 9, 13, 39
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    cost = torch.full(mask.shape, 0.1)
    packed = {"cost": cost[mask], "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)])}
    for given_ in ({"cost": cost, "mask": mask}, packed):
        for budget in (0.1, torch.full((len(lengths),), 0.1, dtype=torch.float64)):
            settings_ = {**given_, "budget": budget, "per_token": True, "backend": backend}
            assert not cf.budget_trace(**settings_).violated.any()
            spent = cf.budget_trace(**settings_, edge="saute").first_violation
            assert spent.tolist() == [length - 1 for length in lengths]


def test_masked_tokens_cost_nothing_and_are_not_counted(backend):
    """Left padding, a hole, right padding: what is left behaves as if they were not there."""
    cost = torch.tensor([[9.0, 0.125, 9.0, 0.0625, 0.375, 0.25, 0.1875, 9.0]])
    reward = torch.tensor([[5.0, 0, 5, 0, 0, 0, 1, 5]])
    mask = torch.tensor([[False, True, False, True, True, True, True, False]])
    for settings_ in ({}, {"gamma": 0.5}, {"reduction": "mean"}):
        trace = cf.budget_trace(cost, 0.2, mask=mask, backend=backend, **settings_)
        dense = cf.budget_trace(cost[mask][None], 0.2, backend=backend, **settings_)
        for got, want in zip(trace, dense, strict=True):
            if got.shape == cost.shape:
                assert torch.equal(got[mask][None], want)
        assert trace.cumulative[0, 0] == 0 and not trace.violated[0, 0] and trace.excess[~mask].eq(0).all()
        for kind in KINDS:
            given_settings = {"kind": kind, "coefficient": COEFFICIENT.get(kind), "backend": backend}
            got = cf.modified_reward(reward, cost, trace, mask=mask, **given_settings)
            want = cf.modified_reward(reward[mask][None], cost[mask][None], dense, **given_settings)
            assert torch.equal(got[~mask], torch.zeros(3))
            assert torch.allclose(got[mask][None], want, rtol=1e-6, atol=0), kind
    assert cf.budget_trace(cost, 0.5, mask=mask, backend=backend).first_violation.tolist() == [4]


HERE = [name for name, problem in cf.available_backends().items() if problem is None]


def on(backend, *tensors):
    """The tensors where a backend takes them."""
    gpu = (backend == "triton" and not INTERPRETED) or (backend == "cuda" and not hosted.HOSTED)
    return [t.to("cuda" if gpu else "cpu") for t in tensors]


sequences = st.lists(st.lists(st.floats(0, 1, width=32), max_size=9), min_size=1, max_size=5)


@pytest.mark.triton
@settings(max_examples=6 if INTERPRETED else 60)
@given(sequences, st.floats(0, 3), st.sampled_from(["strict", "saute"]), st.data())
def test_packed_padded_and_reference_agree(costs, budget, edge, data):
    lengths = [len(c) for c in costs]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packed = torch.tensor([c for row in costs for c in row], dtype=torch.float32)
    keep = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=len(packed), max_size=len(packed))), dtype=torch.bool
    )
    reward = torch.linspace(-1, 1, len(packed))
    width = max(lengths)
    padded, real = torch.full((len(costs), width), 7.0), torch.zeros(len(costs), width, dtype=torch.bool)
    padded_reward = torch.zeros(len(costs), width)
    for i, n in enumerate(lengths):
        piece = slice(int(cu[i]), int(cu[i + 1]))
        padded[i, :n], padded_reward[i, :n], real[i, :n] = packed[piece], reward[piece], keep[piece]
    columns = torch.arange(width) < torch.tensor(lengths)[:, None]
    for settings_ in ({}, {"reduction": "mean"}, {"gamma": 0.5}, {"per_token": True}):
        settings_ = {"edge": edge, **settings_}
        outcomes: dict[str, list[torch.Tensor]] = {}
        for backend in HERE:
            cost, kept, ends, rewards = on(backend, packed, keep, cu, reward)
            wide_cost, wide_kept, wide_rewards, inside = on(backend, padded, real, padded_reward, columns)
            p = cf.budget_trace(cost, budget, mask=kept, cu_seqlens=ends, backend=backend, **settings_)
            q = cf.budget_trace(wide_cost, budget, mask=wide_kept, backend=backend, **settings_)
            for name in ("cumulative", "remaining", "violated", "excess"):
                assert torch.equal(getattr(p, name), getattr(q, name)[inside])
            first = q.first_violation.cpu()
            assert torch.equal(p.first_violation.cpu(), torch.where(first == width, torch.tensor(lengths), first))
            for kind in KINDS:
                given_settings = {"kind": kind, "coefficient": COEFFICIENT.get(kind), "backend": backend}
                r = cf.modified_reward(rewards, cost, p, mask=kept, cu_seqlens=ends, **given_settings)
                s = cf.modified_reward(wide_rewards, wide_cost, q, mask=wide_kept, **given_settings)
                assert torch.allclose(r, s[inside], rtol=1e-5, atol=1e-6, equal_nan=True), kind
                outcomes.setdefault(backend, []).append(r.cpu())
        for rewards in outcomes.values():
            for a, b in zip(outcomes["torch"], rewards, strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@settings(max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 5))
def test_excess_adds_up_to_the_overrun(costs, budget):
    cost = torch.tensor([costs], dtype=torch.float64)
    trace = cf.budget_trace(cost, budget)
    assert trace.excess.sum().item() == pytest.approx(max(sum(costs) - budget, 0), abs=1e-12)
    assert (trace.excess >= 0).all()
    assert bool(trace.violated[0, -1]) == bool(trace.first_violation < len(costs))
    assert trace.violated.int().diff().ge(0).all()  # absorbing


def test_a_violation_is_absorbing_when_the_cost_turns_negative(backend):
    """k1 can be negative: the account may recover, the violation does not."""
    cost = torch.tensor([[0.5, 0.25, -0.5, 0.5]])
    trace = cf.budget_trace(cost, 0.5, backend=backend)
    assert trace.violated.tolist() == [[False, True, True, True]]
    assert trace.excess.tolist() == [[0, 0.25, -0.25, 0.25]]
    reward = cf.modified_reward(torch.ones(1, 4), cost, trace, backend=backend)
    assert reward.tolist() == [[1, -1.25, 0.25, -0.25]]


def test_an_infinite_cost_is_paid_once(backend):
    """R = +inf is a statistic like any other; what comes after it must not be NaN."""
    cost = torch.tensor([[0.5, torch.inf, 0.25, torch.inf]])
    trace = cf.budget_trace(cost, 1.0, backend=backend)
    assert trace.excess.tolist() == [[0, math.inf, 0, 0]] and trace.violated.tolist() == [[False, True, True, True]]
    for kind in ("cmdp", "hinge", "saute"):
        reward = cf.modified_reward(torch.ones(1, 4), cost, trace, kind=kind, backend=backend)
        assert not reward.isnan().any(), kind


@pytest.mark.parametrize(
    "amounts",
    [
        {"kind": "lagrangian", "coefficient": 0.0},
        {"kind": "pid", "coefficient": 0.0},
        {"kind": "barrier", "coefficient": 0.0, "barrier_slope": 0.0},
        {"kind": "hinge", "discrepancy_weight": 0.0},
        {"kind": "cmdp", "discrepancy_weight": 0.0, "penalty": 2.0},
    ],
    ids=lambda amounts: amounts["kind"],
)
def test_no_part_of_an_infinite_cost_is_nothing(amounts, backend):
    """Where its weight is 0 the cost has no say: the task's reward was NaN with a teacher that excludes a token."""
    cost = torch.tensor([[0.5, torch.inf, 0.25]])
    trace = cf.budget_trace(cost, 1.0, backend=backend)
    reward = cf.modified_reward(torch.ones(1, 3), cost, trace, backend=backend, **amounts)
    kept = (
        [1.0, -2.0, 0.0]
        if amounts["kind"] == "cmdp"
        else [1.0, 0.0, 0.0]
        if amounts["kind"] == "barrier"
        else [1.0] * 3
    )
    assert reward.tolist() == [kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.7])
def test_a_cost_equal_to_the_budget_is_feasible_in_any_dtype(dtype, budget, backend):
    cost = torch.tensor([[budget]], dtype=dtype)
    limit = float(cost) if dtype == torch.bfloat16 else budget
    assert not cf.budget_trace(cost, limit, backend=backend).violated.any()
    assert cf.budget_trace(cost, limit, edge="saute", backend=backend).violated.all()


def test_an_infinite_budget(backend):
    cost, mask = torch.ones(2, 3), torch.tensor([[True] * 3, [False] * 3])
    trace = cf.budget_trace(cost, math.inf, mask=mask, per_token=True, backend=backend)
    assert not trace.violated[0].any() and trace.excess.eq(0).all()
    for kind in KINDS:
        settings_ = {"kind": kind, "coefficient": COEFFICIENT.get(kind), "mask": mask, "backend": backend}
        reward = cf.modified_reward(torch.ones(2, 3), cost, trace, **settings_)
        expected = 1.0 if kind == "barrier" else 1.0 - COEFFICIENT.get(kind, 0.0)
        assert reward.tolist() == [[expected] * 3, [0.0] * 3], kind


def test_nan_counts_as_a_violation(backend):
    for edge in ("strict", "saute"):
        trace = cf.budget_trace(torch.tensor([[0.0, torch.nan, 0.0]]), 1.0, edge=edge, backend=backend)
        assert trace.violated.tolist() == [[False, True, True]] and trace.first_violation.tolist() == [1]
        assert trace.excess.isnan().tolist() == [[False, True, True]]  # nor is it nothing that the loss would weigh


@pytest.mark.parametrize("budget", [1.0, math.inf])
def test_an_infinite_cost_that_a_discount_reaches_is_infinite(budget, backend):
    """Where the discount underflows, too."""
    cost = torch.ones(1, 200)
    cost[0, 170] = math.inf
    trace = cf.budget_trace(cost, budget, gamma=0.01, edge="saute", backend=backend)
    assert trace.cumulative[0, 169].isfinite() and trace.cumulative[0, 170:].tolist() == [math.inf] * 30
    assert trace.remaining[0, 170:].tolist() == [math.inf if budget == math.inf else -math.inf] * 30
    assert not (trace.violated.any() if budget == math.inf else trace.excess[0, 171:].any())


def test_an_infinite_cost_is_within_an_infinite_budget(backend):
    trace = cf.budget_trace(torch.tensor([[torch.inf, 1.0]]), math.inf, backend=backend)
    assert not trace.violated.any() and trace.excess.tolist() == [[0, 0]]


def test_a_spent_budget_is_outside_the_barrier(backend):
    """Feasible, but its logarithm is not finite."""
    cost = torch.tensor([[0.5, 0.5, 0.25]])
    trace = cf.budget_trace(cost, 1.0, backend=backend)
    reward = cf.modified_reward(torch.ones(1, 3), cost, trace, kind="barrier", coefficient=0.0, backend=backend)
    assert reward.tolist() == [[1.0, -5.0, -2.5]]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(shape, backend):
    cost = torch.zeros(shape)
    trace = cf.budget_trace(cost, 1.0, backend=backend)
    assert trace.cumulative.shape == shape and trace.first_violation.tolist() == [0] * shape[0]
    assert cf.modified_reward(cost, cost, trace, backend=backend).shape == shape
    packed = cf.budget_trace(torch.zeros(0), 1.0, cu_seqlens=torch.tensor([0, 0, 0]), backend=backend)
    assert packed.first_violation.tolist() == [0, 0] and packed.excess.shape == (0,)


@pytest.mark.parametrize("reduction, gamma", [("sum", 1.0), ("sum", 0.5), ("mean", 1.0)])
def test_what_masked_tokens_report(reduction, gamma, backend):
    """The account as it stands: before the first token the whole budget, later what the last token left."""
    cost, mask = torch.tensor([[9.0, 0.5, 9.0, 0.5, 9.0]]), torch.tensor([[False, True, False, True, False]])
    trace = cf.budget_trace(cost, 0.6, mask=mask, reduction=reduction, gamma=gamma, backend=backend)
    first, second = 0.5, {("sum", 1.0): 1.0, ("sum", 0.5): 0.75, ("mean", 1.0): 0.5}[reduction, gamma]
    assert trace.cumulative.tolist() == [[0.0, first, first, second, second]]
    assert torch.allclose(trace.remaining, 0.6 - trace.cumulative)
    over = second > 0.6
    assert trace.violated.tolist() == [[False, False, False, over, over]]
    assert trace.excess[0, [0, 2, 4]].tolist() == [0.0, 0.0, 0.0]


def test_tensors_that_are_not_contiguous(backend):
    shape, generator = (8, 6), torch.Generator().manual_seed(0)
    cost, reward = (here(torch.rand(shape, generator=generator, device="cpu")).t() for _ in range(2))
    trace = cf.budget_trace(cost, 1.0, backend=backend)
    strided = cf.BudgetTrace(*(t.t().contiguous().t() if t.dim() == 2 else t for t in trace))
    assert not strided.violated.is_contiguous()
    expected = cf.modified_reward(reward.contiguous(), cost.contiguous(), trace, backend=backend)
    assert torch.equal(cf.modified_reward(reward, cost, strided, backend=backend), expected)
    needs_grad = cf.modified_reward(
        reward.clone().requires_grad_(), cost.clone().requires_grad_(), trace, backend=backend
    )
    assert torch.equal(needs_grad, expected) and not needs_grad.requires_grad


def test_strided_and_half_precision_costs(backend):
    cost = make_logits(6, 8, scale=1.0).sigmoid()
    strided, expanded = cost.t()[::2], cost[:1].expand(4, 8)
    for c in (strided, expanded, cost.bfloat16()):
        got = cf.budget_trace(c, 1.0, backend=backend)
        want = cf.budget_trace(c.float().contiguous(), 1.0, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


COST = torch.ones(2, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: cf.budget_trace(COST.long(), 1.0), TypeError, "cost must be floating point, got int64"),
        (lambda: cf.budget_trace(COST[0], 1.0), ValueError, r"got \[3\] without cu_seqlens"),
        (lambda: cf.budget_trace(COST, -1.0), ValueError, "budget must be at least 0, got -1.0"),
        (lambda: cf.budget_trace(COST, math.nan), ValueError, "budget must be at least 0, got nan"),
        (lambda: cf.budget_trace(COST, torch.tensor([1.0, -2.0])), ValueError, r"budget\[1\] = -2.0"),
        (lambda: cf.budget_trace(COST, torch.ones(3)), ValueError, r"shape \[2\] \(sequences\), got \[3\]"),
        (lambda: cf.budget_trace(COST, "1"), TypeError, "budget must be a number"),
        (lambda: cf.budget_trace(COST, 1.0, gamma=0.0), ValueError, r"gamma must lie in \(0, 1\]"),
        (lambda: cf.budget_trace(COST, 1.0, gamma=0.5, reduction="mean"), ValueError, "takes no discount"),
        (lambda: cf.budget_trace(COST, 1.0, reduction="max"), ValueError, "reduction='max' is unknown"),
        (lambda: cf.budget_trace(COST, 1.0, edge="soft"), ValueError, "edge='soft' is unknown"),
        (lambda: cf.budget_trace(COST, 1.0, mask=COST), TypeError, "mask must be bool"),
        (lambda: cf.budget_trace(COST, 1.0, cu_seqlens=torch.tensor([0, 3])), ValueError, "must be packed"),
        (lambda: packed(torch.tensor([0, 2])), ValueError, r"from 0 to the number of tokens, 3, got \[0, 2\]"),
        (lambda: packed(torch.tensor([0, 4, 3])), ValueError, "cu_seqlens must rise"),
        (lambda: packed(torch.tensor([0.0, 3.0])), TypeError, "cu_seqlens must be int32 or int64"),
        (lambda: rewarded(kind="ppo"), ValueError, "kind='ppo' is unknown; expected one of cmdp"),
        (lambda: rewarded(kind="lagrangian"), ValueError, "needs coefficient="),
        (
            lambda: rewarded(kind="saute", coefficient=1.0),
            ValueError,
            "kind='saute' has no coefficient, got coefficient=1.0",
        ),
        (lambda: rewarded(penalty=-1.0), ValueError, "penalty must be finite and not negative"),
        (lambda: rewarded(kind="hinge", penalty_at="every"), ValueError, "has no penalty"),
        (lambda: cf.modified_reward(COST, COST, (COST,) * 5), TypeError, "trace must be the BudgetTrace"),
        (lambda: rewarded(violated=COST), TypeError, "trace.violated must be bool, got float32"),
        (lambda: rewarded(penalty_at="last"), ValueError, "penalty_at='last' is unknown"),
        (lambda: rewarded(reward=torch.ones(2, 4)), ValueError, r"task_reward must have the shape of cost, \[2, 3\]"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def packed(cu_seqlens):
    return cf.budget_trace(COST[0], 1.0, cu_seqlens=cu_seqlens)


def rewarded(reward=COST, violated=None, **settings):
    trace = cf.budget_trace(COST, 1.0)
    trace = trace if violated is None else trace._replace(violated=violated)
    return cf.modified_reward(reward, COST, trace, **settings)

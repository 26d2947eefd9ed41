"""Costs, rewards and budgets that are infinite, NaN or 0, and garbage behind the mask: one meaning everywhere."""

import random

import pytest
import torch
from helpers import here

import cmdp_fast as cf
from cmdp_fast import reference

INF, NAN = float("inf"), float("nan")
COSTS = ([0.0, 0.25, 0.5, 1.0, 3.0, -0.5, INF, -INF, NAN], [5, 5, 5, 5, 3, 2, 2, 1, 1])
REWARDS = ([0.0, 1.0, -1.0, INF, NAN], [5, 5, 5, 0.3, 0.3])
KINDS = {
    "cmdp": {"discrepancy_weight": (0.0, 0.5), "coefficient": (None, 0.0, 1.0), "penalty_at": ("crossing", "every")},
    "hinge": {"discrepancy_weight": (0.0, 0.5), "coefficient": (None, 0.0, 1.0)},
    "saute": {"penalty": (0.0, 1.0), "penalty_at": ("crossing", "every")},
    "lagrangian": {"coefficient": (0.0, 1.0)},
    "barrier": {"coefficient": (0.0, 1.0), "barrier_slope": (0.0, 2.0)},
    "worst_case": {"penalty": (0.0, 1.0)},
}


OF_NUMBERS = ("cumulative", "remaining", "excess")


def table(rng, choices, rows, columns, dtype):
    return here(torch.tensor([rng.choices(*choices, k=columns) for _ in range(rows)], dtype=dtype))


def one_case(rng):
    """Arguments of a trace and of the reward that follows."""
    rows, columns, dtype = rng.choice([1, 3]), rng.choice([1, 2, 5]), rng.choice([torch.float32, torch.float64])
    cost, task = table(rng, COSTS, rows, columns, dtype), table(rng, REWARDS, rows, columns, dtype)
    mask = table(rng, ([True, False], [2, 1]), rows, columns, torch.bool) if rng.random() < 0.6 else None
    numbers = (0.0, INF, 1.0, 0.5, 2.25, 0.3)
    budget = rng.choice(numbers)
    if rng.random() < 0.3:
        budget = here(torch.tensor(rng.choices(numbers, k=rows), dtype=torch.float64))
    gamma = rng.choice([1.0, 0.5])
    reduction = "sum" if gamma < 1 else rng.choice(["sum", "mean"])
    account = {"gamma": gamma, "reduction": reduction, "edge": rng.choice(["strict", "saute"])}
    account["per_token"] = rng.random() < 0.3
    kind = rng.choice(list(KINDS))
    paid = {"kind": kind, **{name: rng.choice(values) for name, values in KINDS[kind].items()}}
    layout = {"mask": mask}
    if rng.random() < 0.4:
        cost, task, mask = (t if t is None else t.flatten() for t in (cost, task, mask))
        layout = {"mask": mask, "cu_seqlens": here(torch.arange(0, rows * columns + 1, columns))}
    return cost, task, budget, layout, account, paid


def polluted(t, mask, rng):
    """Garbage where the mask is False."""
    return t if mask is None else torch.where(mask, t, rng.choice([NAN, INF, -INF, 1e30]))


def test_as_the_reference_has_it(backend):
    rng = random.Random(0)
    for _ in range(30 if backend in ("triton", "cuda") else 400):
        cost, task, budget, layout, account, paid = case = one_case(rng)
        expected = reference.budget_trace(cost, budget, **layout, **account)
        expected_reward = reference.modified_reward(task, cost, expected, **layout, **paid)
        cost, task = (polluted(t, layout["mask"], rng) for t in (cost, task))
        trace = cf.budget_trace(cost, budget, backend=backend, **layout, **account)
        reward = cf.modified_reward(task, cost, trace, backend=backend, **layout, **paid)
        for a, b in zip((*trace, reward), (*expected, expected_reward), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, case=case: f"{m}\n{case}")


@pytest.mark.parametrize("edge", ["strict", "saute"])
def test_an_infinite_budget_is_none(edge, backend):
    cost = here(torch.tensor([[1.0, INF, 2.0, NAN, 1.0]]))
    trace = cf.budget_trace(cost, INF, edge=edge, backend=backend)
    nan = [False, False, False, True, True]
    assert trace.violated.tolist() == [nan] and trace.first_violation.tolist() == [3]
    assert trace.remaining.isnan().tolist() == [nan] and trace.remaining[0, :3].tolist() == [INF] * 3
    assert trace.cumulative[0, :3].tolist() == [1.0, INF, INF] and trace.excess[0, :3].tolist() == [0.0] * 3
    task = torch.ones_like(cost)
    for kind in ("cmdp", "hinge", "saute", "barrier"):
        settings = {"kind": kind, "coefficient": 1.0 if kind == "barrier" else None}
        reward = cf.modified_reward(task, cost, trace, backend=backend, **settings)
        assert reward[0, :3].tolist() == [1.0] * 3, kind


def test_a_barrier_of_no_weight_has_no_logarithm(backend):
    """Of a budget that a negative cost has multiplied by more than a number holds."""
    cost = here(torch.tensor([[-1e308, 0.0]], dtype=torch.float64))
    reward = torch.ones_like(cost)
    trace = cf.budget_trace(cost, 1e-300, backend=backend)
    paid = cf.modified_reward(reward, cost, trace, kind="barrier", coefficient=0.0, backend=backend)
    assert torch.equal(paid, reward)


def test_an_infinite_budget_certifies_what_no_bound_is_known_of(backend):
    lower, upper = here(torch.tensor([[0.0, NAN], [INF, 0.0]])), here(torch.tensor([[INF, NAN], [INF, 0.0]]))
    assert cf.budget_verdict(lower, upper, INF, backend=backend).certified.all()
    verdict = cf.budget_verdict(lower, upper, 1.0, backend=backend)
    assert verdict.certified.tolist() == [False, False] and verdict.refuted.tolist() == [False, True]


def test_in_one_pass_as_in_turn(backend):
    """Columns that the teacher excludes cost infinitely much, and its gradient is that without a budget."""
    student = here(torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, 1.0]]).repeat(2, 1).reshape(2, 2, 3))
    teacher = student.flip(-1).clone()
    teacher[0, 0, 1], teacher[1, 1] = -INF, NAN
    tokens, task = here(torch.zeros(2, 2, dtype=torch.long)), here(torch.ones(2, 2))
    mask = here(torch.tensor([[True, True], [True, False]]))
    for budget in (INF, 0.0, 1.0):
        given = student.clone().requires_grad_()
        out = cf.constrained_reward(given, teacher, tokens, task, budget, mask=mask, backend=backend)
        trace = cf.budget_trace(out.stats.reverse_kl, budget, mask=mask, backend=backend)
        reward = cf.modified_reward(task, out.stats.reverse_kl, trace, mask=mask, backend=backend)
        for a, b in zip((*out.trace, out.reward), (*trace, reward), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert out.trace.cumulative[0].tolist() == [INF, INF]
        assert out.trace.violated[0].all().item() is (budget != INF) and out.reward[1, 1] == 0
        (gradient,) = torch.autograd.grad(out.stats.reverse_kl[mask].sum(), given)
        stats = cf.token_stats(given, teacher, tokens, mask=mask, backend=backend)
        assert torch.equal(gradient, torch.autograd.grad(stats.reverse_kl[mask].sum(), given)[0])
        assert gradient[1, 1].eq(0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["cmdp", "barrier"])  # the others look at no token before
@pytest.mark.parametrize("packed", [False, True])
def test_a_trace_of_masked_tokens_is_not_looked_at(kind, packed, backend):
    """Whatever stands there: a token follows the last one that is real, however far away that is."""
    rng = random.Random(f"{kind} {packed}")
    priced = {"coefficient": 0.5} if kind == "barrier" else {}
    for _ in range(3 if backend in ("triton", "cuda") else 20):
        cost, task = (table(rng, choices, 3, 9, torch.float32) for choices in (COSTS, REWARDS))
        mask, junk = (table(rng, ([True, False], [1, 1]), 3, 9, torch.bool) for _ in range(2))
        layout = {"mask": mask}
        if packed:
            cost, task, mask, junk = (t.flatten() for t in (cost, task, mask, junk))
            layout = {"mask": mask, "cu_seqlens": here(torch.arange(0, 28, 9))}
        trace = cf.budget_trace(cost, 0.8, **layout, backend=backend)
        odd = trace._replace(violated=torch.where(mask, trace.violated, junk))
        odd = odd._replace(**{name: torch.where(mask, getattr(odd, name), NAN) for name in OF_NUMBERS})
        settings = {"kind": kind, **priced, **layout, "backend": backend}
        expected, got = (cf.modified_reward(task, cost, t, **settings) for t in (trace, odd))
        assert torch.equal(got.nan_to_num(7e7), expected.nan_to_num(7e7))

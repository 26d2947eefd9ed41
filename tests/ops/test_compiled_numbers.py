"""One compiled graph serves every value of a number: a budget, a multiplier, a temperature that changes each step."""

import dataclasses

import pytest
import torch
from helpers import make_logits, make_tokens
from torch._dynamo.testing import CompileCounterWithBackend

import cmdp_fast as cf
from cmdp_fast.cpu import native
from cmdp_fast.pid import PIDController

GRAPHS = 2  # torch makes the first for the value at hand, and one for any value once it has changed
VALUES = (0.3, 0.7, 0.45)
needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")
X, Y, TOKENS = make_logits(2, 3, 9), make_logits(2, 3, 9, seed=1), make_tokens(2, 3, vocab=9)
TASK, COST = make_logits(2, 3, seed=2), make_logits(2, 3, seed=3).abs()
HIDDEN, WEIGHT = make_logits(2, 3, 5, seed=4), make_logits(9, 5, seed=5)
IDS = torch.tensor([0, 4, 2]).expand(2, 3, 3).contiguous()
LOGPROBS = Y.log_softmax(-1).gather(-1, IDS)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def accounts(v, _, backend):
    """Everything of a budget, in which each number is v."""
    trace = cf.budget_trace(COST, v, gamma=v, per_token=True, mask=MASK, backend=backend)
    verdict = cf.budget_verdict(COST, COST + 0.1, cf.discounted_budget(v, 0.9, 3), backend=backend)
    rewards = [
        cf.modified_reward(TASK, COST, trace, penalty=v, discrepancy_weight=v, coefficient=v, backend=backend),
        cf.modified_reward(TASK, COST, trace, kind="barrier", coefficient=v, barrier_slope=v, backend=backend),
    ]
    return (*trace, *verdict, *rewards)


def of_logits(v, x, backend):
    shared = {"temperature": v, "backend": backend}
    jsd = cf.divergence(x, Y, beta=v, **shared)
    clamped = cf.constrained_reward(x, Y, TOKENS, TASK, v, cost="k1", cost_clamp=v, **shared)
    if backend == "torch":
        return *clamped.stats, jsd, clamped.reward
    tail = cf.topk_stats(x, IDS, LOGPROBS, TOKENS, min_logprob=-v - 9, **shared)
    out = cf.constrained_reward(x, Y, TOKENS, TASK, v, gamma=v, coefficient=v, penalty=v, **shared)
    return (*clamped.stats, jsd, *tail, clamped.reward, out.stats.reverse_kl, *out.trace, out.reward)


def of_heads(v, x, backend):
    hidden, shared = HIDDEN * x.sum(), {"temperature": v, "backend": backend}
    heads = (hidden, cf.Head(WEIGHT, None, v, v), HIDDEN, cf.Head(WEIGHT, None, None, v))
    jsd = cf.linear_divergence(*heads, beta=v, **shared)
    tail = cf.linear_topk_stats(*heads[:2], IDS, LOGPROBS, TOKENS, **shared)
    out = cf.linear_constrained_reward(*heads, TOKENS, TASK, v, coefficient=v, gamma=v, **shared)
    return (*out.stats, jsd, *tail, out.reward)


def of_tiles(v, x, backend):
    state = cf.TokenState.empty(6, temperature=v)
    state.update(x.flatten(0, 1), Y.flatten(0, 1), TOKENS.flatten(), backend=backend)
    return (*state.finish(), cf.dropped_teacher_mass(x, 5, temperature=v))


def settle(v, x, backend):
    """A constraint as an argument, whose price somebody chooses anew each step."""
    out = cf.constrained_reward(x, Y, TOKENS, TASK, constraint=v, backend=backend)
    return out.stats.reverse_kl, out.reward, *out.trace


def check(f, values, backend):
    """Results and gradients as without torch.compile, from no more than GRAPHS graphs."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for value in values:
        found, expected, x, y = [], [], X.clone().requires_grad_(), X.clone().requires_grad_()
        for call, results, wanted in ((compiled, found, x), (f, expected, y)):
            results.extend(call(value, wanted, backend))
            differentiable = [t.sum() for t in results if t.requires_grad and t.isfinite().all()]
            if differentiable:
                sum(differentiable).backward()
                results.append(wanted.grad)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and torch.allclose(a.double(), b.double(), rtol=1e-6, equal_nan=True)
    assert counter.frame_count == GRAPHS


@needs_native
@pytest.mark.parametrize("f", [accounts, of_logits, of_heads, of_tiles])
def test_a_number_that_changes_makes_no_new_graph(f):
    check(f, VALUES, "cpu")


def test_nor_where_pytorch_makes_the_statistics():
    check(of_logits, VALUES, "torch")


@needs_native
def test_an_adaptive_multiplier_makes_no_new_graph():
    controller, constraint = PIDController(), cf.Constraint(budget=1.0, kind="pid", coefficient=0.5)

    def steps():
        for cost in (5.0, 3.0, 4.0):
            yield dataclasses.replace(constraint, coefficient=controller.update(cost, 1.0), budget=cost / 2)

    check(settle, steps(), "cpu")


def test_a_number_that_does_not_change_stays_a_constant_of_its_graph():
    """So that a graph that is captured for a GPU has no tensor of the host in it."""
    torch.compiler.reset()
    hosted = []

    def keep(graph, inputs):
        hosted.extend(node.args[-2] for node in graph.graph.nodes if "cmdp_fast" in str(node.target))
        return graph.forward

    torch.compile(lambda x: cf.budget_trace(x[0], 0.5, gamma=0.9, backend="torch"), fullgraph=True, backend=keep)(X)
    assert hosted and not any(node is not None for node in hosted)


def test_a_number_that_is_refused_is_refused_in_a_graph():
    torch.compiler.reset()
    compiled = torch.compile(lambda v: cf.budget_trace(COST, v, backend="torch").excess, backend="aot_eager")
    for value in (0.5, 0.7):
        compiled(value)
    for value in (-0.5, float("nan")):
        with pytest.raises(ValueError, match="budget must be at least 0"):
            compiled(value)
    assert compiled(float("inf")).eq(0).all()

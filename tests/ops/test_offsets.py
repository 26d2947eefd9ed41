"""Where packed sequences begin: any operation, on any backend, refuses offsets that are none before it computes."""

import re

import pytest
import torch
from helpers import here, make_logits, make_tokens

import cmdp_fast as cf

N, WIDTH = 6, 5
RISING = "cu_seqlens must rise from 0 to the number of tokens, 6, got"
WRONG = {
    "not from 0": ([1, 3, 6], ValueError, RISING),
    "before the first": ([-2, 3, 6], ValueError, RISING),
    "falling": ([0, 4, 2, 6], ValueError, RISING),
    "beyond the end": ([0, 3, 9], ValueError, RISING),
    "short of the end": ([0, 3, 5], ValueError, RISING),
    "far beyond": ([0, 2**40, 6], ValueError, RISING),
    "empty": ([], TypeError, r"cu_seqlens must be int32 or int64 of shape \[B\+1\]"),
    "a matrix": ([[0, 6]], TypeError, r"cu_seqlens must be int32 or int64 of shape \[B\+1\]"),
    "floats": ([0.0, 6.0], TypeError, "cu_seqlens must be int32 or int64"),
    "a list": (None, TypeError, "cu_seqlens must be a tensor, got list"),
    "elsewhere": ("meta", ValueError, "cu_seqlens is on meta, but"),
}


def budget_trace(offsets, backend, **settings):
    return cf.budget_trace(make_logits(N).abs(), 1.0, cu_seqlens=offsets, backend=backend, **settings)


def budget_verdict(offsets, backend):
    cost = make_logits(N).abs()
    return cf.budget_verdict(cost, cost, 1.0, cu_seqlens=offsets, backend=backend)


def modified_reward(offsets, backend):
    cost = make_logits(N).abs()
    trace = cf.budget_trace(cost, 1.0, cu_seqlens=here(torch.tensor([0, 2, 6])), backend=backend)
    return cf.modified_reward(make_logits(N), cost, trace, cu_seqlens=offsets, backend=backend)


def constrained_reward(offsets, backend, **settings):
    logits = make_logits(N, WIDTH), make_logits(N, WIDTH, seed=1)
    tokens = make_tokens(N, vocab=WIDTH)
    return cf.constrained_reward(*logits, tokens, make_logits(N), 1.0, cu_seqlens=offsets, backend=backend, **settings)


def linear_constrained_reward(offsets, backend):
    heads = make_logits(N, 4), make_logits(WIDTH, 4), make_logits(N, 4, seed=1), make_logits(WIDTH, 4, seed=1)
    backend = "torch" if backend == "cuda" else backend
    tokens = make_tokens(N, vocab=WIDTH)
    return cf.linear_constrained_reward(*heads, tokens, make_logits(N), 1.0, cu_seqlens=offsets, backend=backend)


OPERATIONS = (budget_trace, budget_verdict, modified_reward, constrained_reward, linear_constrained_reward)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_wrong_offsets_are_refused(operation, backend):
    operation(here(torch.tensor([0, 2, 2, 6], dtype=torch.int32)), backend)
    on_gpu = torch.get_default_device().type != "cpu"
    for what, (values, error, message) in WRONG.items():
        if values is None:
            offsets = [0, 6]
        elif values == "meta":
            offsets = torch.zeros(2, dtype=torch.int64, device="meta")
        else:
            offsets = here(torch.tensor(values))
        if on_gpu and message is RISING:  # looking would stall the device
            continue
        with pytest.raises(error, match=message):
            operation(offsets, backend)
            pytest.fail(f"{what} was taken")


@pytest.mark.parametrize("operation", [budget_trace, constrained_reward], ids=lambda f: f.__name__)
def test_a_budget_per_token_refuses_them_too(operation, backend):
    if torch.get_default_device().type != "cpu":
        pytest.skip("looking at the offsets would stall a GPU")
    for values in ([0, 3, 9], [0, 4, 2, 6], [0, -7, 6]):
        with pytest.raises(ValueError, match=RISING):
            operation(here(torch.tensor(values)), backend, per_token=True)


def test_a_graph_refuses_them_when_it_runs():
    torch.compiler.reset()
    cost = make_logits(N).abs()

    def both(offsets):
        trace = cf.budget_trace(cost, 1.0, cu_seqlens=offsets, per_token=True, backend="torch")
        return cf.modified_reward(cost, cost, trace, cu_seqlens=offsets, backend="torch")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    good = torch.tensor([0, 2, 6])
    assert torch.equal(compiled(good), both(good))
    for values in ([0, 3, 9], [0, 4, 2], [1, 2, 6]):
        with pytest.raises(ValueError, match=RISING):
            compiled(torch.tensor(values))


def test_a_reward_refuses_them_by_itself():
    """Nothing else of a graph may have looked: the trace may be another's."""
    torch.compiler.reset()
    cost = make_logits(N).abs()
    trace = cf.budget_trace(cost, 1.0, cu_seqlens=torch.tensor([0, 2, 6]), backend="torch")

    def reward(offsets):
        return cf.modified_reward(cost, cost, trace, cu_seqlens=offsets, backend="torch")

    compiled = torch.compile(reward, fullgraph=True, backend="aot_eager")
    for values in ([0, 3, 9], [0, 4, 2], [1, 2, 6]):
        with pytest.raises(ValueError, match=RISING):
            compiled(torch.tensor(values))


@pytest.mark.parametrize("per_token", [False, True])
def test_a_transform_refuses_them_too(per_token, backend):
    if torch.get_default_device().type != "cpu":
        pytest.skip("looking at the offsets would stall a GPU")
    costs = make_logits(2, N).abs()

    def excess(cost, offsets):
        return cf.budget_trace(cost, 1.0, cu_seqlens=offsets, per_token=per_token, backend=backend).excess

    good = here(torch.tensor([0, 2, 6]))
    mapped = torch.func.vmap(lambda cost: excess(cost, good))(costs)
    assert torch.equal(mapped, torch.stack([excess(cost, good) for cost in costs]))
    for values in ([0, 3, 9], [0, 4, 2, 6]):
        wrong = here(torch.tensor(values))
        # Torch warns of its loop over the batch while our error is on its way, and raises a SystemError of the two.
        with pytest.raises((ValueError, SystemError)) as raised:
            torch.func.vmap(lambda cost, wrong=wrong: excess(cost, wrong))(costs)
        assert re.search(RISING, f"{raised.value} {raised.value.__cause__}")

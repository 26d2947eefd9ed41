"""`linear_*` under autocast multiply the factors that F.linear would, on a CPU too; their sums are not rounded."""

from contextlib import nullcontext

import pytest
import torch
from helpers import assert_no_worse, make_logits, weighted_sum
from linear_inputs import PARTS, make_inputs

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.ops.backends import INTERPRETED

pytestmark = [pytest.mark.tiles, pytest.mark.mixture, pytest.mark.usefixtures("tiny_tiles")]

HALVES = (torch.bfloat16, torch.float16)
UPSTREAM = {name: make_logits(6, scale=1.0, seed=i) for i, name in enumerate(("reverse_kl", "logprob", "entropy"))}
OPTIONS = ({}, {"temperature": 0.7, "student_scale": 0.6, "teacher_scale": -1.5}, {"student_softcap": 3.0})


@pytest.fixture
def backend(backend):
    if torch.get_default_device().type != "cpu":
        pytest.skip("on a GPU: test_linear_halves.py")
    return backend


def statistics(inputs, **settings):
    stats = cf.linear_token_stats(**inputs, **settings)
    return tuple(stats), weighted_sum(stats, UPSTREAM)


def mixture(inputs, **settings):
    models = {name: value for name, value in inputs.items() if name != "tokens"}
    value = cf.linear_divergence(**models, beta=0.3, **settings)
    return (value,), (value.double() * UPSTREAM["reverse_kl"]).sum()


def reward(inputs, **settings):
    models = {name: t if "weight" in name or "bias" in name else t.unsqueeze(0) for name, t in inputs.items()}
    task = torch.zeros(1, 6)
    out = cf.linear_constrained_reward(**models, task_reward=task, budget=1.0, cost="jsd", kind="hinge", **settings)
    return (*out.stats, *out.trace, out.reward), out.stats.forward_kl.sum()


def run(operation, inputs, *, autocast=None, backward_in=None, **settings):
    """The results, and the gradients of the student's parts."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in PARTS}
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        results, loss = operation({**inputs, **leaves}, **settings)
    with torch.autocast("cpu", dtype=backward_in or torch.bfloat16, enabled=backward_in is not None):
        return results, torch.autograd.grad(loss, list(leaves.values()))


def rounded(inputs, dtype):
    """Hidden states and heads as autocast casts them; biases as they are."""
    return {name: t.to(dtype) if "hidden" in name or "weight" in name else t for name, t in inputs.items()}


def of_models(student, teacher):
    inputs = make_inputs(rows=(6,), vocab=50, biased=True)
    for model, (hidden, weight) in (("student", student), ("teacher", teacher)):
        inputs[f"{model}_hidden"] = inputs[f"{model}_hidden"].to(hidden)
        inputs[f"{model}_weight"] = inputs[f"{model}_weight"].to(weight)
    return inputs


FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
MODELS = [((FLOAT, FLOAT), (FLOAT, FLOAT)), ((BRAIN, FLOAT), (FLOAT, HALF)), ((HALF, HALF), (BRAIN, BRAIN))]


@pytest.mark.parametrize("options", OPTIONS[-1:] if INTERPRETED else OPTIONS, ids=str)  # no kernel knows of autocast
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("models", MODELS[1:2] if INTERPRETED else MODELS, ids=str)
@pytest.mark.parametrize("operation", [statistics, mixture, reward])
def test_results_are_those_of_the_rounded_factors(operation, models, dtype, options, backend):
    """To the last bit; gradients arrive in the dtype of the parameter, those of float32 ones unrounded."""
    inputs = of_models(*models)
    results, gradients = run(operation, inputs, autocast=dtype, backend=backend, **options)
    expected, of_rounded = run(operation, rounded(inputs, dtype), backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    for name, a, b in zip(PARTS, gradients, of_rounded, strict=True):
        assert a.dtype == inputs[name].dtype
        if a.dtype in (FLOAT, b.dtype):
            assert torch.equal(a.to(b.dtype), b)
    if inputs["student_weight"].dtype == FLOAT:
        assert not torch.equal(gradients[1].to(dtype).float(), gradients[1])
    if models == MODELS[0]:
        unlike, _ = run(operation, inputs, backend=backend, **options)
        assert not torch.equal(results[0], unlike[0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("operation", [statistics, mixture])
def test_no_worse_than_linear_layers_under_autocast(operation, dtype, backend):
    """Against float64 of the rounded factors, measured by F.linear under autocast and the logits' statistics."""
    inputs = make_inputs(rows=(6,), vocab=50, hidden=(64, 96))
    inputs |= {f"{model}_bias": torch.zeros(50) for model in ("student", "teacher")}

    def from_logits(inputs):
        x, y = (
            torch.nn.functional.linear(inputs[f"{model}_hidden"], inputs[f"{model}_weight"], inputs[f"{model}_bias"])
            for model in ("student", "teacher")
        )
        if operation is mixture:
            value = reference.divergence(x, y, beta=0.3)
            return (value,), (value.double() * UPSTREAM["reverse_kl"]).sum()
        stats = reference.token_stats(x, y, inputs["tokens"])
        return tuple(stats), weighted_sum(stats, UPSTREAM)

    ours, gradients = run(operation, inputs, autocast=dtype, backend=backend)
    eager, eager_gradients = run(from_logits, inputs, autocast=dtype)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in rounded(inputs, dtype).items()}
    exact, exact_gradients = run(from_logits, wide)
    for a, b, c in zip((*ours, *gradients), (*eager, *eager_gradients), (*exact, *exact_gradients), strict=True):
        assert a.dtype == torch.float32
        size = max(1.0, 3 * float(exact[-1].detach().abs().max()))
        assert_no_worse(a, b, c, size=size * float(inputs["student_weight"].abs().max()))
        error, theirs = ((t.detach().double() - c.detach()).abs().max() for t in (a, b))
        assert error < theirs / 8


@pytest.mark.parametrize("dtype", HALVES[:1] if INTERPRETED else HALVES)
@pytest.mark.parametrize("operation", [statistics, mixture])
def test_the_backward_pass_has_the_factors_of_the_forward_pass(operation, dtype, backend):
    inputs = make_inputs(rows=(6,), vocab=50, biased=True)
    other = HALVES[1 - HALVES.index(dtype)]
    _, gradients = run(operation, inputs, autocast=dtype, backward_in=dtype, backend=backend)
    for backward_in in (None, other):
        _, others = run(operation, inputs, autocast=dtype, backward_in=backward_in, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    _, plain = run(operation, inputs, backend=backend)
    _, under = run(operation, inputs, backward_in=dtype, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


@pytest.mark.parametrize("operation", [statistics, mixture, reward])
def test_autocast_that_is_switched_off_inside(operation, backend):
    def inside(inputs, **settings):
        with torch.autocast("cpu", enabled=False):
            return operation(inputs, **settings)

    inputs = make_inputs(rows=(6,), vocab=50, biased=True)
    found, expected = run(inside, inputs, autocast=BRAIN, backend=backend), run(operation, inputs, backend=backend)
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.float64
@pytest.mark.parametrize("teacher", [FLOAT, torch.float64])
@pytest.mark.parametrize("operation", [statistics, mixture])
def test_float64_is_left_alone(operation, teacher, backend):
    """As F.linear leaves it; where one of them is float64 all of it is, under autocast as without."""
    x, w = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with torch.autocast("cpu", dtype=BRAIN):
        assert torch.nn.functional.linear(x, w).dtype == torch.float64
    inputs = make_inputs(rows=(6,), vocab=50, student=torch.float64, teacher=teacher, biased=True)
    found, expected = (run(operation, inputs, autocast=on, backend=backend) for on in (BRAIN, None))
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("outside", [True] if INTERPRETED else [False, True])
@pytest.mark.parametrize("operation", [statistics, mixture])
def test_compile_gives_equal_results(operation, outside, backend):
    """Autocast around the compiled function, or inside it. Around it, without autocast it is another graph."""

    def function(inputs):
        with nullcontext() if outside else torch.autocast("cpu", dtype=BRAIN):
            return operation(inputs, backend=backend)

    inputs = make_inputs(rows=(6,), vocab=50, biased=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for around in (BRAIN, None) if outside else (None,):
        found = run(compiled, inputs, autocast=around)
        expected = run(operation, inputs, autocast=around if outside else BRAIN, backend=backend)
        for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(a, b)

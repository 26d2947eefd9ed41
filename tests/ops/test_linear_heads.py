"""The heads of linear_token_stats: dtypes, bias, softcap and scale, widths that differ, and a `Head` for all of it."""

import itertools

import pytest
import torch
from helpers import DIFFERENTIABLE, DTYPES, assert_no_worse, make_logits, make_tokens
from linear_inputs import check, evaluate, make_inputs

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.cpu import native

pytestmark = pytest.mark.tiles

needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")
INF = torch.inf


WIDE = pytest.mark.float64


@pytest.mark.parametrize(
    "hidden, weight, bias",
    [(0, 1, 2), (1, 0, 0), pytest.param(3, 0, 1, marks=WIDE), pytest.param(2, 3, 0, marks=WIDE), (0, 0, 3)],
)
def test_mixed_dtypes_within_a_model(hidden, weight, bias, tiny_tiles, backend):
    inputs = make_inputs(rows=(6,), vocab=50, biased=True)
    for model in ("student", "teacher"):
        for part, dtype in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            inputs[f"{model}_{part}"] = inputs[f"{model}_{part}"].to(DTYPES[dtype])
    check(inputs, backend)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"student_softcap": 3.0},
        {"teacher_softcap": 3.0},
        {"student_scale": 0.6, "teacher_scale": -1.5},
        {"student_scale": 0.7, "teacher_scale": 1.3, "student_softcap": 5.0, "teacher_softcap": 3.0},
        {"student_scale": 2.0, "student_softcap": 0.5, "temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True])
def test_scale_softcap_and_temperature(options, biased, tiny_tiles, backend):
    check(make_inputs(rows=(6,), vocab=50, biased=biased), backend, **options)


@pytest.mark.parametrize("widths", [(50, 40), (40, 50), (50, 50)])
def test_a_common_prefix_of_the_vocabulary(widths, tiny_tiles, backend):
    inputs = make_inputs(rows=(6,), vocab=50, biased=True)
    for model, width in zip(("student", "teacher"), widths, strict=True):
        for part in ("weight", "bias"):
            inputs[f"{model}_{part}"] = inputs[f"{model}_{part}"][:width]
    inputs["tokens"] = make_tokens(6, vocab=37)
    _, gradients = check(inputs, backend, vocab_size=37)
    assert not gradients["student_weight"][37:].any() and not gradients["student_bias"][37:].any()


def test_columns_that_a_model_may_not_use(tiny_tiles, backend):
    """A bias of -inf: on both sides it is as if the column were not there, on one side a divergence is infinite."""
    inputs = make_inputs(rows=(6,), vocab=50, biased=True)
    gone = torch.tensor([0, 15, 16, 49])
    kept = torch.tensor([c for c in range(50) if c not in gone.tolist()])
    inputs["tokens"] = kept[:6]
    for model in ("student", "teacher"):
        inputs[f"{model}_bias"][gone] = -INF
    smaller = {**inputs, "tokens": torch.arange(6)}
    for model, part in itertools.product(("student", "teacher"), ("weight", "bias")):
        smaller[f"{model}_{part}"] = inputs[f"{model}_{part}"][kept]
    stats, gradients = evaluate(cf.linear_token_stats, inputs, backend=backend)
    expected, expected_gradients = evaluate(cf.linear_token_stats, smaller, backend=backend)
    for a, b in zip(stats, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradients["student_hidden"], expected_gradients["student_hidden"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradients["student_weight"][kept], expected_gradients["student_weight"], rtol=1e-4, atol=1e-5)
    assert not gradients["student_weight"][gone].any() and not gradients["student_bias"][gone].any()

    inputs["student_bias"][gone] = 0.0
    one_sided, gradients = evaluate(cf.linear_token_stats, inputs, backend=backend)
    assert torch.isposinf(one_sided.reverse_kl).all() and one_sided.forward_kl.isfinite().all()
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.float64
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_huge_logits(size, tiny_tiles, backend):
    inputs = make_inputs(rows=(6,), vocab=50, biased=True, student=torch.float64, teacher=torch.float64)
    inputs["student_bias"][20] += size
    inputs["teacher_bias"][3] -= size
    check(inputs, backend)


def test_with_an_identity_for_a_head_it_is_token_stats(tiny_tiles, backend):
    x, y, tokens = make_logits(2, 5, 61), make_logits(2, 5, 61, seed=1), make_tokens(2, 5, vocab=61)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    eye, leaves, gradients, results = torch.eye(61), (x.clone(), x.clone()), [], []
    for leaf, call in zip(
        leaves,
        (
            lambda h: cf.linear_token_stats(h, eye, y, eye, tokens, mask=mask, backend=backend),
            lambda h: cf.token_stats(h, y, tokens, mask=mask, backend=backend),
        ),
        strict=True,
    ):
        leaf.requires_grad_()
        stats = call(leaf)
        results.append(stats)
        gradients.append(torch.autograd.grad(sum(getattr(stats, n).sum() for n in DIFFERENTIABLE), leaf)[0])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=2e-6)
    assert torch.allclose(*gradients, rtol=1e-5, atol=2e-6)


def test_a_head_stands_for_its_weight_and_what_belongs_to_it(backend):
    """As `head_of` gives it, for a model with a softcap (Gemma), a scale (Cohere) or a bias."""
    inputs = make_inputs(rows=(2, 3), vocab=50, biased=True)
    spelled = inputs | {"student_softcap": 5.0, "student_scale": 0.5, "teacher_scale": 2.0}
    heads = {
        "student_weight": cf.Head(inputs["student_weight"], inputs["student_bias"], softcap=5.0, scale=0.5),
        "teacher_weight": cf.Head(inputs["teacher_weight"], inputs["teacher_bias"], scale=2.0),
    }
    whole = {name: value for name, value in inputs.items() if not name.endswith("bias")} | heads
    expected, found = (cf.linear_token_stats(**given, backend=backend) for given in (spelled, whole))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    reward = torch.ones(2, 3)
    rewards = [cf.linear_constrained_reward(**g, task_reward=reward, budget=1.0).reward for g in (spelled, whole)]
    assert torch.equal(*rewards)


@pytest.mark.parametrize("repeated", [{"bias": None}, {"softcap": None}, {"scale": 1.0}], ids=str)
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_head_and_one_of_its_fields_is_an_error(model, repeated):
    inputs = make_inputs(rows=(2, 3), vocab=9)
    inputs[f"{model}_weight"] = cf.Head(inputs[f"{model}_weight"])
    ((field, value),) = repeated.items()
    for call in (
        cf.linear_token_stats,
        lambda **k: cf.linear_constrained_reward(**k, task_reward=torch.ones(2, 3), budget=1.0),
    ):
        with pytest.raises(
            TypeError, match=rf"{model}_weight is a Head, which brings its own; {model}_{field} must not"
        ):
            call(**inputs, **{f"{model}_{field}": value})
    with pytest.raises(TypeError, match="unexpected keyword argument 'student_scales'"):
        cf.linear_token_stats(**inputs, student_scales=2.0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_summed_in_float32_and_rounded_once(dtype, tiny_tiles):
    """Bitwise. Rounding the product of every tile before it is added would bias a training run."""
    inputs = make_inputs(rows=(23,), vocab=200, student=dtype, teacher=dtype, biased=True)
    widened = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    stats, gradients = evaluate(cf.linear_token_stats, inputs, backend="cpu")
    wide_stats, wide_gradients = evaluate(cf.linear_token_stats, widened, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(stats, wide_stats, strict=True))
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype and torch.equal(gradient, wide_gradients[name].to(dtype)), name


def test_the_reference_makes_the_logits_in_full():
    inputs = make_inputs(rows=(4,), vocab=20, student=torch.float64, teacher=torch.float64)
    x = 5 * torch.tanh(0.5 * (inputs["student_hidden"] @ inputs["student_weight"].t()) / 5)
    y = inputs["teacher_hidden"] @ inputs["teacher_weight"].t()
    got = reference.linear_token_stats(**inputs, student_scale=0.5, student_softcap=5.0)
    for a, b in zip(got, reference.token_stats(x, y, inputs["tokens"]), strict=True):
        assert_no_worse(a, a, b)

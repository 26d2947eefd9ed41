"""linear_token_stats against logits made in full: values, gradients, rows that do not count, torch, and every error."""

import itertools

import pytest
import torch
from helpers import DIFFERENTIABLE, DTYPES, make_logits, weighted_sum
from linear_inputs import check, evaluate, make_inputs, perturbed

import cmdp_fast as cf

pytestmark = pytest.mark.tiles

INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize("student, teacher", list(itertools.product(DTYPES, DTYPES)))
def test_every_pair_of_dtypes(student, teacher, tiny_tiles, backend):
    check(make_inputs(rows=(6,), vocab=50, student=student, teacher=teacher, biased=True), backend)


@pytest.mark.float64
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name, tiny_tiles, backend):
    inputs = make_inputs(rows=(6,), vocab=18, hidden=(2, 3), student=torch.float64, teacher=torch.float64, biased=True)
    mask = torch.tensor([True, True, False, True, True, True])

    def statistic(hidden, weight, bias):
        changed = {**inputs, "student_hidden": hidden, "student_weight": weight, "student_bias": bias}
        stats = cf.linear_token_stats(
            **changed, mask=mask, temperature=0.7, student_scale=0.8, student_softcap=4.0, backend=backend
        )
        return getattr(stats, name)

    parts = [inputs[f"student_{part}"].requires_grad_() for part in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(statistic, parts)


@pytest.mark.parametrize("present", [c for n in range(1, 5) for c in itertools.combinations(DIFFERENTIABLE, n)])
def test_any_subset_of_upstream_gradients(present, tiny_tiles, backend):
    check(make_inputs(rows=(6,), vocab=50), backend, present=present)


@pytest.mark.parametrize("needed", [c for n in range(1, 4) for c in itertools.combinations(range(3), n)])
def test_only_what_needs_a_gradient_gets_one(needed, tiny_tiles, backend):
    inputs = make_inputs(rows=(6,), vocab=50, biased=True)
    _, everything = evaluate(cf.linear_token_stats, inputs, backend=backend)
    parts = [f"student_{part}" for part in ("hidden", "weight", "bias")]
    leaves = {name: inputs[name].clone().requires_grad_(i in needed) for i, name in enumerate(parts)}
    inputs = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in inputs.items()}
    stats = cf.linear_token_stats(**{**inputs, **leaves}, backend=backend)
    weighted_sum(stats, {name: torch.ones(6) for name in DIFFERENTIABLE}).backward()
    for i, name in enumerate(parts):
        if i in needed:
            assert leaves[name].grad.dtype == leaves[name].dtype
        else:
            assert leaves[name].grad is None
    assert all(inputs[f"teacher_{part}"].grad is None for part in ("hidden", "weight", "bias"))
    assert everything.keys() == set(parts)


def test_there_is_no_second_derivative(backend):
    inputs = make_inputs(rows=(2,), vocab=20)
    hidden = inputs["student_hidden"].requires_grad_()
    stats = cf.linear_token_stats(**inputs, backend=backend)
    gradient = torch.autograd.grad(stats.reverse_kl.sum(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_a_second_backward_pass_gives_the_same(backend):
    inputs = make_inputs(rows=(6,), vocab=50)
    hidden = inputs["student_hidden"].requires_grad_()
    loss = cf.linear_token_stats(**inputs, backend=backend).reverse_kl.sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)


def test_a_masked_row_is_not_read_and_gets_no_gradient(tiny_tiles, backend):
    inputs = make_inputs(rows=(3, 4), vocab=50, biased=True)
    mask = make_logits(3, 4, scale=1.0, seed=2) > -0.3
    stats, gradients = evaluate(cf.linear_token_stats, inputs, mask=mask, backend=backend)
    spoilt = perturbed(inputs, mask)
    again, gradients_again = evaluate(cf.linear_token_stats, spoilt, mask=mask, backend=backend)
    for a, b in zip(stats, again, strict=True):
        assert torch.equal(a, b) and not a[~mask].any() and a[mask].any()
    for name in gradients:
        assert torch.equal(gradients[name], gradients_again[name]), name
    per_row = gradients["student_hidden"].abs().sum(-1)
    assert (per_row[mask] > 0).all() and not per_row[~mask].any()
    check(inputs, backend, mask=mask)


def test_nothing_counts(backend):
    inputs = make_inputs(rows=(2, 3), vocab=50, biased=True)
    stats, gradients = evaluate(
        cf.linear_token_stats, inputs, mask=torch.zeros(2, 3, dtype=torch.bool), backend=backend
    )
    assert all(s.shape == (2, 3) and not s.any() for s in stats)
    assert all(g.shape == inputs[name].shape and not g.any() for name, g in gradients.items())


@pytest.mark.parametrize("rows", [(0,), (3, 0), ()])
def test_empty_and_single(rows, backend):
    inputs = make_inputs(rows=rows, vocab=50)
    stats, gradients = evaluate(cf.linear_token_stats, inputs, backend=backend)
    assert all(s.shape == torch.Size(rows) for s in stats)
    assert all(g.shape == inputs[name].shape for name, g in gradients.items())


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_nan_stays_in_its_row(model, value, tiny_tiles, backend):
    inputs = make_inputs(rows=(6,), vocab=50)
    clean, gradients = evaluate(cf.linear_token_stats, inputs, backend=backend)
    inputs[f"{model}_hidden"][4, 2] = value
    stats, bad = evaluate(cf.linear_token_stats, inputs, backend=backend)
    others = torch.arange(6) != 4
    for a, b in zip(stats, clean, strict=True):
        assert a[4].isnan() and torch.equal(a[others], b[others])
    assert bad["student_hidden"][4].isnan().all()
    assert torch.allclose(bad["student_hidden"][others], gradients["student_hidden"][others])


def test_any_strides(tiny_tiles, backend):
    inputs = make_inputs(rows=(4, 6), vocab=50, biased=True)
    strided = dict(inputs)
    strided["student_hidden"] = inputs["student_hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["student_weight"] = inputs["student_weight"].t().contiguous().t()
    strided["teacher_weight"] = inputs["teacher_weight"].repeat(1, 2)[:, : inputs["teacher_weight"].shape[1]]
    strided["tokens"] = inputs["tokens"].t().contiguous().t()
    plain, gradients = evaluate(cf.linear_token_stats, inputs, backend=backend)
    stats, others = evaluate(cf.linear_token_stats, strided, backend=backend)
    for a, b in zip(stats, plain, strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=2e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(others[name], gradient, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_equal_results(dynamic, backend):
    def loss(inputs):
        stats = cf.linear_token_stats(**inputs, student_softcap=5.0, teacher_scale=0.5, backend=backend)
        return stats, weighted_sum(stats, {name: torch.ones(6) for name in DIFFERENTIABLE})

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for vocab in (50, 70):
        inputs = make_inputs(rows=(6,), vocab=vocab, biased=True)
        leaves = [inputs[f"student_{part}"].requires_grad_() for part in ("hidden", "weight", "bias")]
        (plain, total), (stats, compiled_total) = loss(inputs), compiled(inputs)
        for a, b in zip(plain, stats, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
        for a, b in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(compiled_total, leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("saved", ["recompute", "teacher", "tiles"])
def test_opcheck(needs, saved, backend):
    inputs = make_inputs(rows=(2, 3), vocab=50, biased=True)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    names = ("hidden", "weight", "bias")
    student, teacher = ([inputs[f"{model}_{part}"] for part in names] for model in ("student", "teacher"))
    capped, plain, batch = (5.0, 0.8), (None, 1.0), (inputs["tokens"], mask, 0.7, 50, 0, "", saved, backend)
    forward = torch.ops.cmdp_fast.linear_token_stats.default
    kept = forward(*student, *capped, *teacher, *plain, *batch, 50, "", True)[6:]
    upstream = (torch.rand(2, 3), None, torch.rand(2, 3), None)
    torch.library.opcheck(
        torch.ops.cmdp_fast.linear_token_stats_backward.default,
        (*student, *capped, *teacher, *plain, *batch, *kept, "", *upstream, *needs),
    )
    leaves = [t.clone().requires_grad_(n) for t, n in zip(student, needs, strict=True)]
    torch.library.opcheck(forward, (*leaves, *capped, *teacher, *plain, *batch, 50, "", True))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_against_the_definition_of_the_divergences(beta, tiny_tiles, backend):
    """From softmax and logarithm alone, sharing nothing with the reference: the mean over rows that count."""
    inputs = make_inputs(rows=(2, 6), vocab=17, hidden=(8, 12))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 2] = mask[1, 4:] = False
    p = (inputs["student_hidden"] @ inputs["student_weight"].t()).double().softmax(-1)
    w = (inputs["teacher_hidden"] @ inputs["teacher_weight"].t()).double().softmax(-1)
    expected = (p * (p.log() - w.log()) if beta == 1.0 else w * (w.log() - p.log())).sum(-1)
    stats = cf.linear_token_stats(**inputs, mask=mask, backend=backend)
    got = stats.reverse_kl if beta == 1.0 else stats.forward_kl
    assert torch.allclose(got.sum() / mask.sum(), (expected * mask).sum().float() / mask.sum(), rtol=1e-5)


GOOD = make_inputs(rows=(2, 3), vocab=9, biased=True)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"student_hidden": [1.0]}, TypeError, "student_hidden must be a tensor, got list"),
        ({"teacher_weight": GOOD["teacher_weight"].long()}, TypeError, "teacher_weight must be float32, bfloat16"),
        ({"student_bias": GOOD["student_bias"][:8]}, ValueError, r"student_bias must have shape \[9\], got \[8\]"),
        ({"student_weight": GOOD["student_weight"][:, :3]}, ValueError, "student_weight .* must agree in H, got"),
        ({"student_weight": GOOD["student_weight"][0]}, ValueError, "student_weight .* must agree in H, got"),
        ({"teacher_hidden": GOOD["teacher_hidden"][:1]}, ValueError, "must agree in all but the last axis"),
        ({"teacher_weight": GOOD["teacher_weight"].to("meta")}, ValueError, "teacher_weight is on meta"),
        (
            {"teacher_weight": GOOD["teacher_weight"][:8], "teacher_bias": None},
            ValueError,
            "student is 9 wide and the teacher 8; pass vocab_size=",
        ),
        ({"vocab_size": 10}, ValueError, r"min\(9, 9\) = 9"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int"),
        ({"tokens": GOOD["tokens"].float()}, TypeError, "tokens must be int64"),
        ({"tokens": GOOD["tokens"][0]}, ValueError, r"shape of student_hidden without its last axis, \[2, 3\]"),
        ({"tokens": GOOD["tokens"] + 9}, ValueError, r"tokens\[0, 0\] = .* is outside the vocabulary \[0, 9\)"),
        ({"mask": GOOD["tokens"]}, TypeError, "mask must be bool"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"student_softcap": 0.0}, ValueError, "student_softcap must be positive"),
        ({"teacher_softcap": "high"}, TypeError, "teacher_softcap must be a number"),
        ({"student_scale": 0.0}, ValueError, "student_scale must be finite and not 0"),
        ({"first_column": 3}, ValueError, "first_column=3 has a meaning only with process_group="),
        ({"backend": "opencl"}, ValueError, "backend='opencl' is unknown"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        cf.linear_token_stats(**{**GOOD, **change})

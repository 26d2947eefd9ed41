"""linear_topk_stats: what topk_stats gives of the logits in full, in value and in all three gradients."""

import itertools

import pytest
import torch
from helpers import DTYPES, assert_no_worse, make_logits
from linear_inputs import make_inputs, perturbed
from topk_inputs import DIFFERENTIABLE, assert_bounds, exact, sent, weighted

import cmdp_fast as cf
from cmdp_fast import reference, topk_reference

pytestmark = pytest.mark.tiles

PARTS = ("hidden", "weight", "bias")


def drawn(*rows, vocab=50, k=6, dtype=torch.float32, biased=True):
    """Arguments of `linear_topk_stats` by name."""
    inputs = make_inputs(rows=rows, vocab=vocab, student=dtype, teacher=dtype, biased=biased)
    teacher = inputs["teacher_hidden"].double() @ inputs["teacher_weight"].double().T
    message = sent(teacher, k, torch.promote_types(dtype, torch.float32))
    return {name: t for name, t in inputs.items() if "teacher" not in name} | message._asdict(), teacher


def evaluate(function, inputs, *, cast=None, **options):
    """Statistics and the gradients of hidden states, head and bias."""
    leaves = {f"student_{part}": inputs[f"student_{part}"] for part in PARTS if f"student_{part}" in inputs}
    leaves = {name: t.clone().to(cast or t.dtype).requires_grad_() for name, t in leaves.items()}
    stats = function(**{**inputs, **leaves}, **options)
    return stats, torch.autograd.grad(weighted(stats), list(leaves.values()))


def of_logits(student_hidden, student_weight, student_bias=None, **options):
    """The reference of logits that are made in full, as `reference.linear_token_stats` makes them."""
    logits, options = reference._project(
        "student", student_hidden, student_weight, {**options, "student_bias": student_bias}
    )
    return topk_reference.topk_stats(logits, **options)


def check(inputs, backend, **options):
    """Against float64, measured by what the same formulas lose on logits of the dtype that the library computes in."""
    ours, gradients = evaluate(cf.linear_topk_stats, inputs, backend=backend, **options)
    computed = reference.compute_dtype(inputs["student_hidden"])
    right, right_gradients = evaluate(of_logits, inputs, cast=torch.float64, **options)
    eager, eager_gradients = evaluate(of_logits, inputs, cast=computed, **options)
    for name in ours._fields:
        value = getattr(ours, name)
        assert value.dtype == computed
        # the reference widens the bounds by the rounding of the dtype that it is given
        assert_no_worse(value, getattr(eager, name), getattr(right, name), name, size=30, terms=50)
    for got, near, expected in zip(gradients, eager_gradients, right_gradients, strict=True):
        size = 10 * max(1.0, expected.abs().max().item())
        assert_no_worse(got, near.to(got.dtype), expected, "gradient", size=size, terms=50)
    return ours, gradients


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype, tiles, backend):
    check(drawn(9, dtype=dtype)[0], backend, temperature=0.8)


@pytest.mark.parametrize("k", [1, 50])
def test_one_column_and_all(k, tiny_tiles, backend):
    check(drawn(2, 5, k=k, biased=False)[0], backend)


def test_what_a_head_does(tiny_tiles, backend):
    """Scale, softcap and a common vocabulary that is narrower than the head."""
    inputs, teacher = drawn(6, vocab=60)
    inputs |= {**sent(teacher[:, :50], 6)._asdict(), "tokens": inputs["tokens"] % 50}
    _, gradients = check(inputs, backend, student_scale=0.5, student_softcap=3.0, vocab_size=50, top_k=0)
    assert not gradients[1][50:].any() and not gradients[2][50:].any()
    head = cf.Head(inputs["student_weight"], inputs["student_bias"], 3.0, 0.5)
    rest = {name: t for name, t in inputs.items() if name not in ("student_weight", "student_bias")}
    given = cf.linear_topk_stats(**rest, student_weight=head, vocab_size=50, backend=backend)
    spelt = cf.linear_topk_stats(**inputs, student_scale=0.5, student_softcap=3.0, vocab_size=50, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(given, spelt, strict=True))


@pytest.mark.float64
def test_gradcheck(tiny_tiles, backend):
    inputs, _ = drawn(4, vocab=18, k=3, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True])

    def statistics(hidden, weight, bias):
        changed = {**inputs, "student_hidden": hidden, "student_weight": weight, "student_bias": bias}
        stats = cf.linear_topk_stats(**changed, mask=mask, temperature=0.7, student_scale=0.8, backend=backend)
        return tuple(getattr(stats, name) for name in DIFFERENTIABLE)

    parts = [inputs[f"student_{part}"].requires_grad_() for part in PARTS]
    assert torch.autograd.gradcheck(statistics, parts, atol=1e-6)


@pytest.mark.parametrize("needed", [c for n in range(1, 4) for c in itertools.combinations(range(3), n)])
def test_only_what_needs_a_gradient_gets_one(needed, tiny_tiles, backend):
    inputs, _ = drawn(6)
    _, everything = evaluate(cf.linear_topk_stats, inputs, backend=backend)
    leaves = {f"student_{p}": inputs[f"student_{p}"].clone().requires_grad_(i in needed) for i, p in enumerate(PARTS)}
    weighted(cf.linear_topk_stats(**{**inputs, **leaves}, backend=backend)).backward()
    for i, leaf in enumerate(leaves.values()):
        assert torch.equal(leaf.grad, everything[i]) if i in needed else leaf.grad is None


@pytest.mark.parametrize("counted", ["some", "none"])
def test_masked_rows_are_left_out(counted, tiny_tiles, backend):
    inputs, _ = drawn(2, 6)
    mask = make_logits(2, 6, seed=4) > (0 if counted == "some" else torch.inf)
    rows = {name: t[mask] if t.shape[:2] == (2, 6) else t for name, t in inputs.items()}
    spoilt = perturbed({**inputs, "teacher_hidden": inputs["student_hidden"]}, mask)
    del spoilt["teacher_hidden"]
    ours, gradients = evaluate(cf.linear_topk_stats, spoilt, mask=mask, backend=backend)
    alone = cf.linear_topk_stats(**rows, backend=backend)
    for value, expected in zip(ours, alone, strict=True):
        assert torch.equal(value[mask], expected) and not value[~mask].any()
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][~mask].any()


def test_bounds_hold(backend):
    inputs, teacher = drawn(3, 7, vocab=400, k=20)
    logits = inputs["student_hidden"] @ inputs["student_weight"].T + inputs["student_bias"]
    stats = cf.linear_topk_stats(**inputs, backend=backend)
    assert_bounds(stats, exact(logits, teacher, inputs["tokens"]))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"student_hidden": torch.zeros(2, 3)}, ValueError, r"must agree in H, got \[2, 3\] and \[9, 4\]"),
        ({"student_hidden": torch.zeros(3, 4)}, ValueError, "tokens must have the shape of student_hidden"),
        ({"student_softcap": -1.0}, ValueError, "student_softcap must be positive"),
        ({"student_bias": torch.zeros(8)}, ValueError, r"student_bias must have shape \[9\]"),
        ({"teacher_bias": torch.zeros(9)}, TypeError, "unexpected keyword argument 'teacher_bias'"),
        ({"vocab_size": 10}, ValueError, "vocab_size=10 must be at least 1"),
        ({"topk_ids": torch.zeros(2, 1).long()}, ValueError, r"got \[2, 1\] and \[2, 2\]"),
        ({"tokens": torch.tensor([0, 9])}, ValueError, r"tokens\[1\] = 9 is outside the vocabulary \[0, 9\)"),
        ({"top_k": -3}, ValueError, "top_k must not be negative"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    right = {
        "student_hidden": torch.zeros(2, 4),
        "student_weight": torch.zeros(9, 4),
        "topk_ids": torch.tensor([[0, 1], [1, 2]]),
        "topk_logprobs": torch.full((2, 2), -1.0),
        "tokens": torch.tensor([0, 1]),
    }
    with pytest.raises(error, match=message):
        cf.linear_topk_stats(**(right | change))

"""linear_divergence against logits made in full: values, gradients, tiles, rows that do not count, torch, errors."""

import itertools

import pytest
import torch
from half_products import keep_halves
from helpers import DTYPES, assert_no_worse, make_logits
from linear_inputs import PARTS, make_inputs, perturbed, set_tiles
from test_divergence import KINDS

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.ops import linear_divergence as operation
from cmdp_fast.ops import tile_size
from cmdp_fast.ops.backends import INTERPRETED
from cmdp_fast.ops.divergence import plain_kl

pytestmark = [pytest.mark.tiles, pytest.mark.mixture]

INF, NAN = torch.inf, torch.nan
MIXTURES = [(kind, beta) for kind, beta in KINDS if plain_kl(kind, beta) is None]
OPTIONS = (
    {},
    {"temperature": 0.5},
    {"student_scale": 0.6, "teacher_scale": -1.5},
    {"student_softcap": 3.0, "student_scale": 1.3, "teacher_softcap": 5.0},
)


def inputs_of(**given):
    inputs = make_inputs(**{"rows": (6,), "vocab": 50, "biased": True, **given})
    del inputs["tokens"]
    return inputs


def evaluate(function, inputs, kind="jsd", beta=0.3, *, cast=None, **options):
    """The divergence, and the gradients of the student's parts from random upstream gradients."""
    given = {name: t if cast is None else t.to(cast) for name, t in inputs.items()}
    leaves = {name: given[name].clone().requires_grad_() for name in PARTS if name in given}
    value = function(**{**given, **leaves}, kind=kind, beta=beta, **options)
    upstream = make_logits(*(value.shape or (1,)), scale=1.0)
    gradients = torch.autograd.grad((value.double() * upstream).sum(), list(leaves.values()))
    return value.detach(), dict(zip(leaves, gradients, strict=True))


def check(inputs, backend, kind="jsd", beta=0.3, **options):
    """Ours against float64, measured by eager PyTorch's error in the precision that the library computes in."""
    value, gradients = evaluate(cf.linear_divergence, inputs, kind, beta, backend=backend, **options)
    computed = reference.compute_dtype(*(t for name, t in inputs.items() if "bias" not in name))
    plain = plain_kl(kind, beta) or kind  # the reference's mixture has no ends
    (exact, exact_gradients), (eager, eager_gradients) = (
        evaluate(reference.linear_divergence, inputs, plain, beta, cast=cast, **options)
        for cast in (torch.float64, computed)
    )
    terms = inputs["student_weight"].shape[0]
    assert value.dtype == computed
    assert_no_worse(value, eager, exact, kind, terms=terms)
    # The gradient of a row is a difference from the mean of G, of the size of 1 nat and more where the value is larger.
    arriving = float(make_logits(*(exact.shape or (1,)), scale=1.0).abs().max()) if exact.numel() else 1.0
    flowing = max(1.0, *(3 * exact / options.get("temperature", 1.0)).abs().flatten().tolist()) * arriving
    for name, got in gradients.items():
        other = {"student_hidden": "student_weight", "student_weight": "student_hidden"}.get(name)
        factor = 1.0 if other is None or not inputs[other].numel() else float(inputs[other].abs().max())
        assert got.dtype == inputs[name].dtype and got.shape == inputs[name].shape
        ours, theirs = got, eager_gradients[name].to(got.dtype)
        assert_no_worse(ours, theirs, exact_gradients[name], name, size=flowing * factor, terms=terms)
    return value, gradients


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("vocab", [1, 37, 768, 1700])
def test_values_and_gradients_whatever_the_tiles(vocab, kind, beta, tiles, backend):
    usual = (kind, beta) == ("jsd", 0.5)
    if backend == "triton" and (vocab > 40 * tile_size.COLUMNS or (vocab > 37 and (vocab != 1700 or not usual))):
        pytest.skip("a hundred tiles take the interpreter a minute")
    if INTERPRETED and backend == "triton" and not usual and (vocab == 1 or vocab < tile_size.COLUMNS):
        pytest.skip("interpreted, each kind folds three tiles; one kind has all sizes")
    check(inputs_of(rows=(3, 5), vocab=vocab), backend, kind, beta)


@pytest.mark.parametrize("student, teacher", list(itertools.product(DTYPES, DTYPES)))
def test_every_pair_of_dtypes(student, teacher, tiny_tiles, backend):
    check(inputs_of(student=student, teacher=teacher), backend)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("biased", [True] if INTERPRETED else [False, True])
@pytest.mark.parametrize("kind, beta", MIXTURES)
def test_scale_softcap_and_temperature(kind, beta, biased, options, tiny_tiles, backend):
    check(inputs_of(biased=biased), backend, kind, beta, **options)


@pytest.mark.float64
@pytest.mark.parametrize("kind, beta", KINDS)
def test_gradcheck(kind, beta, tiny_tiles, backend):
    inputs = inputs_of(vocab=18, hidden=(2, 3), student=torch.float64, teacher=torch.float64)
    mask = torch.tensor([True, True, False, True, True, True])

    def divergence(*parts):
        changed = {**inputs, **dict(zip(PARTS, parts, strict=True))}
        options = {"mask": mask, "temperature": 0.7, "student_scale": 0.8, "student_softcap": 4.0, "vocab_size": 17}
        return cf.linear_divergence(**changed, kind=kind, beta=beta, backend=backend, **options)

    assert torch.autograd.gradcheck(divergence, [inputs[name].requires_grad_() for name in PARTS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_small_tiles_are_one_large_one(dtype, backend, monkeypatch):
    """The rows of the forward pass and the tiles of the backward pass, down to a row of a few columns."""
    inputs, outcomes = inputs_of(rows=(9,), vocab=70, student=dtype, teacher=dtype), []
    rows = []
    whole = operation.Tiles.whole_rows
    monkeypatch.setattr(operation.Tiles, "whole_rows", lambda tiles: rows.append(whole(tiles)) or rows[-1])
    for pair_bytes in (None, 1, 70 * 8 * 2, 70 * 8 * 4):
        if pair_bytes is not None:
            set_tiles(monkeypatch, 4, 16)
            monkeypatch.setenv("CMDP_FAST_TILE_BYTES", str(pair_bytes))
        outcomes.append(evaluate(cf.linear_divergence, inputs, backend=backend))
    assert [len(slices) for slices in rows] == [1, 9, 5, 3]
    (value, gradients), *others = outcomes
    for other, other_gradients in others:
        assert torch.allclose(other, value, rtol=2e-6, atol=1e-6)
        for name, gradient in gradients.items():
            tolerance = 1e-5 if dtype == torch.float32 else 2**-7
            assert torch.allclose(other_gradients[name], gradient, rtol=tolerance, atol=tolerance), name


def test_memory_does_not_grow_with_the_logits(backend, monkeypatch):
    """Nothing of rows x V is kept for the backward pass: 8 numbers a row beside the inputs."""
    inputs, shapes = inputs_of(rows=(6,), vocab=64), []
    inputs["student_hidden"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        cf.linear_divergence(**inputs, backend=backend)
    assert sorted(shapes) == sorted([*(tuple(t.shape) for t in inputs.values()), (6, 7), (6,)])


@pytest.mark.parametrize("kind, beta", [("jsd", 0.3), ("jsd", 0.0), ("skew_reverse_kl", 0.1)])
def test_it_is_the_divergence_of_the_logits(kind, beta, backend):
    inputs = inputs_of()
    student, teacher = (
        cf.Head(*(inputs[f"{model}_{part}"] for part in ("weight", "bias"))) for model in ("student", "teacher")
    )
    logits = student.logits(inputs["student_hidden"]), teacher.logits(inputs["teacher_hidden"])
    expected = cf.divergence(*logits, kind, beta=beta, backend=backend)
    value = cf.linear_divergence(
        inputs["student_hidden"], student, inputs["teacher_hidden"], teacher, kind, beta=beta, backend=backend
    )
    assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_a_kl_equals_the_statistic(backend):
    inputs = inputs_of()
    stats = cf.linear_token_stats(**inputs, tokens=torch.zeros(6, dtype=torch.long), backend=backend)
    for kind, beta, expected in (
        ("reverse_kl", 0.5, stats.reverse_kl),
        ("jsd", 1, stats.reverse_kl),
        ("skew_reverse_kl", 0, stats.reverse_kl),
        ("forward_kl", 0.5, stats.forward_kl),
        ("jsd", 0, stats.forward_kl),
    ):
        assert torch.equal(cf.linear_divergence(**inputs, kind=kind, beta=beta, backend=backend), expected)


@pytest.mark.parametrize("widths", [(50, 40), (40, 50), (50, 50)])
def test_a_common_prefix_of_the_vocabulary(widths, tiny_tiles, backend):
    inputs = inputs_of()
    for model, width in zip(("student", "teacher"), widths, strict=True):
        for part in ("weight", "bias"):
            inputs[f"{model}_{part}"] = inputs[f"{model}_{part}"][:width]
    _, gradients = check(inputs, backend, vocab_size=37)
    assert not gradients["student_weight"][37:].any() and not gradients["student_bias"][37:].any()


# --------------------------------------------------------------------------------------------------------------
# Rows and columns that do not count


@pytest.mark.parametrize("kind, beta", [("jsd", 0.3), ("reverse_kl", 0.5)])
def test_a_masked_row_is_not_read_and_gets_no_gradient(kind, beta, tiny_tiles, backend):
    inputs = inputs_of(rows=(3, 4))
    mask = make_logits(3, 4, scale=1.0, seed=2) > -0.3
    value, gradients = evaluate(cf.linear_divergence, inputs, kind, beta, mask=mask, backend=backend)
    spoilt = perturbed({**inputs, "tokens": torch.zeros(3, 4, dtype=torch.long)}, mask)
    del spoilt["tokens"]
    again, gradients_again = evaluate(cf.linear_divergence, spoilt, kind, beta, mask=mask, backend=backend)
    assert torch.equal(value, again) and not value[~mask].any() and (value[mask] > 0).all()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    per_row = gradients["student_hidden"].abs().sum(-1)
    assert (per_row[mask] > 0).all() and not per_row[~mask].any()
    check(inputs, backend, kind, beta, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, counted", [((2, 3), False), ((0,), True), ((3, 0), True), ((), True), ((), False)])
def test_no_rows_and_one(rows, counted, dtype, backend):
    """Memory is poisoned: what nothing is added to must be 0 all the same."""
    inputs = inputs_of(rows=rows, student=dtype, teacher=dtype)
    mask = torch.full(rows, counted)
    value, gradients = evaluate(cf.linear_divergence, inputs, mask=mask, backend=backend)
    assert value.shape == torch.Size(rows)
    assert all(g.shape == inputs[name].shape for name, g in gradients.items())
    empty = not mask.any()
    assert value.any() != (empty or not value.numel())
    assert all(bool(g.any()) != empty for g in gradients.values())


def test_columns_that_a_model_may_not_use(tiny_tiles, backend):
    """A bias of -inf: on both sides it is as if the column were not there, on one side the value is finite still."""
    inputs = inputs_of()
    gone = torch.tensor([0, 15, 16, 49])
    kept = torch.tensor([c for c in range(50) if c not in gone.tolist()])
    for model in ("student", "teacher"):
        inputs[f"{model}_bias"][gone] = -INF
    smaller = dict(inputs)
    for model, part in itertools.product(("student", "teacher"), ("weight", "bias")):
        smaller[f"{model}_{part}"] = inputs[f"{model}_{part}"][kept]
    value, gradients = evaluate(cf.linear_divergence, inputs, backend=backend)
    expected, expected_gradients = evaluate(cf.linear_divergence, smaller, backend=backend)
    assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradients["student_hidden"], expected_gradients["student_hidden"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradients["student_weight"][kept], expected_gradients["student_weight"], rtol=1e-4, atol=1e-5)
    assert not gradients["student_weight"][gone].any() and not gradients["student_bias"][gone].any()
    inputs["teacher_bias"][gone] = 0.0
    assert all(t.isfinite().all() for t in check(inputs, backend)[1].values())
    inputs["student_bias"][:], inputs["teacher_bias"][:] = 0.0, 0.0
    inputs["student_bias"][:25], inputs["teacher_bias"][25:] = -INF, -INF
    disjoint = cf.linear_divergence(**inputs, backend=backend)
    assert torch.allclose(disjoint, torch.tensor(2.0).log(), rtol=1e-6)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_nan_stays_in_its_row(model, value, tiny_tiles, backend):
    inputs = inputs_of()
    clean, gradients = evaluate(cf.linear_divergence, inputs, backend=backend)
    inputs[f"{model}_hidden"][4, 2] = value
    got, bad = evaluate(cf.linear_divergence, inputs, backend=backend)
    others = torch.arange(6) != 4
    assert got[4].isnan() and torch.equal(got[others], clean[others])
    assert bad["student_hidden"][4].isnan().all()
    assert torch.allclose(bad["student_hidden"][others], gradients["student_hidden"][others])
    assert bad["student_weight"].isnan().all()


def test_any_strides(tiny_tiles, backend):
    inputs = inputs_of(rows=(4, 6))
    strided = dict(inputs)
    strided["student_hidden"] = inputs["student_hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["student_weight"] = inputs["student_weight"].t().contiguous().t()
    strided["teacher_weight"] = inputs["teacher_weight"].repeat(1, 2)[:, : inputs["teacher_weight"].shape[1]]
    value, gradients = evaluate(cf.linear_divergence, inputs, backend=backend)
    other, others = evaluate(cf.linear_divergence, strided, backend=backend)
    assert torch.allclose(other, value, rtol=2e-6, atol=2e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(others[name], gradient, rtol=1e-5, atol=1e-5), name


# --------------------------------------------------------------------------------------------------------------
# What torch expects


@pytest.mark.parametrize("needed", [c for n in range(1, 4) for c in itertools.combinations(range(3), n)])
def test_only_what_needs_a_gradient_gets_one(needed, tiny_tiles, backend):
    inputs = inputs_of()
    leaves = {name: inputs[name].clone().requires_grad_(i in needed) for i, name in enumerate(PARTS)}
    inputs = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    _, everything = evaluate(cf.linear_divergence, inputs, backend=backend)
    upstream = make_logits(6, scale=1.0)
    (cf.linear_divergence(**{**inputs, **leaves}, beta=0.3, backend=backend).double() * upstream).sum().backward()
    for i, name in enumerate(PARTS):
        assert torch.equal(leaves[name].grad, everything[name]) if i in needed else leaves[name].grad is None
    assert all(inputs[f"teacher_{part}"].grad is None for part in ("hidden", "weight", "bias"))


def test_a_second_backward_pass_gives_the_same_and_there_is_no_second_derivative(backend):
    inputs = inputs_of()
    hidden = inputs["student_hidden"].requires_grad_()
    loss = cf.linear_divergence(**inputs, backend=backend).sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden, retain_graph=True)[0], first)
    gradient = torch.autograd.grad(loss, hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_equal_results(dynamic, backend):
    def loss(inputs):
        value = cf.linear_divergence(**inputs, beta=0.3, student_softcap=5.0, teacher_scale=0.5, backend=backend)
        return value, (value * torch.arange(1.0, 7, device=value.device)).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for vocab in (50, 70):
        inputs = inputs_of(vocab=vocab)
        leaves = [inputs[name].requires_grad_() for name in PARTS]
        (plain, total), (value, compiled_total) = loss(inputs), compiled(inputs)
        assert torch.equal(plain, value) and plain.stride() == value.stride()
        for a, b in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(compiled_total, leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("autocast", ["", "bfloat16"])
def test_opcheck(needs, autocast, backend):
    inputs = inputs_of(rows=(2, 3))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    student, teacher = (
        [inputs[f"{model}_{part}"] for part in ("hidden", "weight", "bias")] for model in ("student", "teacher")
    )
    others = (5.0, 0.8, *teacher, None, 1.0, mask, 50, autocast, 0.7, 0.3, 0.3, 0.7, backend)
    forward = torch.ops.cmdp_fast.linear_divergence.default
    _, saved, mean = forward(*student, *others)
    torch.library.opcheck(
        torch.ops.cmdp_fast.linear_divergence_backward.default,
        (*student, *others, saved, mean, torch.rand(2, 3), *needs),
    )
    leaves = [t.clone().requires_grad_(n) for t, n in zip(student, needs, strict=True)]
    torch.library.opcheck(forward, (*leaves, *others))


# --------------------------------------------------------------------------------------------------------------
# What a GPU does with half-precision factors, on CPU tensors that are treated as a GPU's


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind, beta", [("jsd", 0.3), ("skew_forward_kl", 0.1)])
def test_half_precision_is_multiplied_as_it_is(kind, beta, options, tiny_tiles, backend, monkeypatch):
    if backend == "cpu":
        pytest.skip("the native kernels never see factors in half precision")
    keep_halves(monkeypatch)
    inputs = inputs_of(student=torch.bfloat16, teacher=torch.bfloat16)
    _, gradients = check(inputs, backend, kind, beta, **options)
    _, exact = evaluate(reference.linear_divergence, inputs, kind, beta, cast=torch.float64, **options)
    for name, gradient in gradients.items():  # a factor that is missing or counted twice
        assert (gradient.double() - exact[name]).norm() < 2**-6 * exact[name].norm(), name


# --------------------------------------------------------------------------------------------------------------
# Errors


GOOD = make_inputs(rows=(2, 3), vocab=9, biased=True)
del GOOD["tokens"]


@pytest.mark.parametrize("kind", ["jsd", "reverse_kl"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"student_hidden": [1.0]}, TypeError, "student_hidden must be a tensor, got list"),
        ({"teacher_weight": GOOD["teacher_weight"].long()}, TypeError, "teacher_weight must be float32, bfloat16"),
        ({"student_bias": GOOD["student_bias"][:8]}, ValueError, r"student_bias must have shape \[9\], got \[8\]"),
        ({"student_weight": GOOD["student_weight"][:, :3]}, ValueError, "student_weight .* must agree in H, got"),
        ({"teacher_hidden": GOOD["teacher_hidden"][:1]}, ValueError, "must agree in all but the last axis"),
        ({"teacher_weight": GOOD["teacher_weight"].to("meta")}, ValueError, "teacher_weight is on meta"),
        (
            {"teacher_weight": GOOD["teacher_weight"][:8], "teacher_bias": None},
            ValueError,
            "student is 9 wide and the teacher 8; pass vocab_size=",
        ),
        ({"vocab_size": 10}, ValueError, r"min\(9, 9\) = 9"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool"),
        (
            {"mask": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"shape of student_hidden without its last axis, \[2, 3\], got \[3\]",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"student_softcap": 0.0}, ValueError, "student_softcap must be positive"),
        ({"student_scale": 0.0}, ValueError, "student_scale must be finite and not 0"),
        ({"beta": 1.5}, ValueError, r"beta must lie in \[0, 1\], got 1.5"),
        ({"kind": "kl"}, ValueError, "kind='kl' is unknown; expected one of reverse_kl"),
        ({"kind": "skew_forward_kl", "beta": 1}, ValueError, "beta must be below 1"),
        ({"backend": "opencl"}, ValueError, "backend='opencl' is unknown"),
        ({"process_group": 1}, TypeError, "unexpected keyword argument 'process_group'; linear_token_stats has"),
        ({"saved": "tiles"}, TypeError, r"linear_divergence\(\) got an unexpected keyword argument 'saved'$"),
        ({"student_weight": cf.Head(GOOD["student_weight"])}, TypeError, "student_bias must not be given as well"),
    ],
)
def test_errors(change, error, message, kind, monkeypatch):
    for module in (operation, cf.ops.linear):
        monkeypatch.setattr(module, "Tiles", None)  # nothing is computed
    with pytest.raises(error, match=message):
        cf.linear_divergence(**{**GOOD, "kind": kind, **change})

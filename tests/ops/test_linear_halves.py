"""What a GPU does with half-precision factors, on CPU tensors that are treated as a GPU's: which tensor has which
dtype, which memory is used again, and that nothing is worse than eager PyTorch in the same precision."""

import itertools
import warnings

import pytest
import torch
from half_products import OFFERED, eager, keep_halves
from helpers import DIFFERENTIABLE, assert_no_worse, make_logits, make_tokens
from linear_inputs import check, evaluate, gradient_size, make_inputs, perturbed

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.ops import gemm
from cmdp_fast.ops.backends import INTERPRETED
from cmdp_fast.ops.head_gradient import HeadGradient

pytestmark = [pytest.mark.tiles, pytest.mark.usefixtures("tiny_tiles")]
HALVES = (torch.bfloat16, torch.float16)
SAVED = ("recompute", "teacher", "tiles", "auto")
OPTIONS = (
    {},
    {"temperature": 0.5, "student_scale": 0.6, "teacher_scale": -1.5},
    {"student_softcap": 3.0, "student_scale": 1.3},
    {"teacher_softcap": 3.0},
)


@pytest.fixture
def backend(backend):
    if backend == "cpu":
        pytest.skip("the native kernels never see factors in half precision")
    return backend


@pytest.fixture(params=["mm"] if INTERPRETED else OFFERED)  # no kernel knows how PyTorch multiplies
def offered(request, monkeypatch):
    keep_halves(monkeypatch, OFFERED[request.param])
    return OFFERED[request.param]


@pytest.fixture
def halves(monkeypatch):
    keep_halves(monkeypatch)


def no_worse_than_eager(
    inputs, backend, *, autocast=None, rounded=torch.bfloat16, present=DIFFERENTIABLE, saved="recompute", **options
):
    """The error criterion at the dtype of the factors, to which some logits, and those of the gradient, are rounded."""
    with torch.autocast(here(), dtype=autocast or rounded, enabled=autocast is not None):
        ours, gradients = evaluate(
            cf.linear_token_stats, inputs, present=present, saved=saved, backend=backend, **options
        )
    exact, exact_gradients = evaluate(
        reference.linear_token_stats, inputs, present=present, cast=torch.float64, **options
    )
    theirs, their_gradients = evaluate(eager(autocast), inputs, present=present, **options)
    size = gradient_size(inputs, exact, present, options)
    for name, got in ours._asdict().items():
        assert got.dtype == torch.float32
        assert_no_worse(got.to(rounded), getattr(theirs, name), getattr(exact, name), name)
    for name, got in gradients.items():
        assert got.dtype == inputs[name].dtype and got.shape == inputs[name].shape
        assert_no_worse(got.to(rounded), their_gradients[name], exact_gradients[name], name, size=size[name])
    return ours, gradients


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_no_worse_than_eager(biased, options, saved, offered, backend):
    inputs = make_inputs(rows=(2, 5), vocab=50, student=torch.bfloat16, teacher=torch.bfloat16, biased=biased)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    _, gradients = no_worse_than_eager(inputs, backend, saved=saved, mask=mask, **options)
    assert not gradients["student_hidden"][~mask].any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_that_are_made_again_are_as_exact_as_in_float32(dtype, options, halves, backend):
    """The product of half-precision numbers is exact in float32, so a GPU loses nothing by not widening them; only the
    gradient of the logits is rounded, once, which the criterion counts at the gradient's dtype."""
    check(make_inputs(rows=(6,), vocab=50, student=dtype, teacher=dtype, biased=True), backend, **options)


@pytest.mark.parametrize("present", [("logprob",), ("entropy", "logprob"), ("reverse_kl",), ("forward_kl",)])
@pytest.mark.parametrize("saved", SAVED)
def test_any_upstream_gradient(saved, present, halves, backend):
    inputs = make_inputs(rows=(6,), vocab=50, student=torch.bfloat16, teacher=torch.bfloat16, biased=True)
    no_worse_than_eager(inputs, backend, present=present, saved=saved)


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("student, teacher", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_models_of_different_dtypes(student, teacher, saved, halves, backend):
    inputs = make_inputs(rows=(6,), vocab=50, student=student, teacher=teacher, biased=True)
    half = torch.bfloat16 if torch.bfloat16 in (student, teacher) else torch.float16
    no_worse_than_eager(inputs, backend, saved=saved, rounded=half, student_scale=0.7)


@pytest.mark.parametrize("saved", SAVED)
def test_a_common_prefix_and_no_rows(saved, halves, backend):
    inputs = make_inputs(rows=(6,), vocab=50, student=torch.bfloat16, teacher=torch.bfloat16, biased=True)
    inputs["tokens"] = make_tokens(6, vocab=37)
    stats, gradients = evaluate(cf.linear_token_stats, inputs, saved=saved, vocab_size=37, backend=backend)
    assert not gradients["student_weight"][37:].any() and gradients["student_weight"][:37].any()
    none = torch.zeros(6, dtype=torch.bool)
    stats, gradients = evaluate(cf.linear_token_stats, inputs, saved=saved, mask=none, backend=backend)
    assert not any(t.any() for t in (*stats, *gradients.values()))


@pytest.mark.parametrize("saved", SAVED)
def test_a_masked_row_is_not_read(saved, halves, backend):
    inputs = make_inputs(rows=(3, 4), vocab=50, student=torch.bfloat16, teacher=torch.bfloat16, biased=True)
    mask = make_logits(3, 4, scale=1.0, seed=2) > -0.3
    outcomes = [
        evaluate(cf.linear_token_stats, given, mask=mask, saved=saved, backend=backend)
        for given in (inputs, perturbed(inputs, mask))
    ]
    (stats, gradients), (again, gradients_again) = outcomes
    assert all(torch.equal(a, b) for a, b in zip(stats, again, strict=True))
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_is_written_in_the_dtype_of_the_products(options, halves, backend, monkeypatch):
    """Its tile is cast nowhere: what the two products read is what the kernel wrote, but for a softcap's chain."""
    backward, written, read = cf.ops.backends.get(backend).token_stats_backward, [], []
    accumulate = gemm.accumulate

    def spy(pair, saved, upstream, out, first_column=0):
        written.append(out)
        assert pair.student.dtype == torch.float32
        backward(pair, saved, upstream, out, first_column)

    def watched(total, a, b, workspace, *, fresh=False):
        read.append(a)
        accumulate(total, a, b, workspace, fresh=fresh)

    monkeypatch.setattr(cf.ops.backends.get(backend), "token_stats_backward", spy)
    monkeypatch.setattr(gemm, "accumulate", watched)
    inputs = make_inputs(rows=(6,), vocab=50, student=torch.bfloat16, teacher=torch.bfloat16)
    evaluate(cf.linear_token_stats, inputs, backend=backend, **options)
    assert len(read) == 2 * len(written) > 8 and {t.dtype for t in read} == {torch.bfloat16}
    capped = "student_softcap" in options
    assert {t.dtype for t in written} == {torch.float32 if capped else torch.bfloat16}
    assert capped or {t.data_ptr() for t in read} == {t.data_ptr() for t in written}
    assert len({t.data_ptr() for t in read}) == 1  # the same memory for every tile


@pytest.mark.parametrize("saved", ["teacher", "tiles"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_kept_is_not_written_over(options, saved, halves, backend):
    inputs = make_inputs(rows=(6,), vocab=50, student=torch.bfloat16, teacher=torch.bfloat16, biased=True)
    hidden = inputs["student_hidden"].requires_grad_()
    stats = cf.linear_token_stats(**inputs, saved=saved, backend=backend, **options)
    loss = stats.reverse_kl.sum() + stats.entropy.sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)


def test_the_teacher_is_kept_in_the_dtype_of_its_factors(halves, backend):
    """Both passes read the rounded logits: the gradient is that of the statistics that were returned."""
    inputs = make_inputs(rows=(6,), vocab=50, student=torch.bfloat16, teacher=torch.bfloat16)
    kept = []
    inputs["student_hidden"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stats = cf.linear_token_stats(**inputs, saved="teacher", backend=backend)
    (logits,) = (t for t in kept if t.shape == (6, 64))  # whole lines of 128 bytes
    y = inputs["teacher_hidden"].double() @ inputs["teacher_weight"].double().t()
    x = inputs["student_hidden"].double() @ inputs["student_weight"].double().t()
    assert logits.dtype == torch.bfloat16 and torch.allclose(logits[:, :50].double(), y, rtol=2**-8, atol=1e-3)
    rounded = reference.token_stats(x, logits[:, :50].double(), inputs["tokens"])
    exact = torch.autograd.grad(rounded.reverse_kl.sum(), inputs["student_hidden"])[0]
    assert torch.allclose(stats.reverse_kl.double(), rounded.reverse_kl, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(stats.reverse_kl.sum(), inputs["student_hidden"])[0]
    assert torch.allclose(ours.double(), exact.double(), rtol=0.02, atol=0.02 * float(exact.abs().max()))


# --------------------------------------------------------------------------------------------------------------
# Autocast


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_its_dtype(hidden, saved, offered, backend):
    """Float32 heads, as a trainer with float32 weights has them: their gradient is summed in float32."""
    inputs = make_inputs(rows=(6,), vocab=50, biased=True)
    for model in ("student", "teacher"):
        inputs[f"{model}_hidden"] = inputs[f"{model}_hidden"].to(hidden)
    factors, multiply = [], gemm.multiply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "multiply", lambda a, b, out: factors.append((a.dtype, b.dtype)) or multiply(a, b, out))
        no_worse_than_eager(inputs, backend, autocast=torch.bfloat16, saved=saved)
    assert set(factors) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize(
    "options", [{}, {"student_scale": 0.7}, {"student_softcap": 3.0, "student_scale": 0.7}], ids=str
)
def test_the_gradient_of_the_logits_is_rounded_once(options, halves, backend, monkeypatch):
    """Each element to the nearest number of the factors' dtype, a scale or softcap included. The products of what was
    rounded are as exact as in float32."""
    inputs = make_inputs(rows=(6,), vocab=50)
    add, tiles = HeadGradient.add, []

    def watched(self, gradient, rows, columns):
        tiles.append((rows, columns, gradient.clone()))
        add(self, gradient, rows, columns)

    monkeypatch.setattr(HeadGradient, "add", watched)
    with torch.autocast(here(), dtype=torch.bfloat16):
        _, gradients = evaluate(cf.linear_token_stats, inputs, backend=backend, **options)
    rounded = torch.zeros(6, 50, dtype=torch.float64)
    for rows, columns, tile in tiles:
        assert tile.dtype == torch.bfloat16
        rounded[rows, columns] = tile.double()

    half = {name: t.bfloat16().double() if t.is_floating_point() else t for name, t in inputs.items()}
    product, y = (half[f"{model}_hidden"] @ half[f"{model}_weight"].t() for model in ("student", "teacher"))

    def stats(student_hidden):
        head = cf.Head(torch.eye(50, dtype=torch.float64), None, options.get("student_softcap"), *scales)
        return reference.token_stats(head.logits(student_hidden), y, inputs["tokens"])

    scales = [options["student_scale"]] if options else []
    exact = evaluate(stats, {"student_hidden": product})[1]["student_hidden"]
    units = 1.01 if INTERPRETED and backend == "triton" else 0.505  # Triton's interpreter cuts off what bfloat16 lacks
    unit = 2.0 ** (exact.abs().log2().floor() - 7)
    assert ((rounded - exact).abs() <= units * unit + 1e-6).all()
    for name, a, b in (
        ("student_hidden", rounded, half["student_weight"]),
        ("student_weight", rounded.t(), half["student_hidden"]),
    ):
        assert_no_worse(gradients[name], a.float() @ b.float(), a @ b, name)


def test_the_backward_pass_follows_the_forward_pass_and_not_what_is_on_then(halves, backend):
    inputs = make_inputs(rows=(6,), vocab=50)
    hidden = inputs["student_hidden"].requires_grad_()
    gradients = []
    for outside in (False, True):
        with torch.autocast(here(), dtype=torch.bfloat16):
            stats = cf.linear_token_stats(**inputs, backend=backend)
        with torch.autocast(here(), dtype=torch.float16, enabled=outside):
            gradients.append(torch.autograd.grad(stats.reverse_kl.sum(), hidden)[0])
    assert torch.equal(*gradients)


@pytest.mark.float64
def test_float64_is_not_cast(halves, backend):
    inputs = make_inputs(rows=(6,), vocab=50, student=torch.float64)
    plain, gradients = evaluate(cf.linear_token_stats, inputs, backend=backend)
    with torch.autocast(here(), dtype=torch.bfloat16):
        stats, others = evaluate(cf.linear_token_stats, inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, stats, strict=True))
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def here():
    return torch.get_default_device().type


# --------------------------------------------------------------------------------------------------------------
# Under torch.compile, and as operators


@pytest.mark.parametrize(
    "autocast, saved", [(False, "tiles"), (True, "teacher")] if INTERPRETED else itertools.product([False, True], SAVED)
)
def test_compile_gives_equal_results(autocast, saved, halves, backend):
    device = here()

    def loss(inputs):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            stats = cf.linear_token_stats(**inputs, student_scale=0.5, saved=saved, backend=backend)
        return stats, stats.reverse_kl.sum() + stats.logprob.sum()

    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = make_inputs(rows=(6,), vocab=50, student=dtype, teacher=dtype, biased=True)
    leaves = [inputs[f"student_{part}"].requires_grad_() for part in ("hidden", "weight", "bias")]
    torch._dynamo.reset()  # a graph of another test knows nothing of what this one patches
    (plain, total), (stats, compiled_total) = loss(inputs), torch.compile(loss, fullgraph=True)(inputs)
    for a, b in zip(plain, stats, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    for a, b in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(compiled_total, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "autocast, saved",
    # An operator's fake is the same for every backend
    [("", "tiles"), ("bfloat16", "teacher")]
    if INTERPRETED
    else itertools.product(["", "bfloat16"], ("recompute", "teacher", "tiles")),
)
def test_opcheck(autocast, saved, halves, backend):
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = make_inputs(rows=(2, 3), vocab=50, student=dtype, teacher=dtype, biased=True)
    names = ("hidden", "weight", "bias")
    student, teacher = ([inputs[f"{model}_{part}"] for part in names] for model in ("student", "teacher"))
    batch = (inputs["tokens"], None, 0.7, 50, 0, autocast, saved, backend)
    forward = torch.ops.cmdp_fast.linear_token_stats.default
    leaves = [t.clone().requires_grad_() for t in student]
    kept = forward(*student, 5.0, 0.8, *teacher, None, 1.0, *batch, 50, "", True)[6:]
    upstream = (torch.rand(2, 3), None, torch.rand(2, 3), None)
    torch.library.opcheck(
        torch.ops.cmdp_fast.linear_token_stats_backward.default,
        (*student, 5.0, 0.8, *teacher, None, 1.0, *batch, *kept, "", *upstream, True, True, True),
    )
    torch.library.opcheck(forward, (*leaves, 5.0, 0.8, *teacher, None, 1.0, *batch, 50, "", True))


# --------------------------------------------------------------------------------------------------------------
# The probe


def test_the_probe_tries_each_product_on_its_own(monkeypatch):
    """On the device that is asked for, once; what PyTorch refuses in whatever way is missing."""
    cpu, tried = torch.device("cpu"), []

    def product(name, error):
        def function(a, b, out):
            tried.append((name, a.dtype, a.device.type, out.dtype))
            if error is not None:
                raise error

        return function

    cases = (
        (None, None, (True, True)),
        (None, RuntimeError("self and mat2 must have the same dtype"), (True, False)),
        (TypeError("got an unexpected keyword argument 'out_dtype'"), None, (False, False)),
        (NotImplementedError("Could not run 'aten::mm.dtype_out'"), None, (False, False)),
    )
    for write, add, expected in cases:
        gemm.offered.cache_clear()
        monkeypatch.setattr(gemm, "write_wide", product("write", write))
        monkeypatch.setattr(gemm, "add_wide", product("add", add))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = [gemm.offered(cpu, torch.bfloat16) for _ in range(2)]
        assert found == [expected, expected]
        assert ["no float32 product of bfloat16 factors on cpu" in str(w.message) for w in said] == [True] * (
            not found[0][0]
        )
    assert len(tried) == 2 + 2 + 1 + 1 and set(t[1:] for t in tried) == {(torch.bfloat16, "cpu", torch.float32)}
    monkeypatch.setattr(gemm, "add_wide", product("add", None))
    full = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in (torch.OutOfMemoryError("out of memory"), full):  # neither is an answer, and neither is remembered
        monkeypatch.setattr(gemm, "write_wide", product("write", error))
        gemm.offered.cache_clear()
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            gemm.offered(cpu, torch.bfloat16)
        monkeypatch.setattr(gemm, "write_wide", product("write", None))
        assert gemm.offered(cpu, torch.bfloat16) == (True, True)
    gemm.offered.cache_clear()


def test_pytorch_takes_the_arguments_of_both_products():
    """Whatever it then says of a CPU: an argument that it did not know would be a TypeError."""
    half, total = torch.zeros(16, 16, dtype=torch.bfloat16), torch.zeros(16, 16)
    for product in (gemm.write_wide, gemm.add_wide):
        try:
            product(half, half, total)
        except (NotImplementedError, RuntimeError) as error:
            assert "dtype" in str(error)

"""linear_token_stats against logits made in full, whatever the tiles, and what TRL asks of its own kernel."""

import itertools

import pytest
import torch
from helpers import DIFFERENTIABLE, DTYPES, assert_no_worse, here, make_logits, make_tokens, weighted_sum
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import check, evaluate, make_inputs, perturbed

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.cpu import native
from cmdp_fast.ops import tile_size

pytestmark = pytest.mark.tiles

needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")
INF, NAN = torch.inf, torch.nan


@pytest.fixture(params=[(4, 16), (7, 768), (1024, 768)], ids=["tiny tiles", "few rows", "usual tiles"])
def tiles(request, monkeypatch):
    """Rows a tile and the unit of its columns; the area is as small as it gets."""
    monkeypatch.setattr(tile_size, "ROWS", request.param[0])
    monkeypatch.setattr(tile_size, "COLUMNS", request.param[1])
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", "1")


@pytest.fixture
def tiny_tiles(monkeypatch):
    monkeypatch.setattr(tile_size, "ROWS", 4)
    monkeypatch.setattr(tile_size, "COLUMNS", 16)
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", "1")


@pytest.mark.parametrize("vocab", [1, 16, 37, 768, 1700])
def test_values_and_gradients_whatever_the_tiles(vocab, tiles, backend):
    if backend == "triton" and vocab > 40 * tile_size.COLUMNS:
        pytest.skip("a hundred tiles take the interpreter a minute")
    check(make_inputs(rows=(3, 5), vocab=vocab, biased=True), backend)


@pytest.mark.parametrize("student, teacher", list(itertools.product(DTYPES, DTYPES)))
def test_every_pair_of_dtypes(student, teacher, tiny_tiles, backend):
    check(make_inputs(rows=(6,), vocab=50, student=student, teacher=teacher, biased=True), backend)


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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_any_tiles(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    rows, vocab = draw(0, 9), draw(1, 40)
    inputs = make_inputs(
        rows=(rows,), vocab=vocab, hidden=(draw(1, 9), draw(1, 9)), student=torch.float64, teacher=torch.float64
    )
    mask = torch.tensor([data.draw(st.booleans()) for _ in range(rows)], dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_size, "ROWS", draw(1, 5))
        patch.setattr(tile_size, "COLUMNS", draw(1, 11))
        patch.setenv("CMDP_FAST_TILE_BYTES", str(draw(1, 1000)))
        check(inputs, None, mask=mask, vocab_size=draw(int(inputs["tokens"].max()) + 1 if rows else 1, vocab))


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


@pytest.mark.parametrize("options", [{}, {"student_softcap": 3.0, "teacher_scale": 0.5, "temperature": 0.7}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_the_logits_changes_nothing(dtype, options, tiny_tiles, backend):
    """Nor does a second backward pass: what is kept is not written over."""
    inputs = make_inputs(rows=(6,), vocab=50, student=dtype, teacher=dtype, biased=True)
    mask = torch.tensor([True, True, False, True, True, True])
    leaves = {name: inputs[name].requires_grad_() for name in ("student_hidden", "student_weight", "student_bias")}
    outcomes = []
    for saved in ("recompute", "tiles"):
        stats = cf.linear_token_stats(**inputs, mask=mask, saved=saved, backend=backend, **options)
        loss = (stats.logprob + stats.entropy + stats.reverse_kl + stats.forward_kl).sum()
        first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        again = torch.autograd.grad(loss, list(leaves.values()))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        outcomes.append((*stats, *first))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_without_gradients_nothing_is_saved(backend):
    inputs = make_inputs(rows=(6,), vocab=50)
    assert not cf.linear_token_stats(**inputs, backend=backend).logprob.requires_grad
    with torch.no_grad():
        assert not cf.linear_token_stats(**inputs, saved="tiles", backend=backend).logprob.requires_grad
    inputs["student_hidden"].requires_grad_()
    with torch.no_grad():
        assert not cf.linear_token_stats(**inputs, backend=backend).logprob.requires_grad
    with torch.no_grad():
        assert not cf.linear_token_stats(**inputs, saved="tiles", backend=backend).logprob.requires_grad


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


# --------------------------------------------------------------------------------------------------------------
# Rows that do not count, special values


def test_a_masked_row_is_not_read_and_gets_no_gradient(tiny_tiles, backend):
    inputs = make_inputs(rows=(3, 4), vocab=50, biased=True)
    mask = here(torch.rand(3, 4, generator=torch.Generator().manual_seed(2), device="cpu")) > 0.4
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


# --------------------------------------------------------------------------------------------------------------
# Layouts, sizes, torch


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


def allocated(call) -> int:
    """The most memory in bytes that `call` holds at once beyond what stood before, as PyTorch's allocator counts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    total = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    del kept
    return most


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_rows_times_vocabulary(dtype, monkeypatch):
    vocab, hidden, tile = 6000, 8, 2**18
    monkeypatch.setattr(tile_size, "ROWS", 32)
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", str(tile))
    for rows in (32, 512):
        inputs = make_inputs(rows=(rows,), vocab=vocab, hidden=(hidden, hidden), student=dtype, teacher=dtype)
        head = vocab * hidden * dtype.itemsize
        pieces = 3 * 1024 * hidden * 4  # of both heads and of the head's gradient, in float32
        per_row = rows * (6 * 8 + 3 * 13 * 8 + 8 * 8 * hidden + 400)
        for call, extra in (
            (lambda inputs=inputs: cf.linear_token_stats(**inputs), 0),
            (lambda inputs=inputs: evaluate(cf.linear_token_stats, inputs), 3 * head),  # clones and the gradient
        ):
            most = allocated(call)
            assert most <= tile + pieces + per_row + extra, (rows, most)
            assert most < rows * vocab * 4 or rows < 512


@pytest.mark.parametrize("bad", ["0", "-1", "many"])
def test_a_tile_size_that_is_none(bad, monkeypatch):
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", bad)
    with pytest.raises(ValueError, match="CMDP_FAST_TILE_BYTES must be a positive number of bytes"):
        cf.linear_token_stats(**make_inputs(rows=(2,), vocab=5))


def test_the_tile_follows_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("CMDP_FAST_TILE_BYTES", raising=False)
    for level, size, sharing in ((1, "32K", "0"), (3, "16384K", "0-2,7")):
        index = tmp_path / f"index{level}"
        index.mkdir()
        for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", sharing)):
            (index / name).write_text(text + "\n")
    cpu = torch.device("cpu")
    for folder, share in ((tmp_path, 4 * 2**20), (tmp_path / "absent", tile_size.UNKNOWN_CACHE)):
        tile_size._cache_of_a_core.cache_clear()
        monkeypatch.setattr(tile_size, "CACHES", folder)
        size = tile_size.tile_bytes(cpu)
        assert size == share * torch.get_num_threads() // tile_size.SHARE
        for rows, vocab in ((1, 151936), (256, 151936), (1024, 49152), (5000, 100), (0, 10)):
            height, width = tile_size.tile_shape(rows, vocab, 8, cpu)
            assert 1 <= height <= tile_size.ROWS and 1 <= width <= vocab
            assert width <= tile_size.COLUMNS or height * width * 8 <= size
    tile_size._cache_of_a_core.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, tiny_tiles, backend):
    inputs = make_inputs(rows=(6,), vocab=50, biased=True)
    plain, gradients = evaluate(cf.linear_token_stats, inputs, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        stats, others = evaluate(cf.linear_token_stats, inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, stats, strict=True))
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


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
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(needs, keep, backend):
    inputs = make_inputs(rows=(2, 3), vocab=50, biased=True)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    names = ("hidden", "weight", "bias")
    student, teacher = ([inputs[f"{model}_{part}"] for part in names] for model in ("student", "teacher"))
    capped, plain, batch = (5.0, 0.8), (None, 1.0), (inputs["tokens"], mask, 0.7, 50, 0, backend)
    forward = torch.ops.cmdp_fast.linear_token_stats.default
    saved = forward(*student, *capped, *teacher, *plain, *batch, 50, "", True, keep)[6:]
    upstream = (torch.rand(2, 3), None, torch.rand(2, 3), None)
    torch.library.opcheck(
        torch.ops.cmdp_fast.linear_token_stats_backward.default,
        (*student, *capped, *teacher, *plain, *batch, *saved, "", *upstream, *needs),
    )
    leaves = [t.clone().requires_grad_(n) for t, n in zip(student, needs, strict=True)]
    torch.library.opcheck(forward, (*leaves, *capped, *teacher, *plain, *batch, 50, "", True, keep))


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


def test_the_reference_makes_the_logits_in_full():
    inputs = make_inputs(rows=(4,), vocab=20, student=torch.float64, teacher=torch.float64)
    x = 5 * torch.tanh(0.5 * (inputs["student_hidden"] @ inputs["student_weight"].t()) / 5)
    y = inputs["teacher_hidden"] @ inputs["teacher_weight"].t()
    got = reference.linear_token_stats(**inputs, student_scale=0.5, student_softcap=5.0)
    for a, b in zip(got, reference.token_stats(x, y, inputs["tokens"]), strict=True):
        assert_no_worse(a, a, b)


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

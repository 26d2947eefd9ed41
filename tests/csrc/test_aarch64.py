"""The kernels of aarch64, cross-compiled with the module's flags and run by QEMU: against float64 by the criterion, and
against the kernels of this machine. `python tests/support/emulated.py` runs other tests on them.
"""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from emulated import AARCH64, Emulated, build, in_place_of_native, problem
from helpers import (
    DIFFERENTIABLE,
    DTYPES,
    assert_no_worse,
    check_token_stats,
    exact_and_eager,
    make_logits,
    make_tokens,
    weighted_sum,
)

import cmdp_fast as cf
from cmdp_fast import cpu, reference, topk_reference
from cmdp_fast.constraint import KINDS

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
cpu_instructions = importlib.import_module("cpu_instructions")
REASON = problem() or (None if cpu.native else "the native module is not built: there is nothing to compare with")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
INF, NAN = math.inf, math.nan
HALVES = (torch.bfloat16, torch.float16)
PROCESSORS = {  # by variant: the least that QEMU can be, and SVE of one and of two times 128 bits
    "neon": "cortex-a72",
    "sve_128": "max,sve-max-vq=1",
    "sve_256": "max,sve-max-vq=2",
}


@pytest.fixture(scope="module", params=PROCESSORS)
def emulated(request):
    module = Emulated(PROCESSORS[request.param])
    assert module.variant() == request.param
    yield module
    module.close()


@pytest.fixture
def on_both(emulated):
    """Calls a function that returns tensors: on the emulated processor, and on this one."""

    def call(function):
        here = function()
        with in_place_of_native(emulated):
            return function(), here

    return call


def assert_same_kind(ours, theirs):
    """NaN, infinities and zeros stand in the same places."""
    for name in ("isnan", "isposinf", "isneginf"):
        assert torch.equal(getattr(ours, name)(), getattr(theirs, name)()), name


def gradients(x, y, tokens, weights=None, **settings):
    """The statistics, and the gradient of a weighted sum of them."""
    leaf = x.detach().clone().requires_grad_()
    stats = cf.token_stats(leaf, y, tokens, backend="cpu", **settings)
    weights = dict.fromkeys(DIFFERENTIABLE, 1.0) if weights is None else weights
    return [s.detach() for s in stats], torch.autograd.grad(weighted_sum(stats, weights), leaf)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 25, 151, 1057, 4101, 16897])
def test_statistics_and_gradients(width, dtype, emulated, on_both):
    x, y = make_logits(3, width, dtype=dtype), make_logits(3, width, dtype=dtype, seed=1)
    tokens = make_tokens(3, vocab=width)
    with in_place_of_native(emulated):
        check_token_stats(x, y, tokens, "cpu", temperature=0.7)
    (ours, gradient), (theirs, their_gradient) = on_both(lambda: gradients(x, y, tokens, temperature=0.7))
    weights = dict.fromkeys(DIFFERENTIABLE, 1.0)
    _, (eager, eager_gradient) = exact_and_eager(x, y, tokens, weights, temperature=0.7)
    for mine, other, plain in zip(ours, theirs, eager, strict=True):
        assert_no_worse(mine, plain, other, terms=width)
    assert_no_worse(gradient, eager_gradient.to(dtype), their_gradient, "gradient", size=3.0, terms=width)


@pytest.mark.parametrize("student, teacher", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_a_vocabulary_of_a_language_model(student, teacher, emulated):
    x, y = make_logits(1, 151_936, dtype=student), make_logits(1, 151_936, dtype=teacher, seed=1)
    with in_place_of_native(emulated):
        check_token_stats(x, y, make_tokens(1, vocab=151_936), "cpu")


@pytest.mark.parametrize("offsets", [(1e3, -1e3), (1e4, 30), (-1e4, 1e4), (1e9, 0), (-3e38, 0)])
def test_logits_far_from_zero(offsets, emulated):
    x, y = (make_logits(3, 2500, offset=offset, seed=i) for i, offset in enumerate(offsets))
    away = max(map(abs, offsets)) * 2**-24
    with in_place_of_native(emulated):
        check_token_stats(x, y, make_tokens(3, vocab=2500), "cpu", terms=away if away < 88 else 1.0)


@pytest.mark.parametrize("jump", [14.0, 20.0, 40.0, 60.0, 90.0, 3000.0, -50.0, -80.0, -90.0, -3000.0])
def test_columns_far_from_the_first_ones(jump, emulated):
    """Above and below what a power of two may be without a clamp; in a later block, a later segment, the first."""
    x, y = make_logits(4, 18000), make_logits(4, 18000, seed=1)
    x[0, 5000:9000] += jump
    y[1, 17990:] += jump
    x[2, :4000] += jump
    x[3, 6000:7000] += jump
    y[3, 6000:7000] += jump
    with in_place_of_native(emulated):
        check_token_stats(x, y, torch.tensor([6000, 17999, 20, 6500]), "cpu")


def special_rows(dtype):
    """Rows with every kind of logit that no model should give, in the vectors and in what is left of them."""
    top, lowest = 1e4, max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    x, y = make_logits(16, 1101, dtype=dtype), make_logits(16, 1101, dtype=dtype, seed=1)
    x[0, 5] = x[1, 1100] = y[2, 5] = y[3, 1100] = -INF
    x[4, ::2], y[5, 1:] = -INF, -INF
    x[6, 7] = y[7, 1099] = NAN
    x[8, 3] = y[9, 1100] = INF
    x[10], y[11] = -INF, -INF
    x[12], y[12] = -top, -top
    x[12, 40] = y[12, 41] = top  # one-hot, each its own
    x[13, 9], y[13, 9] = top, -top
    x[14, 500:] = lowest
    x[15], y[15] = 0, lowest
    return x, y, torch.arange(16) % 7


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, on_both):
    x, y, tokens = special_rows(dtype)
    (ours, gradient), (theirs, their_gradient) = on_both(lambda: gradients(x, y, tokens))
    (exact, _), (eager, _) = exact_and_eager(x, y, tokens)
    for name, mine, other, right, plain in zip(exact._fields, ours, theirs, exact, eager, strict=True):
        assert_same_kind(mine, other)
        assert_same_kind(mine, right)
        known = right.isfinite()
        size = 1e4 if dtype != torch.float64 else 1.0
        assert_no_worse(mine[known], plain[known].nan_to_num(), right[known], name, size=size, terms=1101)
    assert_same_kind(gradient, their_gradient)
    known = their_gradient.isfinite()
    limit = 1e-5 * their_gradient[known].double().abs().clamp(min=1e-3) + torch.finfo(dtype).eps
    assert ((gradient - their_gradient)[known].double().abs() <= limit).all()


def test_masked_rows_are_not_read_and_get_no_gradient(emulated):
    x, y, tokens = make_logits(5, 400), make_logits(5, 400, seed=1), make_tokens(5, vocab=400)
    mask = torch.tensor([True, False, True, False, True])
    x[~mask] = NAN
    with in_place_of_native(emulated):
        stats, gradient = gradients(x, y, tokens, mask=mask)
        alone, its_gradient = gradients(x[mask], y[mask], tokens[mask])
    for mine, other in zip(stats, alone, strict=True):
        assert torch.equal(mine[mask], other) and not mine[~mask].any()
    assert torch.equal(gradient[mask], its_gradient) and not gradient[~mask].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_batch_threads_and_alignment(dtype, emulated, threads):
    width = 33_793  # several segments, which threads fold apart
    x, y, tokens = make_logits(3, width, dtype=dtype), make_logits(3, width, dtype=dtype, seed=1), torch.arange(3)
    results = []
    with in_place_of_native(emulated):
        for count in (1, 3):
            threads(count)
            results.append(gradients(x, y, tokens))
            for shift in (1, 3):  # elements, between rows and before the first
                strided = [torch.zeros(3, width + 5, dtype=dtype)[:, shift : shift + width].copy_(t) for t in (x, y)]
                assert strided[0].stride(0) == width + 5
                results.append(gradients(*strided, tokens))
            rows = [gradients(x[i : i + 1], y[i : i + 1], tokens[i : i + 1]) for i in range(3)]
            stats = [torch.cat(parts) for parts in zip(*(s for s, _ in rows), strict=True)]
            results.append((stats, torch.cat([g for _, g in rows])))
    for stats, gradient in results[1:]:
        assert all(map(torch.equal, stats, results[0][0])) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_16_bits_is_read_as_the_float_that_it_is(dtype, emulated):
    """In rows by size, so that float arithmetic is enough for many; and in rows at random."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    by_size = numbers[numbers.float().abs().argsort(stable=True)]
    shuffled = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
    x = torch.cat([t[: len(t) // 240 * 240].view(-1, 240) for t in (by_size, shuffled)])
    y, tokens = make_logits(*x.shape, dtype=dtype), make_tokens(len(x), vocab=240)
    with in_place_of_native(emulated):
        halves, floats = (cf.token_stats(t, y, tokens, backend="cpu") for t in (x, x.float()))
    assert all(map(torch.equal, halves, floats))


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_rounded_to_nearest_and_even(dtype, emulated):
    """Of all sizes that a half may have, beyond its range too: the bits of PyTorch's own rounding of the float."""
    x, y = make_logits(48, 2003, dtype=dtype), make_logits(48, 2003, dtype=dtype, seed=1)
    tokens = make_tokens(48, vocab=2003)
    sizes = torch.logspace(-40 if dtype == torch.bfloat16 else -9, 6, 48, dtype=torch.float64)
    weights = {"logprob": sizes, "reverse_kl": sizes}
    with in_place_of_native(emulated):
        (_, half), (_, single) = (gradients(t, y, tokens, weights) for t in (x, x.float()))
    assert torch.equal(half, single.to(dtype))
    if dtype == torch.bfloat16:
        assert ((single.view(torch.int32) & 0xFFFF) == 0x8000).any()  # halfway between two
    else:
        assert half.isinf().any() and ((half != 0) & (half.abs() < torch.finfo(dtype).tiny)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 33, 4101])
def test_mixtures(width, dtype, on_both):
    x, y = make_logits(3, width, dtype=dtype), make_logits(3, width, dtype=dtype, seed=1)

    def run(function, student, teacher, **extra):
        leaf = student.detach().clone().requires_grad_()
        value = function(leaf, teacher, "jsd", beta=0.3, **extra)
        return value.detach(), torch.autograd.grad((value * torch.arange(1.0, 4)).sum(), leaf)[0]

    (value, gradient), (theirs, their_gradient) = on_both(lambda: run(cf.divergence, x, y, backend="cpu"))
    exact, exact_gradient = run(reference.divergence, x.double(), y.double())
    computed = reference.compute_dtype(x, y)
    eager, eager_gradient = run(reference.divergence, x.to(computed), y.to(computed))
    for right in (exact, theirs):
        assert_no_worse(value, eager, right, "jsd", terms=width)
    size = 3 * float(exact.max())
    for right in (exact_gradient, their_gradient):
        assert_no_worse(gradient, eager_gradient.to(dtype), right, "gradient", size=size, terms=width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 1057, 9001])
def test_tails(width, dtype, on_both):
    x, y, tokens = make_logits(4, width, dtype=dtype), make_logits(4, width, seed=1), make_tokens(4, vocab=width)
    listed = y.double().log_softmax(-1).topk(7)

    def run(function, student, **extra):
        leaf = student.detach().clone().requires_grad_()
        stats = function(leaf, listed.indices, listed.values.float(), tokens, **extra)
        weights = dict.fromkeys(("logprob", "entropy", "reverse_kl", "forward_kl"), 1.0)
        return [s.detach() for s in stats], torch.autograd.grad(weighted_sum(stats, weights), leaf)[0]

    (ours, gradient), (theirs, their_gradient) = on_both(lambda: run(cf.topk_stats, x, backend="cpu"))
    exact, exact_gradient = run(topk_reference.topk_stats, x.double())
    eager, eager_gradient = run(topk_reference.topk_stats, x.to(reference.compute_dtype(x)))
    for mine, other, plain, right in zip(ours, theirs, eager, exact, strict=True):
        assert_same_kind(mine, right)  # a token that is not listed has no known log-probability
        known = right.isfinite()
        for wanted in (right, other):
            assert_no_worse(mine[known], plain[known], wanted[known], terms=width)
    for right in (exact_gradient, their_gradient):
        assert_no_worse(gradient, eager_gradient.to(dtype), right, "gradient", size=3.0, terms=width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_the_same_account_on_every_processor(kind, dtype, on_both):
    """Bit for bit, discounts included: a token violates here as there. Only a barrier's logarithm may differ."""
    cost, reward = make_logits(6, 500, scale=1.0, dtype=dtype).abs(), make_logits(6, 500, dtype=dtype, seed=1)
    mask = make_logits(6, 500, seed=2) > -3
    cost[1, 30], cost[2, 40] = NAN, INF

    def run():
        trace = cf.budget_trace(cost, 250.0, mask=mask, gamma=0.999, reduction="sum", backend="cpu")
        return *trace, cf.modified_reward(reward, cost, trace, kind=kind, mask=mask, backend="cpu", **given)

    given = {} if kind in ("cmdp", "hinge", "saute", "worst_case") else {"coefficient": 0.3}
    ours, theirs = on_both(run)
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert mine.equal(other) or torch.equal(mine.nan_to_num(7.0), other.nan_to_num(7.0))
    tolerance = 4 * torch.finfo(dtype).eps if kind == "barrier" else 0
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=tolerance, atol=tolerance, equal_nan=True)


def test_what_a_processor_has(emulated):
    features = emulated.cpu_features()
    name = emulated.variant()
    assert features[0] == "asimd" and ("svebf16" in features) == name.startswith("sve")
    assert emulated.variants() == [(n, n in ("neon", name)) for n in PROCESSORS]
    other = "sve_256" if name == "sve_128" else "sve_128"
    with pytest.raises(ValueError, match=f"cannot run the kernel variant '{other}'"):
        emulated.set_variant(other)


def test_vectors_of_another_length_leave_neon():
    module = Emulated("max,sve-max-vq=4,sve-default-vector-length=64")
    assert module.variant() == "neon"
    module.close()


def test_wrong_calls_raise_there_too(emulated):
    x, y, tokens = make_logits(2, 8), make_logits(2, 8), torch.zeros(2, dtype=torch.int64)
    with in_place_of_native(emulated), pytest.raises(ValueError, match="temperature must be positive"):
        arguments = cpu.matrix(x), cpu.matrix(y), tokens.data_ptr(), 0, 8, 0.0, [0] * 6, False, 0, 1
        emulated.token_stats(*arguments)


def test_nothing_is_done_lane_by_lane(emulated):
    """Instructions per column of bfloat16, with room for other compilers; lane by lane they were 23."""
    variant = emulated.variant()
    _, span = cpu_instructions.kernels_of(build(AARCH64), AARCH64.objdump)
    counter = cpu_instructions.Counter(AARCH64, PROCESSORS[variant], variant, span)
    ran = counter.in_loops("statistics", torch.bfloat16)
    assert ran.total() / cpu_instructions.WIDTH < {"neon": 17.5, "sve_128": 12, "sve_256": 6.5}[variant]

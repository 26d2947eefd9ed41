"""Every variant of the native kernels that this processor runs, of which only the best is chosen: special values, and
rows of more segments than lie on a thread's stack."""

import ctypes
import math
import mmap
import sys

import pytest
import torch
from helpers import DIFFERENTIABLE, DTYPES, assert_no_worse, exact_and_eager, make_logits, weighted_sum
from topk_inputs import given

import cmdp_fast as cf
from cmdp_fast import cpu, tails
from cmdp_fast.cpu import native
from cmdp_fast.layout import ListedRows, TailGradient

pytestmark = pytest.mark.skipif(native is None, reason="the native module is not built")
INF, NAN = torch.inf, torch.nan
WIDTH = 4237  # a block of the widest vectors, a vector, and a rest
PLACES = (0, 4223, 4224, WIDTH - 1)  # the first column, the edge of all variants' blocks, the rest


def special_rows(dtype):
    """Two rows of a pair's logits for each of some special values at each of some places, and tokens elsewhere."""
    kinds = ((NAN, None), (None, NAN), (INF, None), (None, INF), (-INF, None), (None, -INF), (-INF, -INF), (60, 50))
    pairs = [(*values, place) for values in kinds for place in PLACES]
    x, y = (make_logits(len(pairs) + 3, WIDTH, dtype=dtype, seed=seed) for seed in (0, 1))
    for row, (mine, theirs, place) in enumerate(pairs):
        for logits, value in ((x, mine), (y, theirs)):
            if value is not None:
                logits[row, place] = value
    x[-1], y[-2] = -INF, -INF  # one of the two has no distribution
    y[-3, 5:] = -INF
    return x, y, torch.full((len(x),), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_special_values(variant, dtype):
    x, y, tokens = special_rows(dtype)
    weights = {name: make_logits(len(x), scale=1.0, seed=i) for i, name in enumerate(DIFFERENTIABLE)}
    leaf = x.clone().requires_grad_()
    stats = cf.token_stats(leaf, y, tokens, backend="cpu")
    (gradient,) = torch.autograd.grad(weighted_sum(stats, weights), leaf)
    exact, eager = exact_and_eager(x, y, tokens)
    for name in stats._fields:
        ours, theirs, right = (getattr(source, name) for source in (stats, eager[0], exact[0]))
        assert torch.equal(ours.isnan(), right.isnan()) and torch.equal(ours.isinf(), right.isinf()), name
        fine = right.isfinite()
        assert_no_worse(ours[fine], theirs[fine], right[fine], name, size=60.0, terms=WIDTH)
    lost = stats.logprob.isnan()
    assert torch.equal(gradient.isnan().any(-1), lost) and gradient[~lost].isfinite().all()


@pytest.mark.parametrize("size", [130.0, 2907252.0, 1e9, 1e20, 1e37])
def test_one_logit_in_the_abyss(variant, size):
    """Finite, and so far down that it weighs nothing: the bits of such an exponent must not pass for a small one."""
    x, y, tokens = make_logits(2, WIDTH), make_logits(2, WIDTH, seed=1), torch.tensor([3, 4])
    expected = cf.token_stats(*(torch.cat([t[:, :7], t[:, 8:]], 1) for t in (x, y)), tokens, backend="cpu")
    for step in range(-3, 4):
        x[:, 7] = y[:, 7] = -size - step * 7
        for got, want in zip(cf.token_stats(x, y, tokens, backend="cpu"), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-6, atol=1e-6), step


@pytest.mark.parametrize("size", [95.0, 1000.0, 2907252.0, 1e9, 1e30])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_one_logit_in_the_sky(variant, which, size):
    """The last one, far above the reference that the columns before it have given."""
    x, y, tokens = make_logits(2, WIDTH), make_logits(2, WIDTH, seed=1), torch.tensor([3, WIDTH - 1])
    for step in range(-3, 4):
        (x if which == "student" else y)[:, -1] = size + step * 7
        exact = cf.reference.token_stats(x.double(), y.double(), tokens)
        for name, got in cf.token_stats(x, y, tokens, backend="cpu")._asdict().items():
            assert torch.allclose(got.double(), getattr(exact, name), rtol=1e-6, atol=1e-5), (name, step)


@pytest.mark.parametrize("width", [1, 3, 5, 19])
def test_rows_narrower_than_a_vector_far_down(variant, width):
    """Their highest logit is in no whole vector; beside another reference than that they would weigh nothing."""
    x, y = make_logits(2, width, offset=-1000.0), make_logits(2, width, offset=-2000.0, seed=1)
    tokens = torch.tensor([0, width - 1])
    exact = cf.reference.token_stats(x.double(), y.double(), tokens, temperature=0.7)
    whole = cf.token_stats(x, y, tokens, temperature=0.7, backend="cpu")
    state = cf.TokenState.empty(2, temperature=0.7).update(x, y, tokens, backend="cpu")
    for stats in (whole, state.finish()):
        for name, right in exact._asdict().items():
            assert torch.allclose(getattr(stats, name).double(), right, rtol=1e-6, atol=1e-5), name


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_model_without_a_column_in_the_first_blocks(variant, which):
    """They give no reference: beside it the columns that it has, far below, would weigh nothing."""
    x, y, tokens = make_logits(2, WIDTH), make_logits(2, WIDTH, seed=1), torch.tensor([WIDTH - 1, WIDTH - 2])
    restricted = x if which == "student" else y
    restricted[:, -3:] -= 1000
    restricted[:, :-3] = -INF
    exact = cf.reference.token_stats(x.double(), y.double(), tokens)
    for name, got in cf.token_stats(x, y, tokens, backend="cpu")._asdict().items():
        assert torch.allclose(got.double(), getattr(exact, name), rtol=1e-6, atol=1e-5), name


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_block_of_a_tile_that_weighs_nothing(variant, which):
    """Of one model, beside the columns before the tile: the other's differences are still those from its logits there,
    when a later block of the tile has higher ones."""
    mine, theirs = make_logits(1, 100 + 2 * 4224), make_logits(1, 100 + 2 * 4224, seed=1)
    mine[:, 100:4324] -= 300
    mine[:, 4324:] += 200
    x, y = (mine, theirs) if which == "student" else (theirs, mine)
    tokens, state = torch.tensor([5]), cf.TokenState.empty(1)
    for part in (slice(0, 100), slice(100, None)):
        state.update(x[:, part], y[:, part], tokens, first_column=part.start, backend="cpu")
    exact = cf.reference.token_stats(x.double(), y.double(), tokens)
    for name, got in state.finish()._asdict().items():
        assert torch.allclose(got.double(), getattr(exact, name), rtol=1e-6, atol=1e-5), name


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_an_abyss_of_many_columns(variant, which):
    """Each of them is a term that a float holds, and their sum is none; the divergence, which is their mean, is one."""
    x, y = torch.zeros(2, WIDTH), torch.zeros(2, WIDTH)
    (x if which == "student" else y)[:, 7:40] = -1e38
    stats = cf.token_stats(x, y, torch.tensor([0, 1]), backend="cpu")
    value = stats.forward_kl if which == "student" else stats.reverse_kl
    assert torch.allclose(value, torch.full((2,), 33 / WIDTH * 1e38), rtol=1e-5)


@pytest.mark.parametrize("beta", [0.25, 0.5])
def test_a_mixture_in_double_of_models_that_nearly_agree(variant, beta):
    """Its value is quadratic in their distance: what rounds 1 - rho, not the distance, would be a tenth of it."""
    x, apart = torch.tensor([[0.3, 0.0, -1.1]], dtype=torch.float64), 1e-7
    y = x + torch.tensor([apart, 0.0, -apart], dtype=torch.float64)
    p, difference = x.softmax(-1), torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    variance = (p * difference**2).sum() - (p * difference).sum() ** 2
    value = cf.divergence(x, y, "jsd", beta=beta, backend="cpu")
    assert value.item() == pytest.approx(beta * (1 - beta) / 2 * variance.item() * apart**2, rel=1e-6, abs=0)


def test_a_mixture_in_double_with_a_leading_column_each(variant):
    """36.7 nats below it a column is 2^-53 of it: one by one none of the others would be left, in blocks a tenth."""
    width, lead, teacher_lead = 20_000, 37.5, 36.0
    x, y = torch.zeros(1, width, dtype=torch.float64), torch.zeros(1, width, dtype=torch.float64)
    x[0, 0], y[0, 1] = lead, teacher_lead
    value = cf.divergence(x, y, "jsd", backend="cpu").item()
    z, u = math.exp(lead) + width - 1, math.exp(teacher_lead) + width - 1
    columns = [(math.exp(lead) / z, 1 / u), (1 / z, math.exp(teacher_lead) / u), (1 / z, 1 / u)]
    each = [p / 2 * math.log(2 * p / (p + w)) + w / 2 * math.log(2 * w / (p + w)) for p, w in columns]
    # 16 columns a group, 32 groups a block and 40 blocks: half a unit each, and a few for the leading terms.
    assert abs(value - (each[0] + each[1] + (width - 2) * each[2])) <= ((16 + 32 + 40) / 2 + 8) * 2**-53


def test_rounding_takes_no_mixture_below_zero(variant):
    """Of models that nearly agree it is less than what its terms are rounded by."""
    x = make_logits(64, 300)
    y = x + make_logits(64, 300, seed=1, scale=1e-5)
    value = cf.divergence(x, y, "jsd", backend="cpu")
    assert (value >= 0).all() and (value < 1e-6).all()


def test_the_least_of_a_tail_is_found_in_every_lane(variant):
    columns = torch.arange(33)
    x = make_logits(33, 33).scatter(1, columns[:, None], -50.0)
    rows = ListedRows(x, torch.empty(33, 0, dtype=torch.int64), columns, None, 1.0, 33)
    state = tails.empty(33, 0, x.device)
    cpu.update_tails(rows, 0, state)
    assert torch.equal(state.fields[:, 3], state.own) and torch.allclose(state.own, torch.full_like(state.own, -50.0))


def test_the_largest_of_a_tail_is_found_in_every_lane(variant):
    """From a smaller reference on, the weight of one 150 nats above it is beyond the largest float."""
    columns = torch.arange(33)
    x = make_logits(33, 33).scatter(1, columns[:, None], 150.0)
    rows = ListedRows(x, torch.empty(33, 0, dtype=torch.int64), columns, None, 1.0, 33)
    state = tails.empty(33, 0, x.device)
    cpu.update_tails(rows, 0, state)
    tail = tails.finished(state)
    assert torch.allclose(tail.reference + tail.log_mass, x.double().logsumexp(-1))


def test_a_tail_far_from_zero(variant):
    """A float has no digits left there for what a logit is above the reference."""
    sizes = torch.logspace(7, 37, 200)
    x = torch.cat([sizes, -sizes])[:, None].repeat(1, 33)
    rows = ListedRows(x, torch.empty(len(x), 0, dtype=torch.int64), torch.zeros(len(x)).long(), None, 1.0, 33)
    state = tails.empty(len(x), 0, x.device)
    cpu.update_tails(rows, 0, state)
    mass = tails.finished(state).log_mass.exp()
    assert torch.allclose(mass, torch.full_like(mass, 33.0))


def test_the_least_logit_of_a_tail_is_divided_whatever_its_size(variant):
    sizes = torch.tensor([1.0, 8e307, 1e308, 1.7e308], dtype=torch.float64)  # 2^1023 is 9e307
    x = torch.stack([torch.zeros(4, dtype=torch.float64), -sizes], 1)
    rows = ListedRows(x, torch.empty(4, 0, dtype=torch.int64), torch.zeros(4).long(), None, 2.0, 2)
    state = tails.empty(4, 0, x.device)
    cpu.update_tails(rows, 0, state)
    assert torch.equal(tails.finished(state).lowest, -sizes / 2)


def test_probabilities_are_as_exact_as_the_polynomial_of_their_powers(variant):
    """A gradient shows p: 1.6e-7 (csrc/cpu/simd.h), and a rounding each of the coefficient and of the product."""
    x = torch.stack([torch.zeros(4096), torch.linspace(-12, 12, 4096), torch.full((4096,), -40.0)], 1)
    leaf, last = x.clone().requires_grad_(), torch.full((4096,), 2)
    logprob = cf.token_stats(leaf, x, last, backend="cpu").logprob
    (gradient,) = torch.autograd.grad(logprob.sum(), leaf)
    p = x.double().softmax(-1)
    assert (-gradient / p - 1).abs()[p > 0.3].max() < 1.6e-7 + 2 * 6e-8


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("place", PLACES)
def test_a_bad_logit_of_a_tail(variant, place, bad):
    student, message, tokens = given(2, vocab=WIDTH, k=4)
    assert not (message.topk_ids[1] == place).any()
    student[1, place] = bad
    stats = cf.topk_stats(student, *message[:2], tokens, backend="cpu")
    assert stats.logprob.isnan().tolist() == stats.forward_kl.isnan().tolist() == [False, True]


@pytest.mark.parametrize("sizes", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (-1, 0, 0, 1)])
def test_upstream_gradients_near_the_largest_float(variant, sizes):
    """What no float holds on the way, of columns that weigh nothing too, leaves a gradient that one does."""
    x, y, tokens = make_logits(2, 70), make_logits(2, 70, seed=1), torch.tensor([5, 69])
    x[0, 3] = y[0, 3] = -INF
    gradients = []
    for scale in (1.0, 2.0**127):
        leaf = x.clone().requires_grad_()
        stats = cf.token_stats(leaf, y, tokens, temperature=2.5, backend="cpu")
        outputs = [getattr(stats, name) for name in DIFFERENTIABLE]
        upstream = [torch.full_like(stats.logprob, size * scale) for size in sizes]
        gradients.append(torch.autograd.grad(outputs, leaf, upstream)[0].double() / scale)
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits(variant, dtype):
    """What is listed is read and written one number at a time: all that there are, halfway between, and beside that."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None]
    count = every.numel()
    ids, token = torch.arange(count)[None], torch.tensor([int((every[0] == 1).nonzero())])
    rows = ListedRows(every, ids, token, None, 1.0, count)
    state = tails.empty(1, count, every.device)
    cpu.update_tails(rows, 0, state)
    assert torch.equal(state.listed.nan_to_num(nan=7.0), (every.double() * state.own).nan_to_num(nan=7.0))

    ordered = every[0].float().sort().values
    ordered = ordered[ordered.isfinite()]
    middle = ((ordered[1:].double() + ordered[:-1].double()) / 2).float()
    beside = [torch.nextafter(middle, torch.full_like(middle, to)) for to in (-INF, INF)]
    largest = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max]) * (1 + torch.finfo(dtype).eps / 4)
    beyond = [torch.nextafter(largest, edge) for edge in (torch.zeros(2), largest * INF)]
    payload = torch.tensor([0x7FFFFFFF, 0x7FC00001], dtype=torch.int32).view(torch.float32)  # NaNs to be rounded
    values = torch.cat([ordered, middle, *beside, largest, *beyond, torch.tensor([INF, -INF, NAN]), payload])
    rows = ListedRows(values.to(dtype)[None], torch.arange(len(values))[None], token * 0, None, 1.0, len(values))
    nothing = torch.zeros(1, dtype=torch.float64)
    out = torch.empty_like(rows.student)
    gradient = TailGradient(nothing, nothing - INF, nothing, nothing, nothing, values.double()[None])
    cpu.tail_backward(rows, gradient, out)
    assert torch.equal(out.nan_to_num(nan=7.0), rows.student.nan_to_num(nan=7.0))
    assert torch.equal(out.signbit()[~out.isnan()], rows.student.signbit()[~out.isnan()])


def test_more_segments_than_a_stack_holds(variant):
    """65 of the widest variant's, and 130 or 260 of the others'."""
    width = 65 * 33_792 - 5
    logits, tokens = make_logits(1, width), torch.tensor([width - 3])
    stats = cf.token_stats(logits, logits.flip(1), tokens, backend="cpu")
    right = logits.double().log_softmax(-1)
    assert stats.logprob.item() == pytest.approx(right[0, -3].item(), abs=1e-5)
    assert stats.teacher_logprob.item() == pytest.approx(right[0, 2].item(), abs=1e-5)
    assert stats.entropy.item() == pytest.approx(-(right.exp() * right).sum().item(), abs=1e-4)


def fenced(values):
    """A copy that ends where the process may touch nothing: what goes beyond is a crash."""
    pages = -(-values.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    inside = pages * mmap.PAGESIZE - values.nbytes
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=inside)
    return copy.reshape(values.shape).copy_(values)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected as on Linux")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 13, 4223, WIDTH])
def test_nothing_beyond_a_row_is_read_or_written(variant, width, dtype):
    x, y = (make_logits(1, width, dtype=dtype, seed=seed) for seed in (0, 1))
    token = torch.tensor([width - 1])
    outcomes = []
    for place in (torch.clone, fenced):
        student, teacher = place(x).requires_grad_(), place(y)
        mixed = place(x).requires_grad_()  # with a teacher of another dtype it is converted, and written by another way
        other = cf.token_stats(mixed, place(y.float()), token, inplace_backward=True, backend="cpu").reverse_kl.sum()
        stats = cf.token_stats(student, teacher, token, inplace_backward=True, backend="cpu")
        jsd = cf.divergence(place(x), teacher, "jsd", backend="cpu")
        ids, logprobs = torch.tensor([[width // 2]]), torch.tensor([[-0.5]])
        tail = cf.topk_stats(place(x), ids, logprobs, token, backend="cpu")
        total = sum(value.double().sum() for value in (*stats[:1], stats.entropy, stats.reverse_kl, stats.forward_kl))
        outcomes.append([*stats, jsd, *tail, *torch.autograd.grad(total, student), *torch.autograd.grad(other, mixed)])
    for ours, right in zip(*outcomes, strict=True):
        assert torch.equal(ours, right)

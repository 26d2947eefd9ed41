"""topk_stats against float64: its values and gradient, rows that do not count, special values, and every error.

That its bounds are bounds is shown in test_topk_bounds.py.
"""

import pytest
import torch
from helpers import DTYPES, assert_no_worse, finest, here, make_logits, make_tokens
from topk_inputs import DIFFERENTIABLE, evaluate, given, sent, weighted

import cmdp_fast as cf
from cmdp_fast import topk_reference
from cmdp_fast.cpu import native

INF, NAN = torch.inf, torch.nan


def check(student, message, tokens, backend, **settings):
    """Ours against the reference in float64, measured by what the reference loses in the dtype it computes in.

    The bounds are widened by the rounding of the dtype; so the reference is told it by way of the dtype of the logits.
    """
    ours, gradient = evaluate(cf.topk_stats, student, message, tokens, backend=backend, **settings)
    right, right_gradient = evaluate(topk_reference.topk_stats, student, message, tokens, **settings)
    width = student.shape[-1]
    for name in ours._fields:
        value, expected = getattr(ours, name), getattr(right, name)
        assert value.dtype == expected.dtype and value.shape == tokens.shape
        assert torch.equal(value.isinf(), expected.isinf())
        value, expected = (t.nan_to_num(posinf=0.0) for t in (value, expected))
        assert_no_worse(value, expected, expected, name, size=10, terms=width)
    size = 10 / settings.get("temperature", 1.0)
    assert_no_worse(gradient, right_gradient, right_gradient, "gradient", size=size, terms=width)
    return ours, gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab, k", [(1, 1), (7, 7), (9, 1), (333, 12), (9001, 40), (5000, 600)])
def test_values_and_gradient(vocab, k, dtype, backend):
    student, message, tokens = given(3, vocab=vocab, k=k, dtype=dtype)
    check(student, message, tokens, backend, temperature=0.7)


@pytest.mark.skipif(native is None, reason="the native module is not built")
@pytest.mark.parametrize("name", [name for name, runs in (native.variants() if native else ()) if runs])
def test_every_variant_of_the_native_kernels(name):
    """Of a width that no vector divides, with tails of blocks and of vectors."""
    chosen = native.variant()
    native.set_variant(name)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check(*given(3, vocab=9011, k=40, dtype=dtype), "cpu", temperature=0.7)
    finally:
        native.set_variant(chosen)


@pytest.mark.parametrize("offset", [100.0, -1e4, 1e9, 1e20, -3e38])
def test_offsets_cost_no_precision(offset, backend):
    """A common shift moves the listed logits and the tail alike. (Spreads survive it up to 1e4.)"""
    student, message, tokens = given(3, vocab=500, k=5)
    check((student + offset).clamp(min=-3.4e38), message, tokens, backend)


def test_a_tail_far_below_the_list_and_far_above_it(backend):
    """200 nats either way: nothing overflows, and the tail's gradient is not lost."""
    student, message, tokens = given(2, vocab=300, k=4)
    for offset in (-200.0, 200.0):
        moved = student.scatter_add(-1, message.topk_ids, torch.full_like(message.topk_logprobs, offset))
        _, gradient = check(moved, message, tokens, backend)
        assert gradient.isfinite().all()


@pytest.mark.float64
def test_gradcheck(backend):
    """Of tokens that are listed and of one that is not, with a row that is masked."""
    student, message, _ = given(4, vocab=8, k=3, dtype=torch.float64)
    tokens = torch.stack([message.topk_ids[0, 0], *(message.topk_ids.new_tensor(i) for i in (2, 5, 7))])
    mask = torch.tensor([True, True, False, True])

    def statistics(logits):
        stats = cf.topk_stats(logits, *message[:2], tokens, mask=mask, temperature=0.7, vocab_size=8, backend=backend)
        return tuple(getattr(stats, name) for name in DIFFERENTIABLE)

    # the value carries a rounding slack of 1e-13 that its gradient does not
    assert torch.autograd.gradcheck(statistics, student.requires_grad_(), atol=1e-6)


def test_a_masked_row_is_not_read(backend):
    student, message, tokens = given(2, 5, vocab=80)
    mask = here(torch.tensor([[True, False, True, True, False], [False, True, True, False, True]]))
    expected, right = evaluate(cf.topk_stats, student, message, tokens, backend=backend)
    spoilt = [t.masked_fill(~mask[..., None], NAN) for t in (student, message.topk_logprobs)]
    floor, wrong = message.min_logprob.masked_fill(~mask, NAN), tokens.masked_fill(~mask, -7)
    stats, gradient = evaluate(
        cf.topk_stats, spoilt[0], message._replace(topk_logprobs=spoilt[1], min_logprob=floor), wrong,
        mask=mask, backend=backend,
    )  # fmt: skip
    for value, whole in zip(stats, expected, strict=True):
        assert torch.equal(value, torch.where(mask, whole, 0.0))
    assert torch.equal(gradient, torch.where(mask[..., None], right, 0.0))


def test_columns_beyond_vocab_size_are_not_read(backend):
    student, message, tokens = given(3, vocab=50)
    expected, right = evaluate(cf.topk_stats, student, message, tokens, backend=backend)
    wide = torch.nn.functional.pad(student, (0, 7), value=NAN)
    stats, gradient = evaluate(cf.topk_stats, wide, message, tokens, vocab_size=50, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))
    assert torch.equal(gradient[:, :50], right) and not gradient[:, 50:].any()


def test_any_strides(backend):
    """Rows far apart, in another order, and every second column."""
    student, message, tokens = given(3, 4, vocab=70)
    expected, right = evaluate(cf.topk_stats, student, message, tokens, backend=backend)
    memory = torch.full((4, 3, 3, 200), NAN, device=student.device)
    apart = memory[:, :, 1, 5:75].transpose(0, 1).copy_(student)
    second = torch.full((3, 4, 140), NAN, device=student.device)[..., ::2].copy_(student)
    for x in (apart, second):
        leaf = x.detach().requires_grad_()
        stats = cf.topk_stats(
            leaf, message.topk_ids, message.topk_logprobs, tokens, min_logprob=message.min_logprob, backend=backend
        )
        assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))
        assert torch.equal(torch.autograd.grad(weighted(stats), leaf)[0], right)


@pytest.mark.parametrize("rows, k", [((0,), 4), ((2, 0), 4), ((3,), 0), ((), 4)])
def test_nothing_to_compare(rows, k, backend):
    student, message, tokens = given(*rows, vocab=9, k=k)
    stats, gradient = evaluate(cf.topk_stats, student, message, tokens, backend=backend)
    assert stats.logprob.shape == rows and gradient.shape == (*rows, 9)
    if k == 0 and rows:
        assert not stats.forward_kl.any() and not stats.teacher_mass.any()


def test_repeated_and_foreign_ids_are_absent(backend):
    """What stands first counts; an id outside of the vocabulary belongs to the tail, and to nothing the student has."""
    student, message, tokens = given(2, vocab=30, k=4)
    expected, right = evaluate(cf.topk_stats, student, message, tokens, backend=backend)
    filler = message.topk_logprobs.new_full((2, 2), -0.5)
    padded = message._replace(
        topk_ids=torch.cat([message.topk_ids, message.topk_ids[:, 1:3]], -1).int(),
        topk_logprobs=torch.cat([message.topk_logprobs, filler], -1),
    )
    stats, gradient = evaluate(cf.topk_stats, student, padded, tokens, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True)) and torch.equal(gradient, right)
    for foreign in (-1, 30):
        away = padded._replace(topk_ids=padded.topk_ids.clone().index_fill(1, here(torch.tensor([4, 5])), foreign))
        stats, gradient = evaluate(cf.topk_stats, student, away, tokens, backend=backend)
        for name in DIFFERENTIABLE:
            assert torch.equal(getattr(stats, name), getattr(expected, name))
        assert torch.equal(gradient, right) and stats.forward_kl_upper.isposinf().all()
        nothing = away._replace(topk_logprobs=torch.cat([message.topk_logprobs, filler.fill_(-INF)], -1))
        stats, _ = evaluate(cf.topk_stats, student, nothing, tokens, backend=backend)
        assert torch.equal(stats.forward_kl_upper, expected.forward_kl_upper)


def test_columns_that_one_of_them_excludes(backend):
    """F = +inf passes p - w, R = +inf passes nothing, and an excluded column of the tail leaves no upper bound of F."""
    student, message, tokens = given(3, vocab=30, k=4)
    excluded = student.index_put((torch.arange(3), message.topk_ids[:, 1]), torch.tensor(-INF))
    x = excluded.clone().requires_grad_()
    stats = cf.topk_stats(x, *message[:2], tokens, backend=backend)
    assert stats.forward_kl.isposinf().all() and stats.forward_kl_upper.isposinf().all()
    assert stats.reverse_kl.isfinite().all()
    (gradient,) = torch.autograd.grad(stats.forward_kl.sum(), x)
    p, w = x.softmax(-1), message.topk_logprobs.exp()
    assert torch.allclose(gradient.gather(-1, message.topk_ids), p.gather(-1, message.topk_ids) - w, atol=1e-5)

    none = message.topk_logprobs.index_fill(1, here(torch.tensor([2])), -INF)
    x = student.clone().requires_grad_()
    stats = cf.topk_stats(x, message.topk_ids, none, tokens, backend=backend)
    assert stats.reverse_kl.isposinf().all() and stats.reverse_kl_upper.isposinf().all()
    assert not torch.autograd.grad(stats.reverse_kl.sum(), x)[0].any() and stats.forward_kl.isfinite().all()

    in_tail = student.scatter(-1, student.argsort(-1)[:, :1], -INF)
    stats = cf.topk_stats(in_tail, *message[:2], tokens, min_logprob=message.min_logprob, backend=backend)
    assert stats.forward_kl.isfinite().all() and stats.forward_kl_upper.isposinf().all()
    assert stats.reverse_kl_upper.isfinite().all() and stats.entropy.isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("listed", [True, False])
def test_a_bad_logit_stays_in_its_row(bad, listed, backend):
    student, message, tokens = given(3, vocab=5000, k=4)
    expected, right = evaluate(cf.topk_stats, student, message, tokens, backend=backend)
    column = message.topk_ids[1, 2] if listed else student[1].argmin()
    spoilt = student.clone()
    spoilt[1, column] = bad
    stats, gradient = evaluate(cf.topk_stats, spoilt, message, tokens, backend=backend)
    others = here(torch.tensor([0, 2]))
    for name, value in stats._asdict().items():
        assert torch.equal(value[others], getattr(expected, name)[others])
        assert value[1].isnan() or name == "teacher_mass"
    assert torch.equal(gradient[others], right[others]) and gradient[1].isnan().all()

    x = spoilt.requires_grad_()
    stats = cf.topk_stats(x, *message[:2], tokens, backend=backend)
    kept = torch.where(stats.forward_kl.isnan(), 0.0, stats.forward_kl)
    (gradient,) = torch.autograd.grad(kept.sum(), x)
    assert gradient.isfinite().all() and not gradient[1].any()


@pytest.mark.parametrize("k", [3, 20])
def test_a_row_of_minus_infinity_and_a_teacher_of_nan(k, backend):
    student, message, tokens = given(3, vocab=20, k=k)
    gone = student.clone()
    gone[0] = -INF
    stats = cf.topk_stats(gone, *message[:2], tokens, backend=backend)
    assert stats.logprob[0].isnan() and stats.forward_kl[0].isnan() and stats.forward_kl[1:].isfinite().all()
    broken = message.topk_logprobs.clone()
    broken[0, 1] = NAN
    stats = cf.topk_stats(student, message.topk_ids, broken, tokens, backend=backend)
    for name in ("forward_kl", "reverse_kl", "forward_kl_upper", "teacher_mass"):
        assert getattr(stats, name)[0].isnan() and not getattr(stats, name)[1:].isnan().any()
    assert stats.logprob.isfinite().all() and stats.entropy.isfinite().all()


def test_a_result_depends_on_nothing_around_its_row(backend, threads):
    student, message, tokens = given(40, vocab=9000, k=30)
    whole, right = evaluate(cf.topk_stats, student, message, tokens, backend=backend)
    threads(1)
    one = message._replace(**{name: value[7:8] for name, value in message._asdict().items()})
    x = student[7:8].clone().requires_grad_()
    stats = cf.topk_stats(x, *one[:2], tokens[7:8], min_logprob=one.min_logprob, backend=backend)
    assert all(torch.equal(a, b[7:8]) for a, b in zip(stats, whole, strict=True))
    again, same = evaluate(cf.topk_stats, student, message, tokens, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True)) and torch.equal(same, right)


def test_the_teacher_gets_no_gradient_and_bounds_from_above_have_none(backend):
    student, message, tokens = given(3, vocab=30)
    teacher = message.topk_logprobs.clone().requires_grad_()
    stats = cf.topk_stats(student.requires_grad_(), message.topk_ids, teacher, tokens, backend=backend)
    weighted(stats).backward()
    assert teacher.grad is None and student.grad is not None
    assert all(getattr(stats, name).requires_grad == (name in DIFFERENTIABLE) for name in stats._fields)


def test_statistics_of_the_student_are_those_of_token_stats(backend):
    student, message, tokens = given(6, vocab=700)
    stats = cf.topk_stats(student, *message[:2], tokens, backend=backend)
    whole = cf.token_stats(student, make_logits(6, 700, seed=5), tokens, backend=backend)
    for name in ("logprob", "entropy"):
        assert torch.allclose(getattr(stats, name), getattr(whole, name), atol=5e-6)


def test_float64_and_dtypes_of_the_results(backend):
    widest, _, _ = finest(backend)
    student, message, tokens = given(3, vocab=30)
    assert cf.topk_stats(student.bfloat16(), *message[:2], tokens, backend=backend).forward_kl.dtype == torch.float32
    wide = cf.topk_stats(student.to(widest), message.topk_ids, message.topk_logprobs.double(), tokens, backend=backend)
    assert all(value.dtype == torch.float64 for value in wide)


def test_a_token_outside_of_the_vocabulary():
    student, message, tokens = given(3, vocab=30)
    with pytest.raises(ValueError, match=r"tokens\[1\] = 30 is outside the vocabulary \[0, 30\)"):
        cf.topk_stats(student, *message[:2], tokens.index_fill(0, torch.tensor([1]), 30))


LOGITS, IDS, LOGPROBS = torch.zeros(2, 9), torch.tensor([[0, 1], [1, 2]]), torch.full((2, 2), -1.0)
TOKENS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"student_logits": torch.zeros(3, 9)}, ValueError, r"tokens must have the shape of student_logits"),
        ({"student_logits": torch.zeros(2, 9).long()}, TypeError, "student_logits must be float32"),
        (
            {"topk_ids": torch.zeros(2, 3).long()},
            ValueError,
            r"must both have shape \[2, k\], got \[2, 3\] and \[2, 2\]",
        ),
        ({"topk_ids": torch.zeros(2, 2)}, TypeError, r"topk_ids must be int64 or int32, got float32\[2, 2\]"),
        ({"topk_logprobs": IDS}, TypeError, "topk_logprobs must be float32, bfloat16, float16 or float64, got int64"),
        ({"topk_logprobs": [[-1.0]]}, TypeError, "topk_logprobs must be a tensor, got list"),
        ({"tokens": TOKENS.float()}, TypeError, "tokens must be int64"),
        (
            {"mask": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"mask must have the shape of tokens, \[2\], got \[3\]",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"vocab_size": 10}, ValueError, "vocab_size=10 must be at least 1"),
        ({"top_k": -1}, ValueError, "top_k must not be negative, got -1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int"),
        ({"min_logprob": 0.5}, ValueError, "min_logprob must be the logarithm of a probability, at most 0, got 0.5"),
        ({"min_logprob": torch.zeros(3)}, ValueError, r"min_logprob must have the shape of tokens, \[2\], got \[3\]"),
        ({"min_logprob": TOKENS}, TypeError, "min_logprob must be float32"),
        ({"backend": "cpp"}, ValueError, "backend='cpp' is unknown"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    right = {"student_logits": LOGITS, "topk_ids": IDS, "topk_logprobs": LOGPROBS, "tokens": TOKENS}
    with pytest.raises(error, match=message):
        cf.topk_stats(**(right | change))


def test_of_a_real_message():
    """`sent` is what the tests believe a server to send: its k most likely tokens, most likely first."""
    message = sent(torch.tensor([[0.1, 0.6, 0.3]]).log(), 2)
    assert message.topk_ids.tolist() == [[1, 2]] and make_tokens(1, vocab=3).shape == (1,)
    assert message.topk_logprobs.exp().tolist() == [pytest.approx([0.6, 0.3])]

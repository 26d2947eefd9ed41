"""The bounds of topk_stats are bounds, whatever the two distributions are and however they are rounded; how loose they
are; and what they prove of a budget."""

import itertools

import pytest
import torch
from helpers import make_logits, make_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_inputs import KINDS, assert_bounds, drawn, exact, sent

import cmdp_fast as cf
from cmdp_fast import topk_reference

pytestmark = pytest.mark.tiles

BACKENDS = [name for name in ("torch", "cpu") if cf.available_backends()[name] is None]
ROUNDED = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**31),
    k=st.sampled_from([1, 2, 5, 17, 59, 60]),
    student=st.sampled_from(ROUNDED),
    teacher=st.sampled_from(ROUNDED),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    floor=st.booleans(),
)
@settings(max_examples=20)
def test_bounds_hold(backend, kind, seed, k, student, teacher, temperature, floor):
    """In every dtype of the student's logits and of the message, of distributions that look like a language model's
    and of those that are made to break them."""
    x, y = drawn(kind, seed, k=k)
    x, tokens, message = x.to(student), make_tokens(4, vocab=60), sent(y, k, teacher)
    stats = cf.topk_stats(
        x,
        *message[:2],
        tokens,
        temperature=temperature,
        min_logprob=message.min_logprob if floor else None,
        backend=backend,
    )
    assert_bounds(stats, exact(x, y, tokens, temperature), kind)
    if not floor and k < 57 and kind != "no tail":  # the last three may be excluded
        assert stats.reverse_kl_upper.isposinf().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [2.0, 40.0])
@given(seed=st.integers(0, 2**31), k=st.integers(1, 8))
@settings(max_examples=20)
def test_the_union_with_the_students_choice_is_tighter(backend, scale, seed, k):
    """The teacher answers for the student's k most likely tokens as well. top_k says whose the leading ones are."""
    x, y = (make_logits(4, 60, dtype=torch.float64, scale=scale / 10, seed=2 * seed + i) for i in (0, 1))
    message, tokens = sent(y, k, torch.float64), make_tokens(4, vocab=60)
    ids = torch.cat([message.topk_ids, x.topk(k, -1).indices], -1)
    logprobs = y.log_softmax(-1).gather(-1, ids)
    alone, union, students = (
        cf.topk_stats(x, i, p, tokens, top_k=n, min_logprob=message.min_logprob, backend=backend)
        for i, p, n in ((*message[:2], None), (ids, logprobs, k), (ids[:, k:], logprobs[:, k:], 0))
    )
    truth = exact(x, y, tokens)
    for stats in (alone, union, students):
        assert_bounds(stats, truth)
    for name in ("reverse_kl", "forward_kl"):
        assert (getattr(union, name) >= getattr(alone, name) - 1e-12).all()
    assert (union.reverse_kl_upper <= alone.reverse_kl_upper + 1e-12).all()
    assert (union.student_mass >= alone.student_mass - 1e-12).all()


def test_the_union_halves_what_is_unknown_of_the_reverse_kl():
    """A student of its own mind: 8 tokens each, of 2000."""
    x, y = (make_logits(50, 2000, dtype=torch.float64, seed=i) for i in (0, 1))
    message, tokens = sent(y, 8, torch.float64), make_tokens(50, vocab=2000)
    ids = torch.cat([message.topk_ids, x.topk(8, -1).indices], -1)
    union = cf.topk_stats(x, ids, y.log_softmax(-1).gather(-1, ids), tokens, top_k=8, min_logprob=message.min_logprob)
    alone = cf.topk_stats(x, *message[:2], tokens, min_logprob=message.min_logprob)
    gap, wide = ((s.reverse_kl_upper - s.reverse_kl).mean() for s in (union, alone))
    assert gap < 0.6 * wide and union.reverse_kl.mean() > 1.5 * alone.reverse_kl.mean()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("student excludes", "no tail")])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_the_tightest_upper_bound_lies_between(kind, k):
    """The exact maximum over the teacher's tails is a bound, and no more than what one pass gives."""
    x, y = drawn(kind, 3, k=k)
    tokens, message = make_tokens(4, vocab=60), sent(y, k, torch.float64)
    tight = topk_reference.forward_kl_upper(x, *message[:2])
    stats = cf.topk_stats(x, *message[:2], tokens)
    assert (tight >= exact(x, y, tokens).forward_kl - 1e-9).all()
    assert (tight <= stats.forward_kl_upper + 1e-9).all()


def test_the_upper_bounds_are_reached():
    """F by a teacher that has c on W/c tokens of which the student has its least; R by one at its floor in the tail."""
    student = torch.tensor([0.4, 0.3, 0.26, 0.01, 0.01, 0.01, 0.01], dtype=torch.float64)
    teacher = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1, 0, 0], dtype=torch.float64)
    tokens = torch.tensor([0])
    stats = cf.topk_stats(student.log()[None], torch.tensor([[0, 1, 2]]), teacher[None, :3].log(), tokens)
    truth = exact(student.log()[None], teacher.log()[None], tokens)
    assert stats.forward_kl_upper.item() == pytest.approx(truth.forward_kl.item(), abs=1e-12)
    flat = torch.tensor([0.5, 0.2, 0.26, 0.01, 0.01, 0.01, 0.01], dtype=torch.float64)
    stats = cf.topk_stats(
        student.log()[None], torch.tensor([[0, 1, 2]]), flat[None, :3].log(), tokens, min_logprob=flat[-1:].log()
    )
    truth = exact(student.log()[None], flat.log()[None], tokens)
    assert stats.reverse_kl_upper.item() == pytest.approx(truth.reverse_kl.item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "heads", "sure"])
@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.float16, 0.2)])
def test_what_rounding_costs(kind, dtype, most):
    """The bucketed KL without rounding is above the lower bound by a little. At k = V the bounds nearly meet, and with
    ever more columns both come closer; a model beside itself has 0."""
    x, y = drawn(kind, 1)
    tokens = make_tokens(4, vocab=60)
    for k in (3, 20):
        message = sent(y, k, dtype)
        stats = cf.topk_stats(x, *message[:2], tokens)
        p, w = (torch.nn.functional.pad(t.softmax(-1).gather(-1, message.topk_ids), (0, 1)) for t in (x, y))
        p[:, -1], w[:, -1] = 1 - p.sum(-1), 1 - w.sum(-1)
        if kind != "sure":  # whose tail is no difference of masses
            bucketed = (w * (w / p).log()).sum(-1)
            assert (stats.forward_kl <= bucketed + 1e-9).all() and (stats.forward_kl >= bucketed - most).all()
        same = cf.topk_stats(y, *message[:2], tokens)
        assert (same.forward_kl <= 1e-9).all() and (same.reverse_kl <= 1e-9).all()
    whole = cf.topk_stats(x, *sent(y, 60, dtype)[:2], tokens)
    assert (whole.forward_kl_upper - whole.forward_kl <= most).all()
    assert (whole.reverse_kl_upper - whole.reverse_kl <= most).all()


@given(seed=st.integers(0, 2**31))
@settings(max_examples=5)
def test_more_columns_bring_the_bounds_together(seed):
    x, y = drawn("heads", seed)
    tokens = make_tokens(4, vocab=60)
    every = [cf.topk_stats(x, *(m := sent(y, k, torch.float64))[:2], tokens, min_logprob=m[2]) for k in range(1, 61)]
    for one, more in itertools.pairwise(every):
        for name in ("forward_kl", "reverse_kl"):
            assert (getattr(more, name) >= getattr(one, name) - 1e-9).all()
            assert (getattr(more, f"{name}_upper") <= getattr(one, f"{name}_upper") + 1e-9).all()


def test_a_student_that_hides_in_the_tail():
    """Nearly all of it on one token that the teacher does not list: the bucket sees its mass, and not where it is."""
    x, y = drawn("hides", 0)
    tokens, message = make_tokens(4, vocab=60), sent(y, 20, torch.float64)
    stats = cf.topk_stats(x, *message[:2], tokens, min_logprob=message.min_logprob)
    truth = exact(x, y, tokens)
    assert (stats.reverse_kl < 0.8 * truth.reverse_kl).all()
    assert (stats.reverse_kl_upper < 1.05 * truth.reverse_kl).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lowest", [-5.0, -torch.inf])
def test_a_teacher_that_lists_its_excluded_tokens_has_no_tail(backend, lowest):
    """The least of its k tokens has probability 0, and so has every other: the upper bound is that of the rest."""
    x = torch.tensor([[1.0, 0.5, 0.0, 0.2, -1.0, lowest]])
    logprobs = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log()
    stats = cf.topk_stats(x, torch.arange(4)[None], logprobs, torch.tensor([0]), backend=backend)
    listed = logprobs[:, :3].double()
    kl = (listed.exp() * (listed - x.double().log_softmax(-1)[:, :3])).sum(-1)
    assert (stats.forward_kl <= kl).all() and (kl <= stats.forward_kl_upper).all()
    torch.testing.assert_close(stats.forward_kl_upper.double(), kl, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_that_underflows_is_bounded_as_any_other(backend):
    """P = e^-900 is 0 in double; nothing bounds the reverse KL where the teacher may exclude a token."""
    x = torch.tensor([[1.0, 0.5, -900.0, -901.0]])
    message = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]).log(), torch.tensor([0])
    excluded = cf.topk_stats(x, *message, min_logprob=torch.tensor([-torch.inf]), backend=backend)
    assert excluded.reverse_kl_upper.isposinf().all() and excluded.reverse_kl.isfinite().all()
    assert cf.topk_stats(x, *message, min_logprob=-30.0, backend=backend).reverse_kl_upper.isfinite().all()


def test_a_cap_that_cannot_hold_the_tail_is_no_cap():
    """All ids are the student's choice: the teacher's tail of .9 is on three tokens, of which none has but .05."""
    logprobs = torch.tensor([[0.05, 0.05]]).log()
    arguments = torch.zeros(1, 5), torch.tensor([[0, 1]]), logprobs, torch.tensor([0])
    assert cf.topk_stats(*arguments).forward_kl_upper.isposinf().all()
    assert cf.topk_stats(*arguments, top_k=0).forward_kl_upper.isfinite().all()


@given(seed=st.integers(0, 2**31), k=st.sampled_from([1, 5, 20, 60]), budget=st.floats(0.0, 12.0))
@settings(max_examples=15)
def test_a_verdict_is_right(seed, k, budget):
    """No completion over budget is certified, and none within it refuted; the account is that of the exact costs."""
    x, y = drawn("heads", seed, rows=(3, 7), k=k)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed % 1000)) > 0.3
    tokens, message = make_tokens(3, 7, vocab=60), sent(y, k)
    stats = cf.topk_stats(x, *message[:2], tokens, mask=mask, min_logprob=message.min_logprob)
    truth = exact(x, y, tokens)
    for name, rule in itertools.product(
        ("forward_kl", "reverse_kl"),
        ({}, {"gamma": 0.9}, {"reduction": "mean"}, {"edge": "saute"}, {"per_token": True}),
    ):
        verdict = cf.budget_verdict(getattr(stats, name), getattr(stats, f"{name}_upper"), budget, mask=mask, **rule)
        violated = cf.budget_trace(getattr(truth, name), budget, mask=mask, **rule).violated.any(-1)
        assert not (verdict.certified & violated).any() and not (verdict.refuted & ~violated).any()
        assert not (verdict.certified & verdict.refuted).any()


def test_the_three_verdicts_packed_and_padded():
    lower, upper = torch.tensor([0.5, 0.5, 1.5, 0.6, 0.1]), torch.tensor([0.6, 0.3, 2.0, 2.0, 0.2])
    offsets = torch.tensor([0, 2, 4, 5, 5])
    verdict = cf.budget_verdict(lower, upper, 1.0, cu_seqlens=offsets)
    assert verdict.certified.tolist() == [True, False, True, True]
    assert verdict.refuted.tolist() == [False, True, False, False]
    assert not any(v.any() for v in cf.budget_verdict(torch.zeros(2, 1), torch.full((2, 1), 5.0), 1.0))


def test_a_nan_proves_nothing():
    nan = torch.full((1, 2), torch.nan)
    assert not any(v.any() for v in cf.budget_verdict(nan, nan, 1.0))
    with pytest.raises(ValueError, match=r"lower and upper must have one shape, got \[1, 2\] and \[1, 3\]"):
        cf.budget_verdict(nan, torch.zeros(1, 3), 1.0)

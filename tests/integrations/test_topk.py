"""Top-k and a tail bucket: never too much, how much too little at most, and the gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp_fast import reference
from cmdp_fast.integrations.topk import topk_divergence


def pair(seed: int, rows: int = 6, vocab: int = 12, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [rows, vocab] of a student and a teacher in float64, the likeliest of the teacher first."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    order = teacher.argsort(-1, descending=True)
    return student.gather(-1, order).log_softmax(-1), teacher.gather(-1, order).log_softmax(-1)


def exact(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    return reference.divergence(student, teacher, kind)


seeds = st.integers(0, 2**31)
widths = st.integers(1, 12)
scales = st.floats(0.01, 3.0)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@given(seed=seeds, k=widths, scale=scales)
@settings(max_examples=60, deadline=None)
def test_never_too_much_and_too_little_by_at_most_the_bound(kind: str, seed: int, k: int, scale: float) -> None:
    student, teacher = pair(seed, scale=scale)
    missed = exact(student, teacher, kind) - topk_divergence(student[:, :k], teacher[:, :k], kind)
    first = teacher if kind == "forward_kl" else student
    ratio = (teacher - student)[:, k:]
    spread = ratio.amax(-1) - ratio.amin(-1) if k < 12 else torch.zeros(6, dtype=torch.float64)
    bound = first[:, k:].exp().sum(-1) * torch.minimum(spread, spread**2 / 8)
    assert (missed >= -3e-6).all()  # rounding of a tail mass
    assert (missed <= bound + 3e-6).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@given(seed=seeds, k=st.integers(1, 11))
@settings(max_examples=30, deadline=None)
def test_what_is_missed_is_the_divergence_within_the_tail(kind: str, seed: int, k: int) -> None:
    student, teacher = pair(seed)
    first = teacher if kind == "forward_kl" else student
    within = exact(student[:, k:].log_softmax(-1), teacher[:, k:].log_softmax(-1), kind)
    whole = topk_divergence(student[:, :k], teacher[:, :k], kind) + first[:, k:].exp().sum(-1) * within
    assert torch.allclose(whole, exact(student, teacher, kind), atol=3e-6)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_more_tokens_split_the_bucket_until_nothing_is_missed(seed: int) -> None:
    student, teacher = pair(seed)
    values = torch.stack([topk_divergence(student[:, :k], teacher[:, :k]) for k in range(1, 13)])
    assert (values.diff(dim=0) >= -3e-6).all()
    assert torch.allclose(values[-1], exact(student, teacher, "forward_kl"), atol=3e-6)


def test_without_the_bucket_it_is_no_divergence() -> None:
    student, teacher = torch.tensor([0.9, 0.05, 0.05]).log(), torch.tensor([0.6, 0.2, 0.2]).log()
    assert (teacher[0].exp() * (teacher[0] - student[0])).item() < 0
    assert topk_divergence(student[:1], teacher[:1]).item() > 0


def test_the_bound_is_reached_by_the_log_sum_inequality_alone() -> None:
    """Equal ratios within the tail: nothing is missed although the tail is most of the mass."""
    student, teacher = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.2, 0.4, 0.4]).log()
    assert torch.allclose(topk_divergence(student[:1], teacher[:1]), exact(student, teacher, "forward_kl"))


def merged(logprob: torch.Tensor, k: int) -> torch.Tensor:
    return torch.cat([logprob[:, :k], logprob[:, k:].logsumexp(-1, keepdim=True)], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@given(seed=seeds, k=st.integers(1, 11), scale=scales, sure=st.tuples(*[st.sampled_from([0.0, 8.0, 15.0, 30.0])] * 2))
@settings(max_examples=100, deadline=None)
def test_rounded_log_probabilities_count_too_much_by_no_more_than_is_said(
    dtype: torch.dtype, kind: str, seed: int, k: int, scale: float, sure: tuple[float, float]
) -> None:
    """The module's two bounds, on distributions in float64 of which the function sees the rounded logarithms."""
    raised = torch.zeros(12, dtype=torch.float64)
    raised[0] = 1.0
    student, teacher = ((x + s * raised).log_softmax(-1) for x, s in zip(pair(seed, scale=scale), sure, strict=True))
    got = topk_divergence(student[:, :k].to(dtype), teacher[:, :k].to(dtype), kind).double()
    a, b = (merged(x, k) for x in ((teacher, student) if kind == "forward_kl" else (student, teacher)))
    eps = torch.finfo(dtype).eps
    a_error, b_error = (eps * (x.exp() * (-x).clamp(min=1.0))[:, :k].sum(-1) for x in (a, b))
    second = torch.cat([b[:, :k], (b[:, k].exp() + 2 * b_error).log()[:, None]], -1)
    first = torch.cat([a[:, :k], torch.maximum(a[:, k], a_error.log())[:, None]], -1)
    largest = torch.stack([(first - other).abs().amax(-1) for other in (b, second)]).amax(0)
    bound = 3 * (1 + largest) * a_error + eps * (a.exp() * (-b).clamp(min=1.0))[:, :k].sum(-1)
    more = got - exact(*((b, a) if kind == "forward_kl" else (a, b)), kind)
    assert (more <= bound * (1 + 8 * eps) + 1e-7 * got).all()  # the result is float32
    assert (
        -more <= bound * (1 + 8 * eps) + a[:, k].exp() * torch.log1p(2 * b_error / b[:, k].exp()) + 1e-7 * got
    ).all()


def test_a_tail_of_rounding_alone_is_counted_low() -> None:
    """KL 2.0349: the student's tail of 2e-7 is known to 1.3e-7 in float32, to the last digit in float64."""
    teacher, student = torch.tensor([0.45, 0.4, 0.15]), torch.tensor([0.2559, 0.7441, 2e-7], dtype=torch.float64)
    student, teacher = (student / student.sum()).log(), teacher.double().log()
    low = topk_divergence(student[:2].float(), teacher[:2].float()).item()
    assert 2.0348975 - 0.15 * math.log(1 + 2.6e-7 / 2e-7) < low < 2.0348975
    assert topk_divergence(student[:2], teacher[:2]).item() == pytest.approx(2.0348975, abs=1e-7)
    nearly = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(topk_divergence(nearly.log_softmax(-1)[:2], teacher[:2]), nearly)
    assert torch.allclose(gradient, student.exp() - teacher.exp(), atol=1e-7)


def test_a_tail_below_rounding_keeps_a_gradient() -> None:
    """Not -.3 as from logits: smaller by the factor that the upper bound of the tail is above it."""
    logits = torch.tensor([0.4, 0.6, 1e-8]).log().requires_grad_()
    logprob = logits.log_softmax(-1)[:2]
    value = topk_divergence(logprob, torch.tensor([0.4, 0.3]).log())
    (gradient,) = torch.autograd.grad(value, logits)
    assert -0.3 < gradient[2].item() < -0.3 * 1e-8 / 4e-7


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_log_probabilities_are_worth_nothing(kind: str, dtype: torch.dtype) -> None:
    student, _ = pair(5, rows=50)
    same = student[:, :4].to(dtype).requires_grad_()
    value = topk_divergence(same, same.detach(), kind)
    assert not value.any() and torch.autograd.grad(value.sum(), same)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_all_the_mass_is_listed(kind: str) -> None:
    """k = V, or the rest is -inf: nothing is left for a tail, and rounding makes none of it up."""
    student, teacher = pair(6)
    for columns in (slice(None), slice(0, 3)):
        one, other = (x[:, columns].log_softmax(-1) for x in (student, teacher))
        got = topk_divergence(one.float(), other.float(), kind)
        assert torch.allclose(got.double(), exact(one, other, kind), atol=3e-6)
    certain = torch.tensor([[0.0, -torch.inf]])
    assert topk_divergence(certain, certain, kind).item() == 0.0
    assert topk_divergence(torch.tensor([[-1.0, -torch.inf]]), torch.tensor([[-1.0, -2.0]])).item() == torch.inf


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_gradient_is_that_of_the_merged_distributions(kind: str) -> None:
    student, teacher = pair(3)
    logits = student.clone().requires_grad_()
    merged = logits.log_softmax(-1)
    merged = torch.cat([merged[:, :4], merged[:, 4:].logsumexp(-1, keepdim=True)], -1)
    merged_teacher = torch.cat([teacher[:, :4], teacher[:, 4:].logsumexp(-1, keepdim=True)], -1)
    (expected,) = torch.autograd.grad(exact(merged, merged_teacher, kind).sum(), logits)
    (gradient,) = torch.autograd.grad(
        topk_divergence(logits.log_softmax(-1)[:, :4], teacher[:, :4], kind).sum(), logits
    )
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_all_the_mass_in_the_k_tokens_is_finite_and_has_a_gradient() -> None:
    logits = torch.tensor([30.0, 0.0, -30.0], requires_grad=True)
    value = topk_divergence(logits.log_softmax(-1)[:2], torch.tensor([0.5, 0.5]).log())
    (gradient,) = torch.autograd.grad(value, logits)
    assert math.isfinite(value.item()) and gradient.isfinite().all() and gradient.any()


def test_half_precision_is_computed_in_float32_and_the_teacher_gets_no_gradient() -> None:
    student, teacher = (x.bfloat16().requires_grad_() for x in pair(1))
    value = topk_divergence(student[:, :3], teacher[:, :3])
    value.sum().backward()
    assert value.dtype == torch.float32 and student.grad is not None and teacher.grad is None


@pytest.mark.parametrize(
    ("shape", "kind", "message"), [((2, 3), "jsd", "kind='jsd'"), ((2, 2), "forward_kl", r"\(2, 2\) and \(2, 3\)")]
)
def test_says_what_is_wrong(shape: tuple[int, int], kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_divergence(torch.zeros(shape), torch.zeros(2, 3), kind)

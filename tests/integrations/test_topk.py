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

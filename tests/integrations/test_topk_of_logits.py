"""The student's tail summed over its own columns: exact at any size, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp_fast import reference
from cmdp_fast.integrations import topk
from cmdp_fast.integrations.topk import topk_divergence, topk_divergence_of_logits

KINDS = ["forward_kl", "reverse_kl"]


def drawn(seed: int, rows: int = 5, vocab: int = 40, sure: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, vocab] in float64 of a student and a teacher; `sure` raises one column for both."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    student[:, 3] += sure
    teacher[:, 3] += sure
    return student, teacher


def message(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's k log-probabilities and ids."""
    values, ids = teacher.log_softmax(-1).topk(k, -1)
    return values, ids


def merged(student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, kind: str) -> torch.Tensor:
    """The reference on the distributions whose columns outside `ids` are one, in float64."""
    parts = []
    for logits in (student.double(), teacher.double()):
        logprob = logits.log_softmax(-1)
        others = logprob.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        parts.append(torch.cat([logprob.gather(-1, ids), others], -1))
    return reference.divergence(*parts, kind)


def test_the_tail_of_a_sure_student() -> None:
    """KL 2.0349 of w = .45 .4 .15 and p = .2559 .7441 2e-7, and p - w."""
    teacher, student = torch.tensor([0.45, 0.4, 0.15]), torch.tensor([0.2559, 0.7441, 2e-7], dtype=torch.float64)
    logits = student.log().float().requires_grad_()
    value = topk_divergence_of_logits(logits, teacher.log()[:2], torch.tensor([0, 1])).divergence
    (gradient,) = torch.autograd.grad(value, logits)
    exact = teacher.double() * (teacher.double() / (student / student.sum())).log()
    assert value.item() == pytest.approx(exact.sum().item(), abs=1e-6) == pytest.approx(2.0348975, abs=1e-6)
    assert torch.allclose(gradient.double(), student / student.sum() - teacher.double(), atol=1e-6)


@pytest.mark.parametrize("tail", [1e-6, 1e-7, 1e-8, 1e-30])
def test_the_gradient_of_a_tail_is_not_lost(tail: float) -> None:
    teacher = torch.tensor([0.4, 0.3, 0.3])
    logits = torch.tensor([0.4 * (1 - tail), 0.6 * (1 - tail), tail]).log().requires_grad_()
    value = topk_divergence_of_logits(logits, teacher.log()[:2], torch.tensor([0, 1])).divergence
    (gradient,) = torch.autograd.grad(value, logits)
    exact = 0.3 * math.log(0.3 / 0.6) + 0.3 * math.log(0.3 / tail)
    assert value.item() == pytest.approx(exact, rel=1e-6)
    assert gradient.tolist() == pytest.approx([0.0, 0.3, -0.3], abs=2 * tail + 2e-7)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 40), sure=st.sampled_from([0.0, 12.0, 22.0, 60.0]))
@settings(max_examples=80, deadline=None)
def test_value_and_gradient_are_those_of_the_merged_distributions(kind: str, seed: int, k: int, sure: float) -> None:
    """In float64, where both are exact; and in float32 as far as the log-probabilities of the message allow."""
    student, teacher = drawn(seed, sure=sure)
    values, ids = message(teacher, k)
    weight = torch.linspace(0.5, 2.0, len(student), dtype=torch.float64)
    theirs = student.clone().requires_grad_()
    expected = merged(theirs, teacher, ids, kind)
    (right,) = torch.autograd.grad((expected * weight).sum(), theirs)
    for dtype in (torch.float64, torch.float32):
        ours = student.to(dtype).requires_grad_()
        got = topk_divergence_of_logits(ours, values.to(dtype), ids, kind)
        (gradient,) = torch.autograd.grad((got.divergence * weight).sum(), ours)
        eps = torch.finfo(dtype).eps
        small = 40 * eps * (3 + sure)  # 3 (1 + L) of the teacher's masses, L up to 10 + sure
        # the tail of the reverse KL's second distribution counts as its upper bound
        outside = teacher.softmax(-1).scatter(-1, ids, 0.0).sum(-1)
        known = (kind == "forward_kl") | (outside > 1e5 * eps) | (k == 40)
        if dtype == torch.float32:  # of which the reference is free of error
            assert (got.divergence <= expected + small).all()
        assert torch.allclose(got.divergence.double()[known], expected[known], atol=small, rtol=1e-4)
        assert torch.allclose(gradient.double()[known], right[known], atol=small, rtol=1e-4)
        inside = student.softmax(-1).gather(-1, ids).sum(-1)
        assert torch.allclose(got.student_mass.double(), inside, atol=small)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_gradcheck(kind: str, k: int) -> None:
    student, teacher = drawn(0, rows=4, vocab=6)
    values, ids = message(teacher, k)

    def divergence(logits: torch.Tensor) -> torch.Tensor:
        return topk_divergence_of_logits(
            logits.reshape(2, 2, 6), values.reshape(2, 2, k), ids.reshape(2, 2, k), kind, 0.7
        )[0]

    assert torch.autograd.gradcheck(divergence, student.requires_grad_())
    logprob = student.detach().log_softmax(-1)[:, : min(k, 5)].requires_grad_()  # of all columns none can move alone
    assert torch.autograd.gradcheck(
        lambda x: topk_divergence(x, teacher.log_softmax(-1)[:, : min(k, 5)], kind), logprob
    )


def test_half_precision_logits_are_exact_and_their_gradient_is_rounded_once() -> None:
    student, teacher = drawn(1, rows=200, sure=14.0)
    values, ids = message(teacher.float(), 8)
    half = student.bfloat16().requires_grad_()
    got = topk_divergence_of_logits(half, values, ids).divergence
    single = half.detach().float().requires_grad_()
    assert torch.equal(got, topk_divergence_of_logits(single, values, ids).divergence)
    assert torch.allclose(got.double(), merged(half.detach(), teacher, ids, "forward_kl"), atol=3e-6)
    gradients = [
        torch.autograd.grad(topk_divergence_of_logits(x, values, ids).divergence.sum(), x)[0] for x in (half, single)
    ]
    assert torch.equal(gradients[0], gradients[1].bfloat16())


def test_temperature_divides_the_students_logits() -> None:
    student, teacher = drawn(2)
    values, ids = message(teacher / 0.5, 5)
    got = topk_divergence_of_logits(student, values, ids, temperature=0.5).divergence
    assert torch.allclose(got, merged(student / 0.5, teacher / 0.5, ids, "forward_kl"), atol=1e-12)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_a_constant_added_to_the_logits_changes_nothing(offset: float) -> None:
    """1e4 in float32 leaves quarters of a thousandth: the logits are such that both are exact."""
    student, teacher = drawn(3, sure=12.0)
    student = (student * 256).round() / 256
    values, ids = message(teacher, 4)
    got, moved = (topk_divergence_of_logits(x.float(), values.float(), ids) for x in (student, student + offset))
    assert torch.allclose(got.divergence, moved.divergence, atol=1e-6, rtol=0)


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = drawn(4, rows=9)
    values, ids = message(teacher.float(), 4)
    results = []
    for piece in (1 << 24, 80, 1):
        monkeypatch.setattr(topk, "PIECE", piece)
        logits = student.float().requires_grad_()
        value = topk_divergence_of_logits(logits, values, ids).divergence
        results.append((value.detach(), torch.autograd.grad(value.sum(), logits)[0]))
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(gradient, results[0][1])


# ------------------------------------------------------------------------------------------------ special values


def test_all_columns_listed_is_the_divergence_itself() -> None:
    student, teacher = drawn(5, vocab=7)
    for dtype in (torch.float32, torch.float64):
        values, ids = message(teacher.to(dtype), 7)
        for kind in KINDS:
            got = topk_divergence_of_logits(student.to(dtype), values, ids, kind)
            assert torch.allclose(got.divergence.double(), reference.divergence(student, teacher, kind), atol=3e-6)
            assert torch.allclose(got.student_mass.double(), torch.ones(5, dtype=torch.float64), atol=1e-6)


def test_a_tail_without_mass() -> None:
    """The student's: infinite if the teacher has one, of which p - w is the gradient; else the k tokens are all."""
    logits = torch.tensor([[1.0, 0.0, -torch.inf, -torch.inf]] * 2).requires_grad_()
    teacher = torch.tensor([[0.5, 0.25], [0.5, 0.5]])
    ids = torch.tensor([[0, 1], [0, 1]])
    value = topk_divergence_of_logits(logits, teacher.log(), ids).divergence
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    p = torch.tensor([1.0, 0.0]).softmax(-1)
    assert value[0] == torch.inf and value[1].item() == pytest.approx(
        (teacher[1] * (teacher[1] / p).log()).sum().item()
    )
    assert torch.allclose(gradient[:, :2], p - teacher, atol=1e-6) and not gradient[:, 2:].any()
    reverse = topk_divergence_of_logits(logits, teacher.log(), ids, "reverse_kl").divergence
    assert torch.allclose(reverse, (p * (p / teacher).log()).sum(-1), atol=1e-6)
    assert torch.autograd.grad(reverse.sum(), logits)[0].isfinite().all()


def test_tokens_without_mass() -> None:
    """-inf for both is nothing; for the student alone infinite with the gradient p - w; for the teacher alone its
    reverse KL is infinite and passes no gradient."""
    x = torch.tensor([[0.0, 1.0, -torch.inf, 0.5], [0.0, -torch.inf, 1.0, 0.5], [0.0, 1.0, 2.0, 0.5]])
    teacher = torch.tensor([[0.5, 0.4, 0.0], [0.5, 0.4, 0.1], [0.5, 0.4, 0.0]])
    ids = torch.tensor([[0, 1, 2]] * 3)
    logits = x.clone().requires_grad_()
    value = topk_divergence_of_logits(logits, teacher.log(), ids).divergence
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isinf().tolist() == [False, True, False]
    assert torch.allclose(gradient[:, :3], x.softmax(-1)[:, :3] - teacher, atol=1e-6)
    reverse = topk_divergence_of_logits(logits, teacher.log(), ids, "reverse_kl").divergence
    (gradient,) = torch.autograd.grad(reverse.sum(), logits)
    assert reverse.isinf().tolist() == [False, False, True]
    assert gradient.isfinite().all() and not gradient[2].any() and gradient[:2].any()
    logprob = x.log_softmax(-1)[:, :3].requires_grad_()
    again = topk_divergence(logprob, teacher.log(), "reverse_kl")
    (gradient,) = torch.autograd.grad(again.sum(), logprob)
    assert again.isinf().tolist() == [False, False, True] and gradient.isfinite().all() and not gradient[2].any()


def test_a_nan_stays_in_its_row_and_a_row_without_a_gradient_passes_none() -> None:
    student, teacher = drawn(6)
    values, ids = message(teacher, 4)
    broken = student.clone()
    broken[1, 7] = torch.nan
    broken[2, 0] = torch.inf
    broken.requires_grad_()
    value = topk_divergence_of_logits(broken, values, ids).divergence
    assert value.isnan().tolist() == [False, True, True, False, False]
    upstream = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(value, broken, upstream)
    assert gradient.isfinite().all() and gradient.any(1).tolist() == [True, False, False, True, False]


def test_an_id_that_stands_again_is_absent_there() -> None:
    student, teacher = drawn(7, rows=2)
    values, ids = message(teacher, 3)
    padded_ids = torch.cat([ids, ids[:, 1:2], ids[:, :1]], -1)
    padded = torch.cat([values, values.new_zeros(2, 2)], -1)
    x, y = (student.clone().requires_grad_() for _ in range(2))
    once, twice = topk_divergence_of_logits(x, values, ids), topk_divergence_of_logits(y, padded, padded_ids)
    for one, other in zip(once, twice, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    assert torch.allclose(
        torch.autograd.grad(once.divergence.sum(), x)[0], torch.autograd.grad(twice.divergence.sum(), y)[0]
    )
    filler = topk_divergence_of_logits(student, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32))
    assert torch.allclose(filler.divergence, -student.log_softmax(-1)[:, 0]) and (filler.teacher_mass == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_outside_the_students_vocabulary_is_a_part_of_the_tail(kind: str) -> None:
    """The teacher's vocabulary is wider by three columns, one of which is likely, or all that it sends."""
    student, wide = drawn(8, rows=3, vocab=10)
    student = student[:, :7]
    ids = torch.tensor([[8, 1, 2], [0, 6, -1], [7, 8, 9]])
    logprob = wide.log_softmax(-1).gather(-1, ids % 10)
    x = student.clone().requires_grad_()
    got = topk_divergence_of_logits(x, logprob, ids, kind).divergence
    for row, inside in enumerate(([1, 2], [0, 6], [])):
        y = student[row].clone().requires_grad_()
        listed = torch.tensor(inside, dtype=torch.long)
        alone = topk_divergence_of_logits(y, wide.log_softmax(-1)[row, listed], listed, kind).divergence
        assert torch.allclose(got[row], alone, atol=1e-12)
        one, other = torch.autograd.grad(got[row], x, retain_graph=True)[0][row], torch.autograd.grad(alone, y)[0]
        assert torch.allclose(one, other, atol=1e-12) and torch.isfinite(one).all()


@pytest.mark.parametrize(("rows", "k"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_compare(rows: int, k: int) -> None:
    logits = torch.randn(2, rows, 9, requires_grad=True)
    ids, values = torch.zeros(2, rows, k, dtype=torch.long), torch.zeros(2, rows, k)
    got = topk_divergence_of_logits(logits, values, ids)
    assert got.divergence.shape == (2, rows) and not got.divergence.any()
    (gradient,) = torch.autograd.grad(got.divergence.sum(), logits)
    assert gradient.shape == logits.shape and not gradient.any()
    assert topk_divergence(values, values).shape == (2, rows)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "jsd"}, ValueError, "kind='jsd'"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"teacher_ids": torch.zeros(2, 3, dtype=torch.long)}, ValueError, r"teacher_ids has shape \(2, 3\)"),
        ({"teacher_ids": torch.zeros(2, 2)}, TypeError, "teacher_ids has dtype torch.float32"),
        ({"student_logits": torch.zeros(3, 9)}, ValueError, r"student_logits has shape \(3, 9\), expected \[2, V\]"),
        ({"student_logits": torch.zeros(2, 0)}, ValueError, r"student_logits has shape \(2, 0\), expected \[2, V\]"),
        ({"student_logits": torch.zeros(2, 9, dtype=torch.long)}, TypeError, "student_logits has dtype torch.int64"),
        ({"teacher_logprob": torch.zeros(2, 2, dtype=torch.long)}, TypeError, "teacher_logprob has dtype torch.int64"),
    ],
)
def test_says_what_is_wrong(change: dict, error: type[Exception], message: str) -> None:
    right = {
        "student_logits": torch.zeros(2, 9),
        "teacher_logprob": torch.full((2, 2), -1.0),
        "teacher_ids": torch.tensor([[0, 1], [1, 2]]),
    }
    with pytest.raises(error, match=message):
        topk_divergence_of_logits(**(right | change))

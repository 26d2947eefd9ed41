"""What random cases have found, each as small as it gets."""

import math

import pytest
import torch
from topk_inputs import given

import cmdp_fast as cf
from cmdp_fast import reference, topk_reference

LOWEST = torch.finfo(torch.float32).min
NAMES = [name for name in ("torch", "cpu") if cf.available_backends()[name] is None]
backends = pytest.mark.parametrize("name", NAMES)


@backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_narrow_tokens_of_a_wide_vocabulary(dtype: torch.dtype, name: str) -> None:
    """They were compared with a bound that their type cannot hold: NaN."""
    student, message, tokens = given(3, vocab=40_000)
    tokens = torch.full_like(tokens, 99)  # more than 40,000 is in 8 bits
    narrow = cf.topk_stats(student, *message[:2], tokens.to(dtype), backend=name)
    assert torch.equal(narrow.logprob, cf.topk_stats(student, *message[:2], tokens, backend=name).logprob)


@backends
def test_a_listed_token_that_the_student_masks_with_the_lowest_number(name: str) -> None:
    """Nothing times the growth of an infinite rounding was NaN."""
    student, message, tokens = given(3, vocab=60)
    student.scatter_(-1, message.topk_ids[:, :1], LOWEST)
    stats = cf.topk_stats(student, *message[:2], tokens, min_logprob=message.min_logprob, backend=name)
    assert stats.reverse_kl.isfinite().all() and stats.reverse_kl_upper.isfinite().all()


@backends
def test_a_teacher_that_sends_the_lowest_number(name: str) -> None:
    student, message, tokens = given(3, vocab=60)
    low = message.topk_logprobs.bfloat16()
    low[:, -1] = -131072.0
    stats = cf.topk_stats(student, message.topk_ids, low, tokens, backend=name)
    assert not any(value.isnan().any() for value in stats)


@backends
def test_a_tail_that_is_the_lowest_number_throughout(name: str) -> None:
    """As top-k sampling leaves it. Listed logits relative to it were all alike."""
    student, message, tokens = given(3, vocab=60)
    kept = torch.full_like(student, LOWEST).scatter(-1, message.topk_ids, student.gather(-1, message.topk_ids))
    stats = cf.topk_stats(kept, *message[:2], tokens, backend=name)
    listed = student.gather(-1, message.topk_ids).double().softmax(-1)
    assert torch.allclose(stats.entropy.double(), -(listed * listed.log()).sum(-1), atol=1e-5)


def test_the_reference_tells_the_columns_of_a_tail_far_below_apart() -> None:
    x = torch.tensor([[1e4, -1e4, 1e4 - 1, -LOWEST]], dtype=torch.float64, requires_grad=True)
    ids, logprobs = torch.tensor([[0, 3]]), torch.tensor([[-1.6, -0.9]])
    stats = topk_reference.topk_stats(x, ids, logprobs, torch.tensor([3]))
    (gradient,) = torch.autograd.grad(stats.forward_kl.sum(), x)
    assert gradient[0, 1] == 0 and gradient[0, 2] < -0.3
    nothing = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    assert topk_reference.topk_stats(nothing, torch.tensor([[0, 2]]), logprobs, torch.tensor([0])).entropy.isfinite()


def test_a_penalty_is_a_float64() -> None:
    """In the reference a number times a bool was float32."""
    cost = torch.ones(1, 2, dtype=torch.float64)
    trace = reference.budget_trace(cost, 0.0)
    assert reference.modified_reward(0 * cost, cost, trace, kind="saute", penalty=0.3).tolist() == [[-0.3, -0.3]]


def test_wrong_input_is_named() -> None:
    cost = torch.ones(1, 2)
    trace = cf.budget_trace(cost, 1.0)
    with pytest.raises(TypeError, match="lower must be a tensor, got list"):
        cf.budget_verdict([1.0], cost, 1.0)
    with pytest.raises(TypeError, match=r"trace\.violated must be a tensor, got str"):
        cf.modified_reward(cost, cost, trace._replace(violated="all"))
    with pytest.raises(TypeError, match="task_reward must be real, got complex64"):
        cf.modified_reward(cost.to(torch.complex64), cost, trace)
    assert math.isfinite(cf.modified_reward(cost, cost, trace).sum())

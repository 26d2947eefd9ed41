"""What random cases have found, each as small as it gets."""

import math

import pytest
import torch
from fuzzing import running
from topk_inputs import given

import cmdp_fast as cf
from cmdp_fast import cpu, reference, topk_reference

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


@backends
def test_tiles_of_a_state_far_from_0(name: str) -> None:
    """The second tile took the first one's reference, rounded to float32: 5e12 off. The log-probability was .9 off."""
    x = torch.full((1, 127), -1e20)
    state = cf.TokenState.empty(1, temperature=1.3)
    for tile in (slice(0, 52), slice(52, 127)):
        state.update(x[:, tile], x[:, tile], torch.zeros(1, dtype=torch.int64), first_column=tile.start, backend=name)
    stats = state.finish()
    assert abs(float(stats.logprob) + math.log(127)) < 1e-6 and abs(float(stats.entropy) - math.log(127)) < 1e-6


@backends
def test_float64_logits_are_divided(name: str) -> None:
    """Times 1/temperature they were off by 1e-7, and so was what was made of them."""
    x = 1e9 + torch.linspace(-3, 3, 129, dtype=torch.float64).expand(2, 129)
    y, tokens = x.flip(-1), torch.tensor([0, 64])
    x = x.clone().requires_grad_()
    settings = {"temperature": 1.3, "mask": torch.tensor([True, True])}
    ours, exact = (
        cf.token_stats(x, y, tokens, backend=name, **settings),
        reference.token_stats(x, y, tokens, **settings),
    )
    for mine, right in zip(ours, exact, strict=True):
        assert torch.allclose(mine, right, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(stats.reverse_kl.sum(), x)[0] for stats in (ours, exact)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", running.variants() if cpu.native is not None else [])
def test_the_gradient_of_a_teacher_that_masks_with_the_lowest_number(variant: str) -> None:
    """AVX-512 came to it with floats, and took every logit below -1e30 for that."""
    x, y = torch.zeros(1, 64, requires_grad=True), torch.zeros(1, 64)
    y[0, 0] = LOWEST / 2
    with running.variant(variant):
        stats = cf.token_stats(x, y, torch.tensor([63]), temperature=2.0, backend="cpu")
        (gradient,) = torch.autograd.grad(stats.reverse_kl.sum(), x)
    masked = -LOWEST / 4  # nats
    assert torch.allclose(stats.reverse_kl, torch.tensor([masked / 64]), rtol=1e-6)
    expected = torch.full((64,), -masked / 64 / 64 / 2).index_fill(0, torch.tensor(0), masked * (63 / 64) / 64 / 2)
    assert torch.allclose(gradient[0], expected, rtol=1e-5)


def test_models_of_one_column_far_from_0(backend: str) -> None:
    """A float32 reference of 1e9 octaves is rounded by up to 32, of which a GPU's sums lost digits."""
    x = torch.tensor([[1e9 + 64 * i] for i in range(20)])
    y = torch.full((20, 1), 1004.0)
    stats = cf.token_stats(x, y, torch.zeros(20, dtype=torch.int64), temperature=0.7, backend=backend)
    assert all(float(value.abs().max()) < 3e-7 for value in stats)


def test_a_tail_far_from_0(backend: str) -> None:
    x = (1e9 + (torch.arange(1000) % 11)).repeat(2, 1)
    nothing, tokens = torch.full((2, 1), -1), torch.zeros(2, dtype=torch.int64)
    stats = cf.topk_stats(x, nothing, torch.full((2, 1), -torch.inf), tokens, temperature=0.7, backend=backend)
    assert torch.allclose(stats.entropy, torch.tensor(math.log(1000)), rtol=0, atol=3e-6)


@pytest.mark.parametrize("variant", running.variants() if cpu.native is not None else [])
def test_small_columns_of_a_mixture_beside_leading_ones(variant: str) -> None:
    """A lane that had a leading column added up to 263 more to it, each of which was rounded off: 4e-6 in all."""
    x, y = torch.full((1, 4224), -17.1), torch.full((1, 4224), -40.0)
    x[0, :16] = y[0, -16:] = 0.0
    with running.variant(variant):
        ours = cf.divergence(x, y, "jsd", backend="cpu")
    assert abs(float(ours) - float(reference.divergence(x.double(), y.double(), "jsd"))) < 8e-7


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_weighs_nothing_adds_nothing_however_far_away(dtype: torch.dtype, name: str) -> None:
    """A difference of two logits that no float holds was taken for an excluded column, by the truth, too."""
    most = torch.finfo(dtype).max
    far, near = torch.tensor([[most, 0.0, -most]], dtype=dtype), torch.tensor([[1e4, 0.0, 0.0]], dtype=dtype)
    for x, y in ((near, far), (far, near)):
        stats = cf.token_stats(x, y, torch.tensor([0]), backend=name)
        assert stats.reverse_kl == 0 and stats.forward_kl == 0


@backends
def test_a_float64_logit_whose_quotient_no_float_holds_is_excluded(name: str) -> None:
    """The truth had one more finite number below the others than the states, which hold quotients."""
    x, y = torch.tensor([[-1.7e308, 0.0, 1.0]], dtype=torch.float64), torch.zeros(1, 3)
    state = cf.TokenState.empty(1, temperature=0.7).update(x, y, torch.tensor([1]), backend=name)
    for stats in (state.finish(), cf.token_stats(x, y, torch.tensor([1]), temperature=0.7, backend=name)):
        assert stats.forward_kl == torch.inf and stats.reverse_kl.isfinite() and stats.entropy.isfinite()

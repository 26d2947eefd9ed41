"""Advantages: group baselines, generalised advantage estimation, and the number that they were divided by."""

from __future__ import annotations

import math

import pytest
import torch
from exact import vectors

from cmdp_fast import objective
from cmdp_fast.constraint import Constraint

EXAMPLE = vectors("worked_example")


def test_group_advantages_of_the_vectors() -> None:
    data = EXAMPLE["group_advantages"]
    returns = torch.tensor(data["returns"], dtype=torch.float64)
    two_groups = torch.cat([returns, 10 - returns])
    advantage, scale = objective.grpo(two_groups, 4, eps=0.0)
    expected = torch.tensor(data["grpo_eps0"], dtype=torch.float64)
    torch.testing.assert_close(advantage, torch.cat([expected, -expected]), rtol=0, atol=1e-8)
    torch.testing.assert_close(scale, returns.std().expand(8))
    expected = torch.tensor(data["rloo"], dtype=torch.float64)
    torch.testing.assert_close(objective.rloo(two_groups, 4), torch.cat([expected, -expected]), rtol=0, atol=1e-12)
    assert torch.equal(objective.grpo(two_groups, 4).scale, scale + 1e-4)


def test_two_valued_group_is_indifferent_to_the_penalty_only_after_normalisation() -> None:
    small, large = (torch.tensor([1.0, 1.0, 1.0, -n], dtype=torch.float64) for n in (0.5, 50.0))
    torch.testing.assert_close(objective.grpo(small, 4, eps=0.0).advantage, objective.grpo(large, 4, eps=0.0).advantage)
    ratio = objective.rloo(large, 4) / objective.rloo(small, 4)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 51.0 / 1.5))


def test_equal_returns_leave_the_direct_term_alone() -> None:
    returns = torch.full((4,), -1.75)
    advantage, scale = objective.grpo(returns, 4)
    assert not advantage.any() and not objective.rloo(returns, 4).any()
    torch.testing.assert_close(scale, torch.full((4,), 1e-4))


def test_position_rloo_counts_a_finished_sample_as_zero() -> None:
    score = torch.tensor([[4.0, 2.0, 6.0], [1.0, 5.0, math.nan], [1.0, math.nan, math.nan]])
    mask = ~score.isnan()
    expected = torch.tensor([[3.0, -0.5, 6.0], [-1.5, 4.0, 0.0], [-1.5, 0.0, 0.0]])
    torch.testing.assert_close(objective.position_rloo(score, 3, mask), expected)
    other_group = torch.cat([score, 0 * score + 7])
    both = objective.position_rloo(other_group, 3, mask.repeat(2, 1))
    torch.testing.assert_close(both[:3], expected)
    single = torch.randn(6, 1)
    torch.testing.assert_close(objective.position_rloo(single, 3)[:, 0], objective.rloo(single[:, 0], 3))


@pytest.mark.parametrize("group_size", [1, 0, -2, 3])
def test_group_size_must_divide(group_size: int) -> None:
    for function in (objective.grpo, objective.rloo):
        with pytest.raises(ValueError, match=f"group_size={group_size}"):
            function(torch.zeros(4), group_size)
    with pytest.raises(ValueError, match=f"group_size={group_size}"):
        objective.position_rloo(torch.zeros(4, 2), group_size)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_gae_matches_the_recurrence(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(1)
    reward, value = torch.randn(2, 4, 50, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 50, generator=generator) < 0.8
    expected = torch.zeros_like(reward)
    following_advantage = following_value = torch.zeros(4, dtype=torch.float64)
    for t in reversed(range(50)):
        delta = reward[:, t] + gamma * following_value - value[:, t]
        advantage = delta + gamma * lam * following_advantage
        following_advantage = torch.where(mask[:, t], advantage, following_advantage)
        following_value = torch.where(mask[:, t], value[:, t], following_value)
        expected[:, t] = torch.where(mask[:, t], advantage, 0.0)
    noisy = torch.where(mask, reward, torch.nan), torch.where(mask, value, torch.nan)
    advantage, target = objective.gae(*noisy, mask=mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantage, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(target, torch.where(mask, expected + value, 0.0), rtol=0, atol=1e-12)
    if lam == 1.0:  # the target is then the return itself
        torch.testing.assert_close(target, objective.returns_to_go(reward, mask=mask, gamma=gamma))


def test_gae_of_sequences_that_would_go_on() -> None:
    """V_{T+1} is as a last token that is worth it and pays it: such a one has no advantage of its own."""
    generator = torch.Generator().manual_seed(3)
    reward, value = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    beyond = torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64)
    longer = (torch.cat([each, beyond[:, None]], 1) for each in (reward, value))
    all_real = torch.cat([mask, torch.ones(3, 1, dtype=torch.bool)], 1)
    expected, _ = objective.gae(*longer, mask=all_real, gamma=0.9, lam=0.8)
    advantage, target = objective.gae(reward, value, mask=mask, gamma=0.9, lam=0.8, beyond=beyond)
    torch.testing.assert_close(advantage, expected[:, :-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(target, torch.where(mask, advantage + value, 0.0))
    ended, _ = objective.gae(reward, value, mask=mask, gamma=0.9, lam=0.8)
    assert torch.equal(ended[2], advantage[2]) and not torch.equal(ended[0], advantage[0])
    with pytest.raises(ValueError, match=r"beyond has shape \(2,\), expected \(3,\)"):
        objective.gae(reward, value, beyond=beyond[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_divides_by_a_number_that_the_direct_term_can_share(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    advantage, _ = objective.gae(*torch.randn(2, 4, 50, dtype=dtype, generator=generator))
    mask = torch.rand(4, 50, generator=generator) < 0.7
    real = advantage[mask].double()
    white, scale = objective.whiten(torch.where(mask, advantage, torch.nan), mask=mask)
    expected = (real - real.mean()) / torch.sqrt(real.var() + 1e-8)  # as PPO in TRL and verl
    assert white.dtype == dtype and scale.shape == () and not white[~mask].any()
    torch.testing.assert_close(white[mask].double(), expected, rtol=0, atol=50 * torch.finfo(dtype).eps)
    assert scale.item() == pytest.approx(torch.sqrt(real.var() + 1e-8).item(), rel=1e-6)
    assert not torch.allclose(advantage.std(), torch.ones((), dtype=dtype), atol=0.1)  # `gae` alone whitens nothing
    for count in (0, 1):  # no spread to divide by
        few = torch.arange(200).reshape(4, 50) < count
        white, scale = objective.whiten(advantage, mask=few)
        assert not white.any() and scale == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_but_not_computed_in(dtype: torch.dtype) -> None:
    """Squares above 65,504 and an epsilon below 6e-8 are no float16."""
    generator = torch.Generator().manual_seed(4)
    wide = (200 + 100 * torch.randn(8, 2000, generator=generator)).to(dtype)
    equal = torch.ones(4, 4, dtype=dtype)
    of_group = 1e4 * torch.tensor([1.0, 2.0, 3.0, 6.0, 1.0, 1.0, 1.0, 1.0]).to(dtype)
    scored = torch.arange(8) != 0
    for made, exact in (
        (objective.whiten(wide), objective.whiten(wide.double())),
        (objective.whiten(equal), objective.whiten(equal.double())),
        *(
            (objective.grpo(of_group, 4, scored=some), objective.grpo(of_group.double(), 4, scored=some))
            for some in (None, scored)
        ),
        *(
            ((objective.rloo(of_group, 4, scored=some),), (objective.rloo(of_group.double(), 4, scored=some),))
            for some in (None, scored)
        ),
        ((objective.position_rloo(equal, 2),), (objective.position_rloo(equal.double(), 2),)),
    ):
        for ours, right in zip(made, exact, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), right, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_a_discount_is_no_half_precision_number() -> None:
    """0.99 in bfloat16 is 0.988: over 300 tokens a tenth of the return."""
    ones, value = torch.ones(1, 300, dtype=torch.bfloat16), torch.zeros(1, 300, dtype=torch.bfloat16)
    constraint = Constraint(budget=1.0)
    for made, exact in (
        (f(x, v) for x, v in ((ones, value), (ones.double(), value.double())))
        for f in (
            lambda x, v: objective.returns_to_go(x, gamma=0.99),
            lambda x, v: objective.score_coefficient(x, x, constraint, gamma=0.99),
            lambda x, v: objective.gae(x, v, gamma=0.99)[0],
            lambda x, v: objective.gae(x, v, gamma=0.99, lam=0.99)[1],
        )
    ):
        assert made.dtype == torch.bfloat16
        torch.testing.assert_close(made.double(), exact, rtol=2**-8, atol=0)

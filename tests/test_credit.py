"""Credit, batches and the scoring loop that all trainers share: their edge cases."""

from __future__ import annotations

import pytest
import torch

import cmdp_fast as cf
from cmdp_fast import batches, credit, metrics, objective, scoring

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()


def test_the_last_token_may_follow_masked_ones_and_may_be_missing() -> None:
    last = [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert credit.last_token(MASK).long().tolist() == last
    value = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    placed = credit.at_last_token(value, MASK)
    assert placed.dtype == torch.float32 and placed.tolist() == [[0, 0, 1, 0], [0, 0, 0, 2], [0] * 4, [4, 0, 0, 0]]
    assert credit.of_last_token(placed, MASK).tolist() == [1.0, 2.0, 0.0, 4.0]
    assert credit.of_last_token(torch.full((4, 4), torch.inf), MASK).tolist() == [torch.inf, torch.inf, 0.0, torch.inf]


def test_groups_of_any_size_in_any_order() -> None:
    torch.manual_seed(0)
    score, mask = torch.randn(7, 3), torch.ones(7, 3, dtype=torch.bool)
    mask[4, 2], mask[6] = False, False
    groups = ["a", "b", "a", "alone", "a", "b", "a"]  # the last one has no token and is in no group
    got = credit.less_others(torch.where(mask, score, 0.0), groups, mask)
    assert torch.equal(got[[0, 2, 4]], objective.position_rloo(score[[0, 2, 4]], 3, mask[[0, 2, 4]]))
    assert torch.equal(got[[1, 5]], objective.position_rloo(score[[1, 5]], 2))
    assert torch.equal(got[3], score[3]) and not got[6].any()
    pairs = ["a", "a", "b", "b"]
    assert torch.equal(credit.less_others(score[:4], pairs, mask[:4]), objective.position_rloo(score[:4], 2, mask[:4]))


def test_a_return_that_is_alone_in_its_group_is_worth_nothing() -> None:
    returns = torch.tensor([1.0, 2.0, 5.0, 5.0])
    for baseline in ("grpo", "rloo"):
        advantage, scale = credit.sequence_advantage(returns, 1, baseline)
        assert not advantage.any() and torch.equal(scale, torch.ones(4))
    advantage, scale = credit.sequence_advantage(returns, 2, "rloo")
    assert advantage.tolist() == [-1.0, 1.0, 0.0, 0.0] and torch.equal(scale, torch.ones(4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_advantage_and_the_direct_term_have_one_divisor(scale) -> None:
    returns = torch.tensor([1.0, 2.0, 5.0, 9.0])
    advantage, divisor = credit.sequence_advantage(returns, 2, "grpo", scale)
    torch.testing.assert_close(advantage * divisor, torch.tensor([-0.5, 0.5, -2.0, 2.0]))
    expected = {
        "group": torch.tensor([0.5**0.5, 0.5**0.5, 8**0.5, 8**0.5]) + 1e-4,
        "batch": (returns.std() + 1e-4).expand(4),
        "none": torch.ones(4),
    }
    torch.testing.assert_close(divisor, expected[scale])


SCORED = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]]).bool().flatten()


def compared(returns: torch.Tensor, scored: torch.Tensor) -> list[torch.Tensor]:
    """Every advantage, and every divisor, in groups of four."""
    found = [credit.sequence_advantage(returns, 4, "rloo", scored=scored)]
    found += [credit.sequence_advantage(returns, 4, "grpo", scale, scored=scored) for scale in ("group", "batch")]
    found += [credit.sequence_advantage(returns, 4, "grpo", "none", scored=scored)]
    return [part for both in found for part in both]


def test_an_unscored_completion_has_no_influence_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        returns = torch.randn(16, dtype=torch.float64, generator=generator)
        expected = compared(returns, SCORED)
        others = SCORED | ~SCORED.view(4, 4).any(1).repeat_interleave(4)  # in a group without any, all are compared
        odd = torch.where(others, returns, torch.nan)
        for ours, value in zip(compared(odd, SCORED), expected, strict=True):
            assert torch.equal(ours[others], value[others])
        order = torch.cat([4 * group + torch.randperm(4, generator=generator) for group in range(4)])
        for ours, value in zip(compared(returns[order], SCORED[order]), expected, strict=True):
            torch.testing.assert_close(ours, value[order])
        everyone = compared(returns, torch.ones(16, dtype=torch.bool))
        for ours, value in zip(everyone, compared(returns, None), strict=True):
            torch.testing.assert_close(ours, value)


def test_who_is_compared_with_whom() -> None:
    returns = torch.tensor([1.0, 0.0, 7.0, 0.0] * 2 + [3.0, 5.0, 4.0, 9.0] + [2.0, 2.0, 2.0, 4.0], dtype=torch.float64)
    rloo, _, grpo, scale, by_batch, batch, plain, _ = compared(returns, SCORED)
    expected = [1.0, -0.5, 20 / 3, -0.5, -4 / 3, -8 / 3, 20 / 3, -8 / 3, -2, 0, -1, 4, -2 / 3, -2 / 3, -2 / 3, 2]
    torch.testing.assert_close(rloo, torch.tensor(expected, dtype=torch.float64))
    expected = [2 / 3, -1 / 3, 20 / 3, -1 / 3, -1, -2, 5, -2, -2, 0, -1, 4, -0.5, -0.5, -0.5, 1.5]
    torch.testing.assert_close(plain, torch.tensor(expected, dtype=torch.float64))
    deviations = [(1 / 3) ** 0.5 + 1e-4, returns[4:8].std().item() + 1e-4, 1.0, 1.0 + 1e-4]
    torch.testing.assert_close(scale, torch.tensor(deviations, dtype=torch.float64).repeat_interleave(4))
    torch.testing.assert_close(grpo, plain / scale)
    torch.testing.assert_close(batch, (returns[SCORED].std() + 1e-4).expand(16))
    torch.testing.assert_close(by_batch, plain / batch)


def test_position_by_position_the_scored_ones_are_compared_with() -> None:
    score = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    scored = torch.tensor([True, True, False, True])
    found = objective.position_rloo(score, 4, mask, scored=scored)
    torch.testing.assert_close(found[scored], objective.position_rloo(score[scored], 3, mask[scored]))
    baseline = torch.where(mask, score, 0.0)[scored].mean(0)
    torch.testing.assert_close(found[2], torch.where(mask[2], score[2] - baseline, 0.0))
    with pytest.raises(ValueError, match=r"scored has shape \(3,\), expected \(4,\)"):
        objective.rloo(score[:, 0], 4, scored=scored[:3])
    with pytest.raises(TypeError, match=r"scored has dtype torch\.int64, expected torch\.bool"):
        objective.grpo(score[:, 0], 4, scored=scored.long())


def test_batches_are_padded_to_the_longest() -> None:
    def trace(width: int) -> cf.BudgetTrace:
        return cf.budget_trace(torch.ones(2, width), 1.5)

    one, two = trace(2), trace(3)
    both = batches.joined([one, two])
    assert isinstance(both, cf.BudgetTrace) and both.first_violation.tolist() == [1, 1, 1, 1]
    assert both.violated.dtype == torch.bool and both.violated[:2, 2].tolist() == [False, False]
    assert both.cumulative[2:].tolist() == two.cumulative.tolist()
    nested = batches.joined([{"a": (torch.ones(1, 2, 3), None)}, {"a": (torch.ones(2, 1, 3), None)}])
    tensor, nothing = nested["a"]
    assert nothing is None and tensor.shape == (3, 2, 3) and tensor[1:, 1].eq(0).all() and tensor[:, 0].eq(1).all()
    with pytest.raises(TypeError, match="got a str"):
        batches.joined(["a", "b"])


@pytest.mark.parametrize("fits", [True, False])
def test_the_teachers_outputs_are_kept_where_all_of_them_fit(fits: bool) -> None:
    count, teacher = 5, torch.randn(5, 2, 3)
    cost = torch.rand(5, 2)

    def settle(rows: slice) -> tuple[cf.ConstrainedReward, torch.Tensor]:
        stats = cf.TokenStats(*(cost[rows],) * 6)
        return cf.ConstrainedReward(stats, cf.budget_trace(cost[rows], 0.5), cost[rows]), teacher[rows]

    size = teacher.numel() * teacher.element_size()
    account = scoring.score(count, settle, at_once=2, cache_bytes=size if fits else size - 1)
    assert torch.equal(account.reward, cost) and torch.equal(account.stats.entropy, cost)
    assert all(torch.equal(a, b) for a, b in zip(account.trace, cf.budget_trace(cost, 0.5), strict=True))
    assert account.teacher_outputs is not None if fits else account.teacher_outputs is None
    if account.teacher_outputs is not None:
        assert torch.equal(account.teacher_outputs, teacher)


def test_the_divergences_of_a_completion_leave_masked_tokens_out() -> None:
    nothing, mask = torch.tensor([[torch.nan, 0.5]]), torch.tensor([[False, True]])
    stats = cf.TokenStats(nothing, nothing * 2, nothing, nothing, nothing, nothing)
    found = metrics.divergences(stats, mask)
    assert found.kl.tolist() == [0.5] and found.k1.tolist() == [-0.5]
    assert found.k3.item() == pytest.approx(2.718281828**0.5 - 1 - 0.5)


def test_a_reward_of_weight_0_is_logged_alone() -> None:
    """It made the failed judge of -5, -5, -5, None one that says 0: an advantage of 5."""
    judged = torch.tensor([-5.0, -5.0, -5.0, torch.nan])
    both = torch.stack([judged, torch.ones(4)], 1)
    reward, scored = credit.task_rewards(both, torch.tensor([1.0, 0.0]), 4)
    assert scored.tolist() == [True, True, True, False] and reward.tolist() == [-5.0] * 4
    reward, scored = credit.task_rewards(both, torch.tensor([1.0, -2.0]), 4)
    assert scored.all() and reward.tolist() == [-7.0, -7.0, -7.0, -2.0]
    reward, scored = credit.task_rewards(both, torch.zeros(2), 4)  # for the constraint alone, with a mean to be logged
    assert scored.all() and not reward.any()

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

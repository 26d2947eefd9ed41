"""The surrogate: at ratio 1 the policy gradient plus the direct term, and clipping of the score term alone."""

from __future__ import annotations

import math

import pytest
import torch
from exact import ops
from torch import Tensor

from cmdp_fast import objective
from cmdp_fast.reference import TokenStats

B, T, V = 4, 6, 5
LENGTHS = torch.tensor([6, 3, 5, 1])
MASK = torch.arange(T) < LENGTHS[:, None]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ADVANTAGE, DIRECT = draw(B, T, seed=1), draw(B, T, seed=2).abs()


def statistics(logits: Tensor) -> TokenStats:
    tokens = torch.arange(B * T).reshape(B, T) % V
    return ops.token_stats(logits, draw(B, T, V, seed=3), tokens)


def gradient(
    shift: float | Tensor = 0.0, *, advantage: Tensor = ADVANTAGE, direct: Tensor | None = DIRECT, **options: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient with respect to the logits, where log rho = ``shift``."""
    logits = draw(B, T, V, seed=4).requires_grad_()
    stats = statistics(logits)
    options = {"mask": MASK, "cost": None if direct is None else stats.reverse_kl, "direct": direct, **options}
    loss, metrics = objective.ppo_loss(stats.logprob, stats.logprob.detach() - shift, advantage, **options)
    loss.backward()
    return logits.grad, metrics


def policy_gradient(advantage: Tensor, direct: Tensor, normalizer: float) -> Tensor:
    """Minus the objective's gradient, written out from its two terms."""
    logits = draw(B, T, V, seed=4).requires_grad_()
    stats = statistics(logits)
    terms = -advantage * stats.logprob + direct * stats.reverse_kl
    (terms[MASK].sum() / normalizer).backward()
    return logits.grad


def test_ratio_one_is_the_policy_gradient_plus_the_direct_term() -> None:
    actual, metrics = gradient()
    torch.testing.assert_close(actual, policy_gradient(ADVANTAGE, DIRECT, B), rtol=1e-12, atol=1e-15)
    assert actual[0].abs().min() > 0 and not actual[~MASK].any()
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "approx_kl"):
        assert metrics[name] == 0
    total = -ADVANTAGE[MASK].sum() / B
    torch.testing.assert_close(metrics["loss/score"], total)


def test_normalizer_divides_both_terms() -> None:
    whole, _ = gradient()
    half, _ = gradient(normalizer=torch.tensor(2.0 * B))
    torch.testing.assert_close(half, whole / 2)
    # minibatches that share a normaliser add up to the batch; a fully masked sequence is no sequence
    parts = [gradient(mask=MASK & rows[:, None], normalizer=B)[0] for rows in torch.eye(B, dtype=torch.bool)]
    torch.testing.assert_close(sum(parts), whole)
    first, _ = gradient(mask=MASK & torch.eye(B, dtype=torch.bool)[0][:, None])
    torch.testing.assert_close(first, parts[0] * B)


def test_dividing_by_a_deviation_scales_both_terms_or_changes_the_weight() -> None:
    returns = draw(B, seed=5)
    _, scale = objective.grpo(returns, B)
    divisor = scale[:, None]
    expected = policy_gradient(ADVANTAGE, DIRECT, 1.0) / scale[0]
    both, _ = gradient(advantage=ADVANTAGE / divisor, direct=DIRECT / divisor, normalizer=1.0)
    torch.testing.assert_close(both, expected)
    score_alone, _ = gradient(advantage=ADVANTAGE / divisor, normalizer=1.0)
    assert not torch.allclose(score_alone, expected, rtol=1e-2)
    cosine = torch.cosine_similarity(score_alone.flatten(), expected.flatten(), dim=0)
    assert cosine < 0.999


@pytest.mark.parametrize(("shift", "sign"), [(1.0, 1.0), (-1.0, -1.0)])
def test_clip_stops_the_score_term_and_not_the_direct_term(shift: float, sign: float) -> None:
    """rho beyond the edge on the side where the advantage pushes further: only the direct term is left, unscaled."""
    clipped, metrics = gradient(shift, advantage=sign * ADVANTAGE.abs())
    torch.testing.assert_close(clipped, policy_gradient(0 * ADVANTAGE, DIRECT, B), rtol=1e-12, atol=1e-15)
    side, other = ("high", "low") if shift > 0 else ("low", "high")
    assert metrics[f"clip_ratio/{side}_mean"] == 1 and metrics[f"clip_ratio/{other}_mean"] == 0
    assert metrics["clip_ratio/region_mean"] == 1
    assert metrics["approx_kl"].item() == pytest.approx(math.exp(shift) - 1 - shift)
    # on the other side min() keeps the unclipped ratio, which multiplies the score term alone
    pushed, metrics = gradient(shift, advantage=-sign * ADVANTAGE.abs())
    expected = policy_gradient(-sign * ADVANTAGE.abs() * math.exp(shift), DIRECT, B)
    torch.testing.assert_close(pushed, expected, rtol=1e-12, atol=1e-15)
    assert metrics["clip_ratio/region_mean"] == 0


def test_clip_range_is_asymmetric() -> None:
    shift = torch.full((B, T), math.log(1.25), dtype=torch.float64)
    _, inside = gradient(shift, advantage=ADVANTAGE.abs(), clip_high=0.28)
    _, outside = gradient(shift, advantage=ADVANTAGE.abs(), clip_high=0.2)
    assert inside["clip_ratio/high_mean"] == 0 and outside["clip_ratio/high_mean"] == 1
    _, inside = gradient(-shift, advantage=-ADVANTAGE.abs(), clip_low=0.21)
    _, outside = gradient(-shift, advantage=-ADVANTAGE.abs(), clip_low=0.19)
    assert inside["clip_ratio/low_mean"] == 0 and outside["clip_ratio/low_mean"] == 1
    for log_ratio, advantage, edge in ((1.0, 1.0, 1.1), (-1.0, -1.0, 0.7)):
        one = torch.ones(1, 1)
        loss, _ = objective.ppo_loss(log_ratio * one, 0 * one, advantage * one, mask=None, clip_low=0.3, clip_high=0.1)
        assert loss.item() == pytest.approx(-advantage * edge)


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_a_ratio_at_the_edge_is_not_beyond_it(shift: float) -> None:
    """A double between 1/2 and 2 less 1 is exact, so that the edge is the ratio itself."""
    logprob, old = (torch.full((1, 1), value, dtype=torch.float64) for value in (0.0, -shift))
    ratio = old.neg().exp().item()
    edges = {"clip_low": abs(ratio - 1.0), "clip_high": abs(ratio - 1.0)}
    logprob.requires_grad_()
    loss, metrics = objective.ppo_loss(logprob, old, torch.full_like(old, math.copysign(1, shift)), mask=None, **edges)
    loss.backward()
    assert logprob.grad.item() == loss.item() == -math.copysign(ratio, shift)
    assert metrics["clip_ratio/region_mean"] == 0


def test_nothing_but_logprob_and_cost_gets_a_gradient() -> None:
    given = {name: draw(1, 3, seed=6).requires_grad_() for name in ("logprob", "old_logprob", "advantage", "cost")}
    direct = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    loss, metrics = objective.ppo_loss(**given, direct=direct, mask=None, clip_low=9.0, clip_high=9.0)
    loss.backward()
    assert given["logprob"].grad is not None and torch.equal(given["cost"].grad, direct.detach())
    assert all(tensor.grad is None for tensor in (given["old_logprob"], given["advantage"], direct))
    assert not any(value.requires_grad for value in metrics.values())


def test_masked_tokens_are_never_used() -> None:
    expected, metrics = gradient()
    poison = torch.where(MASK, 0.0, torch.nan)
    actual, poisoned = gradient(poison, advantage=ADVANTAGE + poison, direct=DIRECT + poison)
    assert torch.equal(actual, expected)
    assert all(torch.equal(poisoned[name], metrics[name]) for name in metrics)
    nothing, metrics = gradient(mask=torch.zeros_like(MASK))
    assert not nothing.any() and not any(value.any() for value in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_a_ratio_that_does_not_count_may_overflow(side: float, dtype: torch.dtype) -> None:
    """Log-ratios of 0 and far beyond what exp can hold: an advantage of 0, or a clip that takes the token out."""
    largest = math.log(torch.finfo(dtype).max)
    old = torch.tensor([[-2 * largest, -1.0]], dtype=dtype) if side > 0 else torch.tensor([[-0.5, -1.0]], dtype=dtype)
    now = torch.tensor([[-0.5, -1.0]] if side > 0 else [[-2 * largest, -1.0]], dtype=dtype)
    for advantage, expected, gradient_of_it in ((0.0, 0.0, 0.0), (side, -side * (1.0 + 0.2 * side), 0.0)):
        logprob = now.clone().requires_grad_()
        weight = torch.tensor([[advantage, 1.0]], dtype=dtype)
        loss, metrics = objective.ppo_loss(logprob, old, weight, mask=None)
        loss.backward()
        assert loss.item() == pytest.approx(expected - 1.0, rel=1e-6)
        assert logprob.grad.tolist() == [[gradient_of_it, -1.0]]
        assert metrics["loss/score"] == loss
        beyond = {"high": side > 0 and advantage != 0, "low": side < 0 and advantage != 0}
        assert all(metrics[f"clip_ratio/{edge}_mean"] == 0.5 * counts for edge, counts in beyond.items())


def test_nothing_bounds_the_ratio_of_a_negative_advantage() -> None:
    logprob = torch.tensor([[-0.5]], requires_grad=True)
    loss, _ = objective.ppo_loss(logprob, torch.tensor([[-200.0]]), torch.tensor([[-1.0]]), mask=None)
    assert loss.item() == math.inf
    loss, _ = objective.ppo_loss(logprob, torch.tensor([[-20.5]]), torch.tensor([[-1.0]]), mask=None)
    loss.backward()
    assert logprob.grad.item() == pytest.approx(math.exp(20), rel=1e-6)


def test_infinite_cost_of_weight_zero_does_not_spoil_the_loss() -> None:
    logprob = torch.zeros(1, 2, requires_grad=True)
    cost = torch.tensor([[math.inf, 1.0]], requires_grad=True)
    direct = torch.tensor([[0.0, 3.0]])
    loss, _ = objective.ppo_loss(logprob, logprob.detach(), torch.ones(1, 2), mask=None, cost=cost, direct=direct)
    loss.backward()
    assert loss.item() == 1.0
    assert torch.equal(cost.grad, direct)


def test_without_a_direct_term() -> None:
    actual, metrics = gradient(direct=None)
    torch.testing.assert_close(actual, policy_gradient(ADVANTAGE, 0 * DIRECT, B), rtol=1e-12, atol=1e-15)
    assert metrics["loss/direct"] == 0


@pytest.mark.parametrize("clip_high", [0.2, math.inf])
def test_an_advantage_of_0_is_worth_0_at_a_ratio_that_overflows(clip_high) -> None:
    logprob = torch.tensor([[-0.5, -1.0]], requires_grad=True)
    old, advantage = torch.tensor([[-200.0, -1.0]]), torch.tensor([[0.0, 1.0]])
    loss, _ = objective.ppo_loss(logprob, old, advantage, mask=None, clip_high=clip_high)
    loss.backward()
    assert loss.item() == -1.0
    assert logprob.grad.tolist() == [[0.0, -1.0]]


def test_errors() -> None:
    logprob = torch.zeros(B, T, requires_grad=True)
    arguments = (logprob, logprob.detach(), torch.zeros(B, T))
    with pytest.raises(ValueError, match="direct was given without cost"):
        objective.ppo_loss(*arguments, mask=None, direct=torch.zeros(B, T))
    with pytest.raises(ValueError, match="cost was given without direct"):
        objective.ppo_loss(*arguments, mask=None, cost=logprob)
    with pytest.raises(ValueError, match="cost has no gradient"):
        objective.ppo_loss(*arguments, mask=None, cost=torch.zeros(B, T), direct=torch.zeros(B, T))
    with pytest.raises(ValueError, match="direct has shape"):
        objective.ppo_loss(*arguments, mask=None, cost=logprob, direct=torch.zeros(B))
    with pytest.raises(ValueError, match="advantage has shape"):
        objective.ppo_loss(logprob, logprob.detach(), torch.zeros(B), mask=None)
    with pytest.raises(ValueError, match="old_logprob has shape"):
        objective.ppo_loss(logprob, logprob.detach()[:1], torch.zeros(B, T), mask=None)
    with pytest.raises(ValueError, match="cost has shape"):
        objective.ppo_loss(*arguments, mask=None, cost=logprob[:1], direct=torch.zeros(B, T))
    objective.ppo_loss(logprob.detach(), *arguments[1:], mask=None, cost=torch.zeros(B, T), direct=torch.zeros(B, T))
    with torch.no_grad():  # nothing to lose in an evaluation
        objective.ppo_loss(*arguments, mask=None, cost=torch.zeros(B, T), direct=torch.zeros(B, T))

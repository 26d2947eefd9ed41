"""The weights of completions that another sampler has drawn: exact on the enumerated tree, sound for any numbers."""

from __future__ import annotations

import math

import pytest
import torch
from exact import Problem, Setting, roll_out, tree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmdp_fast import objective
from cmdp_fast.metrics import budget_metrics, divergences
from cmdp_fast.reference import token_stats

HINGE = Setting("hinge", 0.02, weight=2.0)
UNCLIPPED = math.inf


def logits(problem: Problem, seed: int) -> Tensor:
    noise = torch.randn(problem.teacher.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return problem.teacher.log() + noise


def drawn(problem: Problem, sampler: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities [P, T] of a sampler with these logits, the probability [P] of each completion under it)."""
    logprob = sampler.log_softmax(-1)[problem.state, problem.tokens]
    return logprob, logprob.sum(1).exp()


def gradient(
    problem: Problem,
    theta: Tensor,
    sampler: tuple[Tensor, Tensor] | None,
    mode: str = "",
    *,
    score_only: bool = False,
) -> Tensor:
    """The gradient of `ppo_loss` with a baseline: expected over the policy's own completions, or over a sampler's."""
    theta = theta.clone().requires_grad_()
    rollout = roll_out(problem, theta, HINGE)
    task = objective.task_part(problem.reward, rollout.trace, HINGE.constraint)
    advantage = objective.score_coefficient(rollout.reward, task, HINGE.constraint) - 0.3
    direct = objective.direct_coefficient(rollout.trace, HINGE.constraint)
    share = rollout.probability[:, None]
    if sampler is not None:
        ratio = objective.sampler_log_ratio(rollout.logprob, sampler[0])
        weight = objective.sampler_weight(ratio, mode, clip=UNCLIPPED)
        advantage, direct = weight * advantage, (weight * direct if mode == "sequence" else direct)
        share = sampler[1][:, None]
    loss, _ = objective.ppo_loss(
        rollout.logprob,
        rollout.logprob.detach(),
        share * advantage,
        mask=None,
        cost=None if score_only else rollout.cost,
        direct=None if score_only else share * direct,
        normalizer=1.0,
    )
    loss.backward()
    return theta.grad


def test_weights_of_completions_give_the_gradient_of_the_policy() -> None:
    """Of both terms, from a sampler that is far from it: no clip takes effect."""
    problem = tree()
    theta, sampler = logits(problem, 7), drawn(problem, logits(problem, 8))
    own = gradient(problem, theta, None)
    torch.testing.assert_close(gradient(problem, theta, sampler, "sequence"), own, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(gradient(problem, theta, sampler, "token"), own, rtol=0.05)


@pytest.mark.parametrize(("apart", "exact"), [(slice(1, None), slice(1, None)), (slice(0, 1), slice(0, 1))])
def test_weights_of_tokens_leave_the_states_and_the_future_to_the_sampler(apart, exact) -> None:
    """The bias that they have, and no other. A sampler that is apart from the policy after the first token leads to the
    policy's states, so the score terms there are exact; the first token's sees another future. One that is apart at the
    first token alone has an exact score term there, and leads to other states."""
    problem = tree()
    theta, mixed = logits(problem, 7), logits(problem, 7)
    mixed[apart] = logits(problem, 8)[apart]
    own = gradient(problem, theta, None, score_only=True)
    corrected = gradient(problem, theta, drawn(problem, mixed), "token", score_only=True)
    torch.testing.assert_close(corrected[exact], own[exact], rtol=1e-12, atol=1e-14)
    biased = torch.ones(len(theta), dtype=torch.bool)
    biased[exact] = False
    assert not torch.allclose(corrected[biased], own[biased], rtol=0.05)


@pytest.mark.parametrize("seed", [8, 9])
def test_estimates_of_the_budget_are_those_of_the_policy(seed) -> None:
    """Many draws of the sampler's, in their exact proportions: every figure but the largest cost."""
    problem, setting = tree(), Setting("hinge", 0.35, weight=2.0)  # some paths are over it
    theta = logits(problem, 7)
    rollout = roll_out(problem, theta, setting)
    logprob, probability = drawn(problem, logits(problem, seed))
    ratio = objective.sampler_log_ratio(rollout.logprob, logprob)
    stats = token_stats(theta[problem.state], problem.teacher.log()[problem.state], problem.tokens)
    mask = torch.ones_like(problem.tokens, dtype=torch.bool)
    correct = problem.reward.sum(1) > problem.reward.sum(1).mean()

    def figures(weight: Tensor) -> dict[str, Tensor]:
        return budget_metrics(
            *(rollout.cost, rollout.trace, divergences(stats, mask)),
            mask=mask,
            budget=setting.budget,
            modified=rollout.reward.sum(1),
            correct=correct,
            weight=weight,
        )

    corrected = figures(probability * objective.estimate_weight(ratio, clip=UNCLIPPED))
    expected, uncorrected = figures(rollout.probability), figures(probability)
    for name, value in expected.items():
        torch.testing.assert_close(corrected[name], value, rtol=1e-12, atol=1e-14)
    assert expected["mean_cumulative"].item() == pytest.approx(rollout.expect(rollout.totals).item(), rel=1e-12)
    same = {name for name in expected if torch.allclose(uncorrected[name], expected[name], rtol=1e-3)}
    assert same <= {"max_token_cost", "budget", "cvar", "cumulative_kl_cvar"}  # tails may be of the same path


NAN, INF = math.nan, math.inf
ANY = st.floats(-1e4, 0.0) | st.sampled_from([-INF])


@given(
    pairs=st.lists(st.lists(st.tuples(ANY, ANY | st.just(NAN), st.booleans()), min_size=3, max_size=3), min_size=1),
    clip=st.floats(1.0, 1e6) | st.just(INF),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_weights_are_sound_for_any_log_probabilities(pairs, clip, dtype) -> None:
    """Between 0 and the clip, without NaN; 0 for what the policy excludes; masked tokens are not looked at."""
    logprob, sampler, mask = (torch.tensor([[token[i] for token in row] for row in pairs]) for i in range(3))
    mask = mask.bool()
    logprob, sampler = logprob.to(dtype), sampler.to(dtype)
    ratio = objective.sampler_log_ratio(logprob, sampler, mask=mask)
    elsewhere = objective.sampler_log_ratio(logprob.masked_fill(~mask, NAN), sampler.masked_fill(~mask, INF), mask=mask)
    assert torch.equal(ratio, elsewhere) and (ratio[~mask] == 0).all()
    assert ratio.dtype == torch.promote_types(dtype, torch.float32)
    excluded = mask & (logprob == -INF) & ~sampler.isnan()
    token = objective.sampler_weight(ratio, "token", clip=clip)
    whole = objective.sampler_weight(ratio, "sequence", clip=clip)
    for weight in (token, whole):
        assert (weight >= 0).all() and (weight <= clip * (1 + 1e-6)).all()
    assert (token[excluded] == 0).all() and (whole[excluded.any(1)] == 0).all()
    assert (token[~mask] == 1).all() and whole.shape == (len(pairs), 1)
    estimate = objective.estimate_weight(ratio, clip=clip)
    if excluded.any(1).all():
        assert estimate.isnan().all()
    else:
        assert estimate.max() == 1 and (estimate >= 0).all() and (estimate[excluded.any(1)] == 0).all()
    if not excluded.any(1)[mask.any(1)].all():
        figures = objective.sampler_metrics(ratio, mask=mask, mode="sequence", clip=clip)
        assert 0 < figures["sampling/effective_sample_ratio"] <= 1 + 1e-6


def test_products_of_thousands_of_tokens() -> None:
    """Ratios whose product no float holds: a mean of those that are all tiny is still one of them by their weights."""
    ratio = torch.full((3, 5000), 1.0)
    ratio[1:] = -1.0
    ratio[2, 0] -= math.log(3.0)
    assert objective.sampler_weight(ratio, "sequence", clip=2.0).tolist() == [[2.0], [0.0], [0.0]]
    assert objective.estimate_weight(ratio[1:]).tolist() == pytest.approx([1.0, 1 / 3], rel=1e-3)
    empty = torch.cat([torch.zeros(1, 5000), ratio[1:]])  # whose completion has no token: it is none of them
    of_real = objective.estimate_weight(empty, mask=torch.tensor([False, True, True])[:, None].expand(3, 5000))
    assert of_real.tolist() == [0.0, *objective.estimate_weight(ratio[1:]).tolist()]
    mean = objective.weighted_mean(torch.tensor([8.0, 4.0]), objective.estimate_weight(ratio[1:]))
    assert mean.item() == pytest.approx(7.0, rel=1e-3)


def test_figures_of_a_sampler_by_hand() -> None:
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=torch.bool)
    ratio = objective.sampler_log_ratio(
        torch.tensor([[-1.0, -1.0], [-1.0, 9.0], [9.0, 9.0]]),
        torch.tensor([[-1.0 - math.log(3.0), -1.0], [-1.0 + math.log(2.0), NAN], [0.0, 0.0]]),
        mask=mask,
    )
    off = {
        "sampling/sampling_logp_difference/mean": math.log(6.0) / 3,
        "sampling/sampling_logp_difference/max": math.log(3),
    }
    name = "sampling/importance_sampling_ratio/"

    def figures(mode: str | None) -> dict[str, float]:
        return {k: v.item() for k, v in objective.sampler_metrics(ratio, mask=mask, mode=mode, clip=2.0).items()}

    assert figures(None) == pytest.approx(off)
    effective = {"sampling/effective_sample_ratio": 2.5**2 / (2 * 4.25)}
    token = {"min": 0.5, "mean": 3.5 / 3, "max": 2.0, "clipped_ratio": 1 / 3}
    assert figures("token") == pytest.approx(off | effective | {name + k: v for k, v in token.items()})
    whole = {"min": 0.5, "mean": 1.25, "max": 2.0, "clipped_ratio": 0.5}
    assert figures("sequence") == pytest.approx(off | effective | {name + k: v for k, v in whole.items()})


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (2, 3)])
def test_of_no_tokens_there_are_no_figures(shape: tuple[int, int]) -> None:
    nothing = torch.zeros(shape, dtype=torch.bool)
    for mode in (None, "token", "sequence"):
        figures = objective.sampler_metrics(torch.full(shape, 3.0), mask=nothing, mode=mode)
        assert len(figures) == (7 if mode else 2)
        assert all(value.shape == () and value.isnan() for value in figures.values()), figures


def test_ratios_of_masked_tokens_are_not_looked_at() -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    ratio = torch.tensor([[0.5, 0.0, -1.0], [0.25, 0.5, 0.0]])
    odd = torch.where(mask, ratio, NAN)
    assert torch.equal(objective.estimate_weight(odd, mask=mask), objective.estimate_weight(ratio, mask=mask))
    for mode in (None, "token", "sequence"):
        assert objective.sampler_metrics(odd, mask=mask, mode=mode) == objective.sampler_metrics(
            ratio, mask=mask, mode=mode
        )


def test_what_no_weight_can_be_made_of() -> None:
    ratio = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"clip is 0\.5, expected at least 1"):
        objective.sampler_weight(ratio, "token", clip=0.5)
    with pytest.raises(ValueError, match="mode is 'word', expected 'token' or 'sequence'"):
        objective.sampler_weight(ratio, "word")
    with pytest.raises(ValueError, match="sampler_logprob has shape"):
        objective.sampler_log_ratio(ratio, ratio[:, 1:])


def test_a_weighted_tail() -> None:
    """As if each value were there as often as its weight says."""
    values, times = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([4.0, 1.0, 5.0])
    often = values.repeat_interleave(times.long())
    for alpha in (0.05, 0.1, 0.35, 1.0):
        assert objective.cvar(values, alpha, weight=times / 7).item() == pytest.approx(
            objective.cvar(often, alpha).item()
        )

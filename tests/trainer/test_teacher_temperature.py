"""The teacher's own temperature: the same in costs, losses, samples and evaluations."""

from __future__ import annotations

import pytest
import torch
from tiny_pair import learner_of, settings
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.scoring import FromHiddenStates, FromLogits
from cmdp_fast.trainer import experience
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.records.clock import Clock

STUDENT, TEACHER = 0.7, 1.3  # temperatures
VOCAB, MASK = 9, torch.tensor([[True, True, False], [True, True, True]])
TOKENS = torch.tensor([[1, 8, 0], [3, 3, 7]])


def heads(dtype: torch.dtype) -> dict[str, tuple[cf.Head, cf.Head]]:
    """Heads of student and teacher, 4 and 5 wide."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(VOCAB, width, generator=generator).to(dtype) for width in (4, 5))
    bias = torch.randn(VOCAB, generator=generator).to(dtype)
    return {
        "plain": (cf.Head(student), cf.Head(teacher)),
        "bias, softcap and scale": (cf.Head(student), cf.Head(teacher, bias, softcap=2.0, scale=1.5)),
    }


def kl(p: Tensor, w: Tensor) -> Tensor:
    """Of log-probabilities, in nats."""
    return (p.exp() * (p - w)).sum(-1)


@pytest.fixture
def models_are_heads(monkeypatch):
    monkeypatch.setattr("cmdp_fast.scoring.head_for", lambda model, hidden: model)


@pytest.mark.usefixtures("models_are_heads")
@pytest.mark.parametrize("kind", ["plain", "bias, softcap and scale"])
@pytest.mark.parametrize("scoring", [FromHiddenStates, FromLogits])
def test_every_statistic_is_of_each_model_at_its_own_temperature(scoring, kind):
    models = heads(torch.float64)[kind]
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(2, 3, width, generator=generator, dtype=torch.float64) for width in (4, 5)]
    hidden[0].requires_grad_()
    logits = [head.logits(h) for head, h in zip(models, hidden, strict=True)]
    p, w = (torch.log_softmax(x / t, -1) for x, t in zip(logits, (STUDENT, TEACHER), strict=True))
    outputs = tuple(hidden if scoring is FromHiddenStates else logits)
    at = scoring(VOCAB, STUDENT, TEACHER)

    mixture = torch.logsumexp(torch.stack([p + torch.tensor(0.7).log(), w + torch.tensor(0.3).log()]), 0)
    jsd = 0.3 * kl(w, mixture) + 0.7 * kl(p, mixture)
    exact = {"reverse_kl": kl(p, w), "forward_kl": kl(w, p), "logprob": p.gather(-1, TOKENS[..., None])[..., 0]}
    exact = {name: torch.where(MASK, value, 0.0) for name, value in exact.items()}
    stats = at.token_stats(models, outputs, TOKENS, MASK, inplace=False)
    for name, value in exact.items():
        torch.testing.assert_close(getattr(stats, name), value)
    chosen = torch.where(MASK, w.gather(-1, TOKENS[..., None])[..., 0], 0.0)
    torch.testing.assert_close(stats.teacher_logprob, chosen)
    values = (stats.reverse_kl, exact["reverse_kl"])
    ours, theirs = (torch.autograd.grad(value.sum(), hidden[0], retain_graph=True)[0] for value in values)
    torch.testing.assert_close(ours, theirs)

    for beta, value in ((0.3, torch.where(MASK, jsd, 0.0)), (0.0, exact["forward_kl"]), (1.0, exact["reverse_kl"])):
        torch.testing.assert_close(at.divergence(models, outputs, MASK, beta), value, rtol=1e-6, atol=1e-7)
    constraint = cf.Constraint(budget=0.1, kind="lagrangian", coefficient=0.5)
    account = at.constrained_reward(models, outputs, TOKENS, torch.zeros(2, 3), mask=MASK, constraint=constraint)
    torch.testing.assert_close(account.reward, -0.5 * exact["reverse_kl"].detach())


@pytest.mark.usefixtures("models_are_heads")
@pytest.mark.parametrize("scoring", [FromHiddenStates, FromLogits])
def test_the_teacher_as_the_policy_has_its_own_temperature(scoring):
    _, teacher = heads(torch.float64)["bias, softcap and scale"]
    hidden = torch.randn(2, 3, 5, dtype=torch.float64)
    outputs = hidden if scoring is FromHiddenStates else teacher.logits(hidden)
    stats = scoring(VOCAB, STUDENT, TEACHER).token_stats((teacher, teacher), (outputs, outputs), TOKENS, MASK)
    assert torch.equal(stats.logprob, stats.teacher_logprob)
    assert stats.reverse_kl.abs().max() < 1e-12
    expected = torch.log_softmax(teacher.logits(hidden) / TEACHER, -1).gather(-1, TOKENS[..., None])[..., 0]
    torch.testing.assert_close(stats.logprob, torch.where(MASK, expected, 0.0))


def test_half_precision_logits_are_not_rounded_again():
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((8 * torch.randn(2, 3, VOCAB, generator=generator)).bfloat16() for _ in range(2))
    stats = FromLogits(VOCAB, STUDENT, TEACHER).token_stats((None, 0), (student, teacher), TOKENS, MASK)
    exact = [torch.log_softmax(x.double() / t, -1) for x, t in ((student, STUDENT), (teacher, TEACHER))]
    torch.testing.assert_close(stats.reverse_kl.double(), torch.where(MASK, kl(*exact), 0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["ppo", "gkd", "kd", "minillm"])
def test_a_step_is_the_same_with_logits_in_full_and_without_the_cache(algorithm, pair):
    """Scoring and update, with the teacher's outputs kept or made again."""
    found = []
    for changes in ({}, {"teacher_cache_mb": 0}, {"logits": "full"}):
        at = {"temperature": STUDENT, "teacher_temperature": TEACHER, "jsd_beta": 0.4}
        learner, rows, prompts = learner_of(
            settings(pair, algorithm=algorithm, epochs=1, minibatch_size=12, **at, **changes)
        )
        metrics = learner.step(rows, prompts)
        found.append({name: metrics[name] for name in ("loss", "grad_norm", "kl", "cmdp/cumulative_k1")})
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_costs_and_figures_are_those_of_the_two_temperatures(pair, monkeypatch):
    config = settings(pair, temperature=STUDENT, teacher_temperature=TEACHER, algorithm="kd")
    learner, rows, prompts = learner_of(config)
    sampled, generate = [], experience.generate

    def recorded(model, given, sampling, **options):
        sampled.append(sampling.temperature)
        return generate(model, given, sampling, **options)

    monkeypatch.setattr(experience, "generate", recorded)
    result, _ = evaluate(learner.collector, learner.teacher, rows, Clock(), who="teacher")
    assert result["mean_cumulative_kl"] < 1e-5 and result["constraint_satisfaction"] == 1.0
    evaluate(learner.collector, learner.student, rows, Clock())
    part = learner.method.collect(rows, prompts, learner.constraint())  # of the teacher's completions
    assert sampled == [TEACHER, STUDENT, TEACHER]
    ids = torch.cat([part.rollout.prompt_ids, part.rollout.tokens], 1)[:, :-1]
    p, w = (
        torch.log_softmax(model(ids).logits[:, -part.rollout.tokens.shape[1] :] / temperature, -1)
        for model, temperature in ((learner.student, STUDENT), (learner.teacher, TEACHER))
    )
    expected = torch.where(part.rollout.mask, kl(p, w), 0.0)
    torch.testing.assert_close(part.stats.reverse_kl, expected, rtol=1e-4, atol=1e-5)

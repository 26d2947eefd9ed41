"""Scores and gradients of the update against plain `model(...).logits`, on several families of models."""

from __future__ import annotations

import pytest
import torch
from tiny_pair import learner_of, settings, tiny_model

from cmdp_fast.trainer.rollout import encode_prompts
from cmdp_fast.trainer.settings.config import TrainConfig


def alone(model, prompt: list[int], completion: torch.Tensor, width: int, temperature: float) -> torch.Tensor:
    """Log-probabilities [T, V] of a completion by itself: no batch, no padding, plain `model(...).logits`."""
    ids = torch.cat([torch.tensor(prompt), completion])[None]
    logits = model(ids).logits[0, len(prompt) - 1 : -1, :width]
    return torch.log_softmax(logits / temperature, -1)


FAMILIES = ["llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "opt", "cohere"]


@pytest.fixture(params=FAMILIES)
def family_pair(request, pair, tmp_path) -> dict[str, str]:
    """Student and teacher of a family; the teacher pads its vocabulary, as Qwen2.5's larger models do."""
    return {
        **pair,
        "student": tiny_model(tmp_path / "s", seed=1, family=request.param),
        "teacher": tiny_model(tmp_path / "t", seed=2, family=request.param, layers=2, spare=6),
    }


def experience_of(config: TrainConfig, repeat: int = 4):
    """A step's experience on prompts of several lengths."""
    learner, rows, _ = learner_of(config)
    rows = [row for row in rows for _ in range(config.num_generations)] * repeat
    prompts = [ids * (1 + i % 3) for i, ids in enumerate(encode_prompts(rows, learner.collector.tokenizer))]
    experience = learner.method.collect(rows, prompts, learner.constraint())
    lengths = experience.rollout.mask.sum(1).tolist()
    assert len(set(lengths)) > 1 and experience.rollout.finished.any()
    completions = [tokens[:n] for tokens, n in zip(experience.rollout.tokens, lengths, strict=True)]
    return learner, experience, prompts, completions


@pytest.mark.parametrize("temperature, logits", [(1.0, "tiled"), (0.7, "tiled"), (0.7, "full")])
def test_scores_are_the_models_own(temperature, logits, family_pair):
    """Padding on both sides and batching change nothing: a completion alone has the same log-probabilities."""
    config = settings(family_pair, temperature=temperature, max_new_tokens=12, logits=logits)
    learner, experience, prompts, completions = experience_of(config)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        n = len(completion)
        with torch.no_grad():
            p, w = (
                alone(model, prompt, completion, learner.method.scoring.vocab_size, temperature).double()
                for model in (learner.student, learner.teacher)
            )
        # float32 logits of size about 10 that went through another order of sums: some 10 roundings of 1e-6
        for ours, theirs in (
            (experience.stats.logprob[i], p.gather(1, completion[:, None])[:, 0]),
            (experience.stats.teacher_logprob[i], w.gather(1, completion[:, None])[:, 0]),
            (experience.stats.reverse_kl[i], (p.exp() * (p - w)).sum(1)),
        ):
            torch.testing.assert_close(ours[:n].double(), theirs, atol=1e-5, rtol=1e-5)
        assert all((value[i, n:] == 0).all() for value in experience.stats)
        total = (p.exp() * (p - w)).sum()
        torch.testing.assert_close(experience.trace.cumulative[i, n - 1].double(), total, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("logits", ["tiled", "full"])
def test_gradient_of_a_step(logits, family_pair):
    """The update's gradient against the formula, written out for each completion alone."""
    config = settings(family_pair, max_new_tokens=12, kind="hinge", temperature=0.9, budget=0.5, logits=logits)
    learner, experience, prompts, completions = experience_of(config)
    size = len(prompts)
    torch.manual_seed(0)
    advantage, direct = torch.randn(experience.rollout.mask.shape), torch.rand(experience.rollout.mask.shape)
    loss, _, outputs = learner.method.loss(
        experience, {"advantage": advantage, "direct": direct}, learner.constraint(), size
    )
    learner.backward(loss, outputs)
    ours = {name: p.grad.clone() for name, p in learner.student.named_parameters() if p.grad is not None}
    learner.student.zero_grad()
    expected = torch.zeros(())
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        n = len(completion)
        p = alone(learner.student, prompt, completion, learner.method.scoring.vocab_size, 0.9)
        w = alone(learner.teacher, prompt, completion, learner.method.scoring.vocab_size, 0.9)
        score = (p.gather(1, completion[:, None])[:, 0] * advantage[i, :n]).sum()
        expected = expected - score + (direct[i, :n] * (p.exp() * (p - w)).sum(1)).sum()
    (expected / size).backward()
    theirs = {name: p.grad for name, p in learner.student.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name in ours:  # float32 sums over some 400 tokens, and ratios that are 1 up to rounding
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5 * largest, rtol=2e-4)

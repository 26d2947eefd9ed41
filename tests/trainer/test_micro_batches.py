"""Micro-batches of completions of like length, as wide as their longest: their making, and that nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import gradients
from tiny_pair import learner_of, settings

from cmdp_fast import batches, packed, reading, unmasked
from cmdp_fast.credit import at_last_token
from cmdp_fast.trainer.experience import Experience
from cmdp_fast.trainer.micro_batches import lengths_of, split, split_into
from cmdp_fast.unmasked import Lengths


def test_bounds_and_order():
    lengths = Lengths([2, 5, 1, 1, 2], [3, 3, 9, 1, 3])
    parts = split([4, 3, 2, 1, 0], lengths, count=2)
    assert [(part.rows, part.prompt, part.completion, part.tokens) for part in parts] == [
        ([2, 1], 5, 9, 18),
        ([4, 0], 2, 3, 10),
        ([3], 1, 1, 2),
    ]
    assert [part.padded for part in parts] == [28, 10, 2]
    # 16 places: the second has 10 for itself, and 8 for each of two; the count still holds
    assert [part.rows for part in split(range(5), lengths, count=9, tokens=16)] == [[2], [1, 0], [4, 3]]
    assert [part.rows for part in split(range(5), lengths, count=1, tokens=16)] == [[2], [1], [0], [4], [3]]
    assert [part.rows for part in split(range(5), lengths, count=9, tokens=1)] == [[2], [1], [0], [4], [3]]
    (empty,) = split([0], Lengths([0], [0]), count=3, tokens=7)
    assert (empty.prompt, empty.completion, empty.tokens) == (1, 1, 0)
    assert split([], lengths, count=3) == []


def test_equal_lengths_keep_their_order():
    lengths = Lengths([4] * 6, [7] * 6)
    assert [part.rows for part in split([5, 0, 3, 1], lengths, count=3)] == [[5, 0, 3], [1]]


def test_the_largest_are_halved_until_there_are_as_many():
    lengths = Lengths([1] * 5, [8, 6, 2, 1, 1])
    parts = split(range(5), lengths, count=5)
    for number in range(1, 6):
        found = split_into(number, parts, lengths)
        assert len(found) == number and [row for part in found for row in part.rows] == [0, 1, 2, 3, 4]
    assert [part.rows for part in split_into(3, parts, lengths)] == [[0], [1], [2, 3, 4]]


def test_padding_of_lengths_like_those_of_reasoning():
    """512 log-normal completions with median 300 and limit 1024, in minibatches of 64, and all of them in scoring."""
    generator = torch.Generator().manual_seed(0)
    drawn = (300 * (1.2 * torch.randn(512, generator=generator)).exp()).clamp(1, 1024).long().tolist()
    lengths = Lengths([0] * 512, drawn)

    def padding(groups: Sequence[Sequence[int]], **bounds: int) -> float:
        parts = [part for rows in groups for part in split(rows, lengths, **bounds)]
        assert sum(part.tokens for part in parts) == sum(drawn)
        return sum(part.padded for part in parts) / sum(drawn)

    minibatches = [range(start, start + 64) for start in range(0, 512, 64)]
    assert 512 * max(drawn) / sum(drawn) == pytest.approx(2.33, abs=0.02)
    assert padding(minibatches, count=64, tokens=8192) < 1.27
    assert padding(minibatches, count=8) < 1.27
    assert padding([range(512)], count=512, tokens=8192) < 1.08
    assert padding([range(512)], count=8) < 1.08


# ------------------------------------------------------------------------------------- nothing changes


def unlike(prompts: list[list[int]], **given: Any) -> dict[str, Any]:
    """Completions of 1 to 6 tokens, the first of one token, the second of as many as there may be."""
    lengths = [1, 6, 2, 3, 1, 4, 2, 5, 3, 3, 1, 2]
    return {"completion_ids": [[3 + (i + 2 * t) % 9 for t in range(lengths[i % 12])] for i in range(len(prompts))]}


def untrimmed(learner: Any, experience: Experience, constraint: Any) -> Experience:
    """The same completions read and settled at once, each as wide as the longest."""
    rollout, method = experience.rollout, learner.method
    with torch.no_grad():
        outputs = tuple(learner.collector.outputs(model, rollout) for model in (learner.student, learner.teacher))
        last = at_last_token(experience.task_reward, rollout.mask)
        models = (learner.student, learner.teacher)
        settled = learner.collector.scoring.constrained_reward(
            models, outputs, rollout.tokens, last, mask=rollout.mask, constraint=constraint
        )
        value = None
        if method.value_head is not None:
            value = torch.where(rollout.mask, method.value_head(outputs[0]), 0.0)
    given = {**vars(experience), **settled._asdict(), "last_reward": last, "value": value, "teacher_outputs": None}
    return Experience(**given)


MODES = {"by count": {"micro_batch_size": 5}, "by tokens": {"micro_batch_tokens": 30}, "alone": {"micro_batch_size": 1}}
METHODS: dict[str, dict[str, Any]] = {
    "cmdp": {"baseline": "position_rloo"},
    "jsd, full logits": {"baseline": "rloo", "cost": "jsd", "logits": "full", "budget": 0.5},
    "gae": {"baseline": "gae"},
    "minillm": {"algorithm": "minillm"},
    "gkd": {"algorithm": "gkd", "jsd_beta": 0.5},
    "sft": {"algorithm": "sft"},
    "kd": {"algorithm": "kd"},
}


@pytest.mark.parametrize("cached", [512, 0])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_those_of_the_untrimmed_batch(method, cached, pair):
    learner, rows, prompts = learner_of(settings(pair, teacher_cache_mb=cached, **METHODS[method]))
    prompts = [ids[-n:] for n, ids in zip((1, 3, 99), prompts, strict=True)]  # of different lengths
    learner.collector.rollout = unlike
    for model in (learner.student, learner.teacher):
        model.double()
    if learner.method.value_head is not None:
        torch.nn.init.normal_(learner.method.value_head.linear.weight)
    constraint = learner.constraint()
    group = [[item for item in items for _ in range(4)] for items in (rows, prompts)]
    experience = learner.method.collect(*group, constraint)
    assert (experience.teacher_outputs is None) == (cached == 0)
    lengths = lengths_of(experience.rollout)
    assert len(set(lengths.completions)) > 1 and len(set(lengths.prompts)) > 1

    whole = untrimmed(learner, experience, constraint)
    ours = (experience.stats, experience.trace, experience.reward, experience.last_reward, experience.value)
    theirs = (whole.stats, whole.trace, whole.reward, whole.last_reward, whole.value)
    batches.united([ours, theirs], lambda both: torch.testing.assert_close(*both))
    targets = learner.method.targets(whole, constraint)
    over = len(whole.rollout) if learner.method.mean_over == "completions" else int(whole.rollout.mask.sum())
    loss, _, outputs = learner.method.loss(whole, targets, constraint, over)
    learner.backward(loss, outputs)
    trained = torch.nn.ModuleList([learner.student, *filter(None, [learner.method.value_head])])
    expected = gradients(trained)
    assert len(expected) == len(list(trained.parameters()))

    for name, changes in MODES.items():
        learner.collector.splitter.config = settings(pair, **METHODS[method], **changes)
        metrics = learner._accumulate(experience, targets, constraint, torch.randperm(12), lengths)
        found = gradients(trained)
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-6, atol=1e-7, msg=name)
        for weight, gradient in expected.items():
            near = 1e-9 if gradient.dtype == torch.float64 else 1e-5 * gradient.abs().max().item()  # the value head's
            torch.testing.assert_close(found[weight], gradient, rtol=1e-6, atol=near, msg=f"{name}, {weight}")


def test_micro_batches_are_as_wide_as_their_longest(pair):
    """12 completions of 33 tokens: what goes through the models is counted in scoring, and in the update again."""
    learner, rows, prompts = learner_of(settings(pair, epochs=1, minibatch_size=12, micro_batch_size=1))
    learner.collector.rollout = unlike
    read: list[int] = []
    for model in (learner.student, learner.teacher):
        model.get_input_embeddings().register_forward_hook(lambda _, ids, __: read.append(ids[0].numel()))
    learner.step(rows, [ids[-n:] for n, ids in zip((1, 3, 99), prompts, strict=True)])
    splitter, real = learner.collector.splitter, 33 + 4 * (1 + 3 + len(prompts[2]))
    assert splitter.real_tokens == splitter.padded_tokens == 2 * real
    assert len(read) == 36 and sum(read) == 3 * (real - 12)  # nobody reads a completion's last token; the teacher once


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("algorithm", ["ppo", "minillm"])
def test_lengths_that_the_host_knows_are_not_asked_for(algorithm, padding_free, pair, monkeypatch):
    """For each micro-batch it would wait for the device, and the layout is that of the lengths that it would get."""
    learner, rows, prompts = learner_of(settings(pair, algorithm=algorithm, padding_free=padding_free))
    learner.collector.rollout = unlike
    asked, made = [], []
    measure, lay_out = unmasked._lengths, unmasked.unmasked
    monkeypatch.setattr(unmasked, "_lengths", lambda given: asked.append(given) or measure(given))
    for module in (packed, reading):
        monkeypatch.setattr(module, "unmasked", lambda given: made.append(given) or lay_out(given))
    learner.step(rows, prompts)
    assert not asked and made
    for completions in made:
        assert completions.lengths == measure(completions)

"""Rollout and step."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny_pair import learner_of, settings, tiny_model, untimed
from transformers import AutoModelForCausalLM, AutoTokenizer

import cmdp_fast as cf
from cmdp_fast.credit import at_last_token
from cmdp_fast.errors import InputError
from cmdp_fast.files import as_json
from cmdp_fast.reading import completion_hidden, completion_logits
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.models.saving import save_student
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.rollout import completion_mask, generate
from cmdp_fast.trainer.step import minibatches
from cmdp_fast.trainer.tasks.data import shuffled


def test_completion_mask():
    eos = (2, 7)
    tokens = torch.tensor([[5, 2, 2, 2], [5, 6, 5, 6], [2, 2, 2, 2], [5, 6, 5, 7], [7, 5, 5, 2]])
    mask = completion_mask(tokens, eos)
    assert mask.sum(1).tolist() == [2, 4, 1, 4, 1]  # the end counts, what follows does not
    assert (mask.long().diff(dim=1) <= 0).all()


def test_at_last_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    placed = at_last_token(torch.tensor([1.0, 2.0, 3.0]), mask)
    assert placed.tolist() == [[0, 1, 0], [0, 0, 2], [3, 0, 0]]


def test_shuffled_visits_everything_equally():
    batches = shuffled(10, 4, seed=0)
    seen = [i for _ in range(5) for i in next(batches)]
    assert sorted(seen) == sorted([*range(10)] * 2)
    assert sorted(seen[:10]) == list(range(10))
    assert len(next(shuffled(3, 8, seed=0))) == 8


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("keeps", [True, False])
def test_completion_hidden_is_what_the_head_turns_into_completion_logits(pair, family, keeps, tmp_path):
    """For prompts of different lengths, and for a model that knows no logits_to_keep."""
    learner, _, prompts = learner_of(settings(pair))
    rollout = generate(learner.student, [prompts[0], prompts[1] * 2, prompts[2][:1]], learner.collector.sampling)
    assert not rollout.prompt_mask.all()
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, seed=3, family=family))
    if not keeps:
        forward = model.forward
        model.forward = lambda logits_to_keep=0, **inputs: forward(**inputs)
    logits, hidden = completion_logits(model, rollout), completion_hidden(model, rollout)
    assert logits.shape[:2] == hidden.shape[:2] == rollout.tokens.shape
    torch.testing.assert_close(cf.head_of(model).logits(hidden), logits)


def test_rollout_samples_the_whole_softmax(pair):
    """The model's own top-k or penalties would make the sampled distribution another than the one that is scored.

    The vocabulary is wider than the 50 columns to which `generate` restricts itself if nothing is said.
    """
    learner, _, prompts = learner_of(settings(pair))
    learner.student.resize_token_embeddings(120, mean_resizing=False)
    own = learner.student.generation_config
    own.top_k, own.repetition_penalty, own.do_sample = 1, 3.0, True
    torch.manual_seed(0)
    rollout = generate(
        learner.student, prompts[:1] * 8000, dataclasses.replace(learner.collector.sampling, max_new_tokens=1)
    )
    assert learner.student.generation_config is own and own.top_k == 1
    counts = torch.bincount(rollout.tokens[:, 0], minlength=120)
    with torch.no_grad():
        p = learner.student(torch.tensor(prompts[:1])).logits[0, -1].softmax(-1)
    assert p.sort(descending=True).values[50:].sum() > 0.05  # or a top-k of 50 would not show
    # counts are binomial: 5 deviations at each column
    assert ((counts - 8000 * p).abs() <= 5 * (8000 * p * (1 - p)).sqrt() + 1).all()


def test_columns_that_the_teacher_lacks_are_not_sampled(pair):
    learner, _, prompts = learner_of(settings(pair))
    learner.student.resize_token_embeddings(40, mean_resizing=False)
    with torch.no_grad():
        learner.student.get_output_embeddings().weight[20:] = learner.student.get_output_embeddings().weight[5]
    sampling = dataclasses.replace(learner.collector.sampling, suppress=tuple(range(20, 40)))
    assert generate(learner.student, prompts * 50, sampling).tokens.max() < 20


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("cmdp", {}),
        ("cmdp", {"cost": "forward_kl"}),
        ("cmdp", {"cost": "k1"}),
        ("cmdp", {"baseline": "grpo"}),
        ("cmdp", {"mixed_precision": "bf16"}),
        ("hinge", {"baseline": "rloo"}),
        ("saute", {"cost": "k3"}),
        ("lagrangian", {"coefficient": 0.5}),
        ("pid", {"coefficient": 0.1}),
        ("barrier", {"coefficient": 0.5}),
        ("worst_case", {"cost": "nll", "prefix_budget": 3.0}),
    ],
)
def test_a_step_of_every_kind(kind, changes, pair):
    learner, rows, prompts = learner_of(settings(pair, kind=kind, **changes))
    before = [p.clone() for p in learner.student.parameters()]
    metrics = learner.step(rows, prompts)
    assert all(math.isfinite(value) for value in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.student.parameters(), strict=True))
    assert all(p.grad is None for p in learner.teacher.parameters())
    direct = metrics["loss/direct"]
    assert direct > 0 if kind in ("cmdp", "hinge", "lagrangian", "barrier") and "k1" not in changes.values() else True
    if learner.constraint().action_dependent:
        assert direct == 0
    assert ("cmdp/lambda" in metrics) == (kind in ("lagrangian", "pid"))
    assert ("cmdp/prefix_satisfaction" in metrics) == (kind == "worst_case")


def test_direct_term_is_divided_like_the_advantage(pair):
    learner, rows, prompts = learner_of(settings(pair, kind="lagrangian", coefficient=0.5, baseline="grpo", epochs=1))
    rows, prompts = ([item for item in items for _ in range(4)] for items in (rows, prompts))
    constraint = learner.constraint()
    experience = learner.method.collect(rows, prompts, constraint)
    targets = learner.method.targets(experience, constraint)
    returns = experience.reward.sum(1).view(3, 4)
    deviation = returns.std(1, keepdim=True) + 1e-4
    scale = deviation.expand(3, 4).reshape(-1)
    expected = torch.where(experience.rollout.mask, 0.5 / scale[:, None], 0.0)
    torch.testing.assert_close(targets["direct"], expected)
    advantage = (returns - returns.mean(1, keepdim=True)) / deviation
    torch.testing.assert_close(targets["advantage"][:, 0].view(3, 4), advantage)


def test_failed_save_keeps_the_earlier_student(pair, tmp_path):
    learner, _, _ = learner_of(settings(pair))
    save_student(learner.student, learner.collector.tokenizer, tmp_path)

    class Broken:
        def save_pretrained(self, _):
            raise OSError("disk full")

    with pytest.raises(InputError, match="student could not be written: disk full"):
        save_student(learner.student, Broken(), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").eos_token == "."
    save_student(learner.student, learner.collector.tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_json_has_no_nan():
    assert json.loads(as_json({"a": [math.nan, (1.0, -math.inf)], "b": {"c": 0.5}})) == {
        "a": [None, [1.0, None]],
        "b": {"c": 0.5},
    }


def test_first_pass_has_ratio_one(pair):
    """Scoring and update see the same policy: were dropout or a cache in the way, the ratio would show it."""
    learner, rows, prompts = learner_of(settings(pair, epochs=1, minibatch_size=12, clip_low=1e-4, clip_high=1e-4))
    metrics = learner.step(rows, prompts)
    assert metrics["approx_kl"] < 1e-9  # half the square of a log-ratio that is rounding alone
    assert metrics["clip_ratio/region_mean"] == 0


def test_seed_reaches_the_sampling(pair):
    tokens = []
    for seed in (0, 0, 1):
        learner, _, prompts = learner_of(settings(pair, seed=seed))
        tokens.append(generate(learner.student, prompts * 8, learner.collector.sampling).completion_ids())
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize(
    "count, size, expected",
    [(12, 6, [6, 6]), (12, 5, [4, 4, 4]), (13, 6, [5, 4, 4]), (34, 32, [17, 17]), (5, 32, [5]), (3, 1, [1, 1, 1])],
)
def test_minibatches_are_as_equal_as_can_be(count, size, expected):
    parts = minibatches(count, size)
    assert [len(part) for part in parts] == expected
    assert torch.cat(parts).sort().values.tolist() == list(range(count))


def test_an_update_takes_a_step_for_each_minibatch(pair, monkeypatch):
    learner, rows, prompts = learner_of(settings(pair, epochs=2, minibatch_size=5))
    sizes, accumulate = [], learner._accumulate
    monkeypatch.setattr(learner, "_accumulate", lambda *args: sizes.append(len(args[3])) or accumulate(*args))
    learner.step(rows, prompts)
    assert sizes == [4, 4, 4] * 2


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"micro_batch_size": 1},
            {"teacher_cache_mb": 0},
            {"logits": "full"},
            {"logits": "full", "teacher_cache_mb": 0},
        ),
        {"teacher_cache_cpu": True},
    ],
)
def test_memory_settings_change_no_result(change, pair):
    """One optimizer step, since Adam's first update is a sign: the norm of the gradient shows any difference."""
    results = []
    for changes in ({"micro_batch_size": 12}, change):
        config = settings(pair, epochs=1, minibatch_size=12, **changes)
        learner, rows, prompts = learner_of(config)  # seeds the random numbers
        results.append(untimed(learner.step(rows, prompts)))
    first, second = results
    assert first.keys() == second.keys() and first["grad_norm"] > 0.1
    for name in first:
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5), name


def test_metrics_are_means_over_tokens_however_they_are_split(pair):
    """With ratios other than 1, and completions of different lengths in the parts."""
    results = []
    for size in (12, 1):
        learner, rows, prompts = learner_of(settings(pair, epochs=1, minibatch_size=12, micro_batch_size=size))
        group = ([item for item in items for _ in range(4)] for items in (rows, prompts))
        experience = learner.method.collect(*group, learner.constraint())
        assert len(set(experience.rollout.mask.sum(1).tolist())) > 1
        noise = 0.4 * torch.randn(experience.stats.logprob.shape, generator=torch.Generator().manual_seed(0))
        experience.stats = experience.stats._replace(logprob=experience.stats.logprob + noise)
        constraint = learner.constraint()
        results.append(learner.update(experience, learner.method.targets(experience, constraint), constraint))
    whole, split = results
    assert whole["approx_kl"] > 0.01 and whole["clip_ratio/region_mean"] > 0
    for name in whole:
        assert split[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_evaluation_leaves_the_random_state_alone(pair):
    learner, rows, _ = learner_of(settings(pair))
    state = torch.get_rng_state()
    clock = Clock()
    first, _ = evaluate(learner.collector, learner.student, rows, clock)
    assert torch.equal(state, torch.get_rng_state())
    assert evaluate(learner.collector, learner.student, rows, clock)[0] == first
    assert clock.seconds.keys() == {"evaluation"}


def test_pure_divergence_loss_brings_the_student_closer(pair):
    """With nothing to earn and no budget left, steps only reduce the divergence."""
    config = settings(
        pair, kind="lagrangian", coefficient=1.0, steps=20, num_generations=16, minibatch_size=48, micro_batch_size=48
    )
    learner, rows, prompts = learner_of(config, nothing=lambda completions, **_: [0.0] * len(completions))
    kl = [learner.step(rows, prompts)["cmdp/cumulative_kl"] for _ in range(20)]
    assert sum(kl[-3:]) < 0.6 * sum(kl[:3])

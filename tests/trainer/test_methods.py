"""The methods beside PPO's modified rewards, the value head, and the budgets that move: each against its formula."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import get_args, get_type_hints

import pytest
import torch
from tiny_pair import learner_of, settings

from cmdp_fast import objective
from cmdp_fast.constraint import KINDS
from cmdp_fast.errors import InputError
from cmdp_fast.reading import completion_logits
from cmdp_fast.reference import COSTS
from cmdp_fast.trainer.methods import METHODS
from cmdp_fast.trainer.methods.method import Method, method_named
from cmdp_fast.trainer.methods.minillm import TeacherMixture, mean_of_later
from cmdp_fast.trainer.models.value_head import ValueHead, explained_variance
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.settings.constraint import budget_at, training_constraint
from cmdp_fast.trainer.settings.ranges import Range

ALGORITHMS = {
    "gkd": {"jsd_beta": 0.3},
    "gkd, from logits": {"logits": "full", "jsd_beta": 0.3},
    "gkd, reverse": {"jsd_beta": 1.0},
    "gkd, forward": {"jsd_beta": 0.0},
    "sft": {},
    "kd": {},
}


def log_softmaxes(learner, rollout):
    """Both models' log-probabilities in float64, the student's with a gradient."""
    with torch.no_grad():
        w = torch.log_softmax(completion_logits(learner.teacher, rollout).double(), -1)
    return torch.log_softmax(completion_logits(learner.student, rollout).double(), -1), w


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name in ours:  # float32 sums over some 60 tokens
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5 * largest, rtol=2e-4)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_supervised_losses_are_what_they_say(name, pair):
    algorithm = name.split(",")[0]
    learner, rows, prompts = learner_of(settings(pair, algorithm=algorithm, **ALGORITHMS[name]))
    rows, prompts = ([item for item in items for _ in range(4)] for items in (rows, prompts))
    constraint = learner.constraint()
    part = learner.method.collect(rows, prompts, constraint)
    mask, tokens = part.rollout.mask, part.rollout.tokens
    count = int(mask.sum())
    loss, _, outputs = learner.method.loss(part, learner.method.targets(part, constraint), constraint, count)
    learner.backward(loss, outputs)
    ours = gradients(learner.student)

    p, w = log_softmaxes(learner, part.rollout)
    beta = learner.config.jsd_beta
    if algorithm == "sft":
        value = -p.gather(2, tokens[..., None])[..., 0]
    elif algorithm == "kd" or beta == 0:
        value = (w.exp() * (w - p)).sum(-1)
    elif beta == 1:
        value = (p.exp() * (p - w)).sum(-1)
    else:
        m = ((1 - beta) * p.exp() + beta * w.exp()).log()
        value = beta * (w.exp() * (w - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)
    expected = value[mask].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    assert_same_gradients(ours, gradients(learner.student))


@pytest.mark.parametrize("algorithm", ["sft", "kd"])
def test_off_policy_methods_learn_from_the_teachers_text(algorithm, pair):
    learner, rows, prompts = learner_of(settings(pair, algorithm=algorithm, num_generations=400))
    rows, prompts = ([items[0]] * 4000 for items in (rows, prompts))
    first = learner.method.collect(rows, prompts, learner.constraint()).rollout.tokens[:, 0]
    with torch.no_grad():
        p, w = (
            model(torch.tensor(prompts[:1])).logits[0, -1].softmax(-1) for model in (learner.student, learner.teacher)
        )
    share = torch.bincount(first, minlength=len(w)) / 4000
    assert (share - w).abs().max() < 5 * 0.5 / 4000**0.5 < (share - p).abs().max()  # five binomial deviations


def test_a_mixture_is_sampled_as_one(pair):
    """Of the second token too, which both models predict from their caches, behind padding."""
    mix, temperature, count = 0.3, 0.8, 6000
    learner, rows, prompts = learner_of(
        settings(pair, algorithm="minillm", teacher_mix=mix, temperature=temperature, max_new_tokens=2)
    )
    prompts = [prompts[0], prompts[0] + prompts[1]] * (count // 2)  # the first is padded
    experience = learner.method.collect([rows[0]] * count, prompts, learner.constraint())
    tokens = experience.rollout.tokens

    def mixture(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            p, w = (
                (model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
                for model in (learner.student, learner.teacher)
            )
        return mix * w + (1 - mix) * p

    eos = learner.collector.sampling.eos[0]
    expected = torch.zeros(len(mixture(prompts[0])))
    for token, probability in enumerate(mixture(prompts[0]).tolist()):
        if token != eos:
            expected += probability * mixture(prompts[0] + [token])
    second = tokens[::2, 1][experience.rollout.mask[::2, 1]]
    share = torch.bincount(second, minlength=len(expected)) / (count // 2)
    assert (share - expected).abs().max() < 5 * 0.5 / (count // 2) ** 0.5

    # and what is written down as the policy that sampled is that mixture
    targets = learner.method.targets(experience, learner.constraint())
    ids, token = prompts[0], int(tokens[0, 0])
    assert targets["behaviour"][0, 0].item() == pytest.approx(math.log(mixture(ids)[token]), abs=1e-5)
    ratio = (experience.stats.logprob - targets["behaviour"]).exp()
    torch.testing.assert_close(targets["direct"], torch.where(experience.rollout.mask, ratio, 0.0))


def test_mixture_with_a_narrower_teacher_draws_nothing_beyond_it():
    teacher, student = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.5, 9.0, 9.0]])

    class Narrow:
        def __call__(self, **inputs):
            return type("Output", (), {"logits": teacher.expand(2, 1, 3), "past_key_values": None})()

    processor = TeacherMixture(Narrow(), torch.ones(2, 4, dtype=torch.bool), mix=0.3, temperatures=(0.5, 0.8))
    mixed = processor(torch.ones(2, 4, dtype=torch.long), student.expand(2, 5))
    assert torch.isneginf(mixed[:, 3:]).all()
    expected = 0.3 * (teacher / 0.8).softmax(-1) + 0.7 * (student[:, :3] / 0.5).softmax(-1)
    torch.testing.assert_close(mixed[:, :3].exp(), expected.expand(2, 3))


def test_mean_of_later():
    reward = torch.tensor([[1.0, 2.0, 4.0, 9.0], [3.0, 5.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    assert mean_of_later(reward, mask).tolist() == [[3, 4, 0, 0], [0, 0, 0, 0]]


def test_minillm_gradient_is_the_gradient_of_sequence_level_reverse_kl(pair):
    """Two tokens and no mixture: the normalised return is the plain one, so the expectation is exact."""
    config = settings(pair, algorithm="minillm", teacher_mix=0.0, max_new_tokens=2, num_generations=6000, epochs=1)
    learner, rows, prompts = learner_of(dataclasses.replace(config, micro_batch_size=6000))
    group = [rows[0]] * 6000, [prompts[0]] * 6000
    constraint = learner.constraint()
    part = learner.method.collect(*group, constraint)
    loss, _, outputs = learner.method.loss(
        part, learner.method.targets(part, constraint), constraint, len(part.rollout)
    )
    learner.backward(loss, outputs)
    ours = torch.cat([g.flatten() for g in gradients(learner.student).values()])

    ids, vocabulary = prompts[0], len(learner.collector.tokenizer)
    paths = torch.tensor([[*ids, token] for token in range(vocabulary)])
    p, w = (torch.log_softmax(model(paths).logits[:, -2:], -1) for model in (learner.student, learner.teacher))
    first = p[0, 0]
    later = (p[:, 1].exp() * (p[:, 1] - w[:, 1])).sum(-1)
    later = torch.where(torch.arange(vocabulary) == learner.collector.sampling.eos[0], 0.0, later)
    ((first.exp() * (first - w[0, 0])).sum() + (first.exp() * later).sum()).backward()
    exact = torch.cat([g.flatten() for g in gradients(learner.student).values()])
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.99
    assert ours.norm().item() == pytest.approx(exact.norm().item(), rel=0.1)


def test_gae_takes_its_baseline_from_the_value_head(pair):
    learner, rows, prompts = learner_of(settings(pair, baseline="gae", gae_lambda=0.7, num_generations=1))
    with torch.no_grad():
        learner.method.value_head.linear.weight.normal_()
    constraint = learner.constraint()
    experience = learner.method.collect(rows, prompts, constraint)
    mask = experience.rollout.mask
    hidden = learner.collector.outputs(learner.student, experience.rollout)
    torch.testing.assert_close(experience.value, torch.where(mask, learner.method.value_head(hidden), 0.0))
    targets = learner.method.targets(experience, constraint)
    advantage, value = objective.gae(experience.reward, experience.value, mask=mask, lam=0.7)
    torch.testing.assert_close(targets["advantage"], advantage)
    torch.testing.assert_close(targets["value"], value)


def test_the_value_head_learns_and_the_policy_does_not_feel_it(pair):
    """The prompt alone says what a completion is worth here, and the hidden states know the prompt."""
    config = settings(pair, baseline="gae", gae_lambda=1.0, value_learning_rate=0.03, learning_rate=1e-9, epochs=8)
    learner, rows, prompts = learner_of(
        dataclasses.replace(config, budget=1e3), note=lambda completions, note, **_: [float(n) for n in note]
    )
    explained = [learner.step(rows, prompts)["value/explained_variance"] for _ in range(20)]
    assert explained[0] == 0 and sum(explained[-5:]) / 5 > 0.4

    part = learner.method.collect(rows, prompts, learner.constraint())
    targets = learner.method.targets(part, learner.constraint())
    loss, metrics, outputs = learner.method.loss(part, targets, learner.constraint(), len(rows))
    assert metrics["loss/value"] > 0
    learner.backward(loss, outputs)
    with_head = gradients(learner.student)
    learner.method.value_head = None
    loss, _, outputs = learner.method.loss(part, targets, learner.constraint(), len(rows))
    learner.backward(loss, outputs)
    assert_same_gradients(with_head, gradients(learner.student))


def test_explained_variance():
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    target = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    assert explained_variance(target, target, mask) == 1
    assert explained_variance(torch.full_like(target, 5.0), target, mask) == 0
    assert explained_variance(-target, target, mask) == pytest.approx(-3.0)
    assert explained_variance(target, torch.ones_like(target), mask).isnan()
    assert ValueHead(4)(torch.randn(2, 3, 4).bfloat16()).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("logits", ["tiled", "full"])
def test_cost_jsd_has_both_terms_of_the_gradient(pair, logits):
    config = settings(pair, cost="jsd", jsd_beta=0.3, logits=logits, kind="hinge", budget=0.2, baseline="rloo")
    learner, rows, prompts = learner_of(config)
    constraint = learner.constraint()
    group = ([item for item in items for _ in range(4)] for items in (rows, prompts))
    part = learner.method.collect(*group, constraint)
    mask = part.rollout.mask
    p, w = log_softmaxes(learner, part.rollout)
    m = (0.7 * p.exp() + 0.3 * w.exp()).log()
    cost = torch.where(mask, 0.3 * (w.exp() * (w - m)).sum(-1) + 0.7 * (p.exp() * (p - m)).sum(-1), 0.0)
    longest = torch.where(mask, cost, 0.0).max().item()
    assert learner.collector.measure(part, constraint)["cmdp/max_token_cost"] == pytest.approx(longest, rel=1e-5)
    torch.testing.assert_close(part.trace.cumulative, torch.where(mask, cost.cumsum(1), part.trace.cumulative).float())
    targets = learner.method.targets(part, constraint)
    assert (targets["direct"] > 0).any()

    loss, _, outputs = learner.method.loss(part, targets, constraint, len(mask))
    learner.backward(loss, outputs)
    ours = gradients(learner.student)
    logprob = p.gather(2, part.rollout.tokens[..., None])[..., 0]
    score = torch.where(mask, logprob * targets["advantage"], 0.0).sum()
    (((targets["direct"] * cost).sum() - score) / len(mask)).backward()
    assert_same_gradients(ours, gradients(learner.student))
    assert learner.step(rows, prompts)["cmdp/mean_cumulative"] > 0


def test_budget_of_a_schedule(pair):
    config = settings(pair, budget=2.0, budget_start=6.0, budget_steps=4)
    assert [budget_at(config, step) for step in range(6)] == [6, 5, 4, 3, 2, 2]
    assert budget_at(settings(pair, budget=2.0), 0) == 2
    learner, rows, prompts = learner_of(config)
    assert [learner.step(rows, prompts)["cmdp/budget"] for _ in range(2)] == [6, 5]


def test_budget_a_token(pair):
    learner, rows, prompts = learner_of(settings(pair, budget=0.25, budget_per_token=True))
    experience = learner.method.collect(rows, prompts, learner.constraint())
    length = experience.rollout.mask.sum(1)
    first = experience.stats.reverse_kl[:, 0]
    torch.testing.assert_close(experience.trace.remaining[:, 0], 0.25 * length - first)


def test_costs_of_sampled_tokens_may_be_clamped(pair):
    learner, rows, prompts = learner_of(settings(pair, cost="k3", cost_clamp=0.01))
    experience = learner.method.collect(rows, prompts, learner.constraint())
    cost = experience.trace.cumulative.diff(dim=1, prepend=torch.zeros(len(rows), 1))
    assert cost.max().item() == pytest.approx(0.01, rel=1e-5)
    metrics = learner.method.collector.measure(experience, learner.constraint())
    assert metrics["cmdp/max_token_cost"] == pytest.approx(0.01, rel=1e-5) and "cmdp/never_violated" in metrics


def test_worst_case_bounds_prefix_means_of_the_teachers_likelihood(pair):
    config = settings(pair, kind="worst_case", cost="nll", prefix_budget=1.5, budget=9.0)
    constraint = training_constraint(config, 0, None)
    assert (constraint.budget, constraint.reduction, constraint.cost) == (1.5, "mean", "nll")
    learner, rows, prompts = learner_of(config)
    experience = learner.method.collect(rows, prompts, learner.constraint())
    mask = experience.rollout.mask
    mean = -experience.stats.teacher_logprob.cumsum(1) / torch.arange(1, mask.shape[1] + 1)
    torch.testing.assert_close(experience.trace.cumulative[mask], mean[mask])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"baseline": "gae", "logits": "full"}, "--logits tiled"),
        ({"kind": "worst_case", "cost": "nll"}, "--prefix-budget"),
        ({"cost_clamp": 5.0}, "--cost-clamp would take the gradient of --cost reverse_kl"),
        ({"budget_steps": 3}, "--budget-start"),
        ({"teacher_mix": 1.0}, "--teacher-mix"),
        ({"algorithm": "minillm", "num_generations": 1}, "--num-generations"),
        ({"algorithm": "dpo"}, "--algorithm must be one of ppo"),
    ],
)
def test_settings_that_do_not_go_together(changes, expected, pair):
    with pytest.raises(InputError, match=expected):
        settings(pair, **changes)


def test_costs_and_kinds_are_all_offered():
    offered = get_type_hints(TrainConfig)
    assert get_args(offered["cost"]) == tuple(COSTS)
    assert set(get_args(offered["kind"])) == set(KINDS)


def test_the_table_of_methods_is_the_choices_and_the_classes():
    for name in METHODS:
        method = method_named(name)
        assert issubclass(method, Method) and not method.__abstractmethods__
    with pytest.raises(InputError, match=f"--algorithm must be one of {', '.join(METHODS)}, not dpo"):
        dataclasses.replace(TrainConfig(student="s", teacher="t", task="t"), algorithm="dpo").validate()


def ranges() -> dict[str, Range]:
    hints = get_type_hints(TrainConfig, include_extras=True)
    extras = {name: getattr(kind, "__metadata__", ()) for name, kind in hints.items()}
    return {name: extra for name, some in extras.items() for extra in some if isinstance(extra, Range)}


@pytest.mark.parametrize("name", ranges())
def test_a_number_outside_its_range_is_refused(name):
    option = f"--{name.replace('_', '-')}"
    finite = "must be a finite number, not"
    for value, says in ((-1, ranges()[name].says), (math.nan, finite), (math.inf, finite)):
        config = dataclasses.replace(TrainConfig(student="s", teacher="t", task="t"), **{name: value})
        with pytest.raises(InputError, match=rf"^{option} {re.escape(says)} {value}$"):
            config.validate()

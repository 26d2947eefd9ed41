"""The KL penalty against the teacher, in the reward (`kl_reward`) and in the loss (`kl_loss`): its value, its gradient,
and what it is measured by. `tests/integrations/test_trl_kl_penalty.py` holds both against TRL's trainers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from exact import Problem, Setting, bandit, roll_out, tree
from tiny_pair import learner_of, settings

import cmdp_fast as cf
from cmdp_fast import objective
from cmdp_fast.errors import InputError
from cmdp_fast.reading import completion_logits
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.methods.kl_loss import k3
from cmdp_fast.trainer.parse import parse
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.settings.constraint import evaluation_constraint
from cmdp_fast.trainer.step import Learner

KL_LOSS = {"algorithm": "kl_loss", "kind": "lagrangian", "cost": "k3", "coefficient": 0.3, "baseline": "grpo"}
KL_REWARD = {"kind": "lagrangian", "cost": "k1", "coefficient": 0.3, "baseline": "rloo"}


def collected(learner: Learner, rows: list, prompts: list):
    group = ([item for item in items for _ in range(4)] for items in (rows, prompts))
    return learner.method.collect(*group, learner.constraint())


# --------------------------------------------------------------------------------------------------------------
# k3


@pytest.mark.parametrize("problem", [bandit(), tree()], ids=["bandit", "tree"])
def test_the_gradient_of_k3_is_that_of_forward_kl_where_the_student_goes(problem: Problem):
    """Over all paths, in float64: the expected k3 is reverse KL, its expected gradient at a sampled token is that of
    forward KL at the state; that of reverse KL is another, and is k3's with the ratio that corrects it."""
    generator = torch.Generator().manual_seed(0)
    start = problem.teacher.log() + 0.8 * torch.randn(problem.teacher.shape, dtype=torch.float64, generator=generator)
    theta = start.requires_grad_()
    rollout = roll_out(problem, theta, Setting("hinge", 1.0))
    teacher = problem.teacher.log()[problem.state].gather(2, problem.tokens[..., None])[..., 0]
    stats = cf.token_stats(theta[problem.state], problem.teacher.log()[problem.state], problem.tokens)
    share = rollout.probability[:, None]
    penalty = (share * k3(rollout.logprob, teacher)).sum()
    torch.testing.assert_close(penalty, (share * stats.reverse_kl).sum())

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((share * value).sum(), theta, retain_graph=True)[0]

    torch.testing.assert_close(gradient(k3(rollout.logprob, teacher)), gradient(stats.forward_kl))
    ratio = (rollout.logprob - rollout.logprob.detach()).exp()
    torch.testing.assert_close(gradient(ratio * k3(rollout.logprob, teacher)), gradient(stats.reverse_kl))
    assert (gradient(stats.forward_kl) - gradient(stats.reverse_kl)).abs().max() > 0.01


def verls(logprob: torch.Tensor, teacher_logprob: torch.Tensor) -> torch.Tensor:
    """`low_var_kl` of verl 0.9.1 (core_algos.kl_penalty_forward), by its formula."""
    log_ratio = (teacher_logprob - logprob).clamp(-20, 20)
    return (log_ratio.exp() - log_ratio - 1).clamp(-10, 10)


def test_a_clamp_of_10_is_verls_in_value_and_gradient():
    """Without a NaN in the gradient where the exponential overflows, or where the teacher excludes the token."""
    log_ratio = torch.tensor([0.0, 0.5, -0.5, 2.6, 3.0, -10.9, -12.0, -15.0, 19.0, 60.0, 120.0, -math.inf])
    found, expected = ((-torch.ones_like(log_ratio)).requires_grad_() for _ in range(2))
    ours = k3(found, log_ratio - 1, clamp=10.0)
    theirs = verls(expected, log_ratio - 1)
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    assert found.grad[3] < -1 and found.grad[5] > 0.9 and not found.grad[6:].any()


@pytest.mark.parametrize("clamp", [None, 10.0])
def test_of_a_token_that_the_student_excludes_it_is_infinite_without_a_gradient(clamp):
    """inf - inf is NaN. What is not known stays so, and what both exclude."""
    logprob = torch.tensor([-math.inf, -1.0, -math.inf, math.nan], requires_grad=True)
    teacher = torch.tensor([-1.0, -1.5, -math.inf, -1.0])
    value = k3(logprob, teacher, clamp)
    assert value[0] == (math.inf if clamp is None else clamp) and value[2:].isnan().all()
    value[:2].sum().backward()
    assert logprob.grad[0] == 0 and logprob.grad[1] == pytest.approx(-math.expm1(-0.5))


def test_without_a_clamp_it_is_the_cost_k3_with_a_gradient():
    log_ratio = torch.tensor([0.0, 1e-4, 2.6, 30.0, -30.0])
    logprob = (-torch.ones_like(log_ratio)).requires_grad_()
    value = k3(logprob, log_ratio - 1)
    zero = torch.zeros_like(log_ratio)
    stats = cf.TokenStats(logprob, log_ratio - 1, zero, zero, zero, zero)
    torch.testing.assert_close(value.detach(), cf.token_cost(stats, "k3"))
    value.sum().backward()
    torch.testing.assert_close(logprob.grad, -torch.expm1(log_ratio - 1 - logprob.detach()))


# --------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize(
    "changes", [{}, {"cost_clamp": 0.2}, {"logits": "full", "kl_loss_correction": True}, {"baseline": "position_rloo"}]
)
def test_kl_loss_is_the_tasks_advantage_and_k3_beside_it(changes, pair):
    """Against plain PyTorch on full logits, after the student has moved: a loss with a ratio and a clip."""
    learner, rows, prompts = learner_of(settings(pair, **(KL_LOSS | changes)))
    part = collected(learner, rows, prompts)
    targets = learner.method.targets(part, learner.constraint())
    task = torch.where(part.rollout.mask, part.reward, 0.0).sum(1)
    torch.testing.assert_close(task, part.task_reward)  # the penalty is no part of the reward
    if learner.config.baseline == "grpo":
        advantage = objective.grpo(task, 4)[0][:, None]
        torch.testing.assert_close(targets["advantage"], torch.where(part.rollout.mask, advantage, 0.0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learner.student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    loss, metrics, outputs = learner.method.loss(part, targets, learner.constraint(), len(part.rollout))
    learner.backward(loss, outputs)
    ours = [parameter.grad.clone() for parameter in learner.student.parameters()]
    learner.student.zero_grad()

    tokens, mask = part.rollout.tokens[..., None], part.rollout.mask
    p, q = (
        torch.log_softmax(completion_logits(model, part.rollout).double(), -1).gather(2, tokens)[..., 0]
        for model in (learner.student, learner.teacher)
    )
    ratio = (p - part.stats.logprob).exp()
    worth = targets["advantage"]
    surrogate = torch.minimum(ratio * worth, ratio.clamp(0.8, 1.2) * worth)
    log_ratio = q.detach() - p
    penalty = log_ratio.exp() - 1 - log_ratio
    if learner.config.cost_clamp:
        assert (penalty[mask] > 0.2).any() and (penalty[mask] < 0.2).any()
        penalty = penalty.clamp(max=0.2)
    if learner.config.kl_loss_correction:
        penalty = ratio * penalty
    expected = torch.where(mask, 0.3 * penalty - surrogate, 0.0).sum() / len(mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["loss/direct"].item() == pytest.approx(
        torch.where(mask, 0.3 * penalty, 0.0).sum().item() / len(mask), rel=1e-5
    )
    expected.backward()
    largest = max(parameter.grad.abs().max().item() for parameter in learner.student.parameters())
    for parameter, gradient in zip(learner.student.parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=2e-5 * largest, rtol=2e-4)  # float32 sums


@pytest.mark.parametrize("method", [KL_LOSS, KL_REWARD], ids=["kl_loss", "kl_reward"])
def test_a_large_coefficient_leads_to_the_teacher_and_none_does_not(method, pair):
    """In 12 steps with a reward that is always the same; the exact KL of the completions of a step."""
    sizes = {"num_generations": 16, "minibatch_size": 48, "micro_batch_size": 48, "epochs": 1}
    figures = {}
    for coefficient in (0.0, 10.0):
        torch.manual_seed(0)
        learner, rows, prompts = learner_of(
            settings(pair, **(method | sizes | {"coefficient": coefficient, "learning_rate": 0.02})),
            same=lambda completions, **_: [1.0] * len(completions),
        )
        kl = [learner.step(rows, prompts)["cmdp/cumulative_kl"] for _ in range(12)]
        figures[coefficient] = [sum(some) / 3 for some in (kl[:3], kl[-3:])]
    assert figures[0.0][1] > 0.7 * figures[0.0][0]
    assert figures[10.0][1] < 0.5 * figures[10.0][0]


def test_a_value_head_may_be_its_baseline(pair):
    config = settings(pair, **(KL_LOSS | {"baseline": "gae"}))
    learner, rows, prompts = learner_of(config, ones=lambda completions, **_: [1.0] * len(completions))
    metrics = learner.step(rows, prompts)
    assert metrics["loss/value"] > 0 and metrics["loss/direct"] > 0


# --------------------------------------------------------------------------------------------------------------
# The settings


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"kind": "cmdp"}, "cmdp and k3"),
        ({"kind": "pid"}, "pid and k3"),
        ({"cost": "reverse_kl"}, "lagrangian and reverse_kl"),
    ],
)
def test_kl_loss_has_one_cost_and_no_budget(changes, given, pair):
    expected = f"--algorithm kl_loss has k3 in its loss .*--kind lagrangian --cost k3, not {given}"
    with pytest.raises(InputError, match=expected):
        settings(pair, **(KL_LOSS | changes))


@pytest.mark.parametrize("words", ["--method kl_loss --cost forward_kl", "--method kl_loss --kind hinge"])
def test_kl_loss_refuses_another_on_the_command_line(words):
    with pytest.raises(InputError, match="--kind lagrangian --cost k3, not"):
        parse(["--recipe=tempting", *words.split()])


@pytest.mark.parametrize("method", ["kl_loss", "kl_reward"])
@pytest.mark.parametrize("recipe", ["quickstart", "tempting", "smollm2"])
def test_both_go_over_any_recipe(recipe, method):
    config = parse([f"--recipe={recipe}", f"--method={method}", "--coefficient=0.2"])
    assert (config.coefficient, config.kind) == (0.2, "lagrangian")


@pytest.mark.parametrize(
    ("changes", "measure"),
    [
        (KL_LOSS, "reverse_kl"),
        (KL_LOSS | {"cost_clamp": 1.0}, "reverse_kl"),
        (KL_REWARD, "reverse_kl"),
        (KL_REWARD | {"cost_clamp": 1.0}, "reverse_kl"),
        (KL_REWARD | {"kind": "cmdp"}, "k1"),  # which has a budget, and it is of k1
        (KL_REWARD | {"kind": "pid"}, "k1"),
        (KL_REWARD | {"cost": "forward_kl"}, "forward_kl"),
        (KL_REWARD | {"cost": "nll"}, "nll"),
    ],
)
def test_what_keeps_to_no_budget_is_measured_by_reverse_kl_and_not_by_its_estimate(changes, measure, pair):
    constraint = evaluation_constraint(settings(pair, **changes))
    assert constraint.cost == measure and (measure == "k1" or constraint.cost_clamp is None)


@pytest.mark.parametrize("method", [KL_LOSS, KL_REWARD], ids=["kl_loss", "kl_reward"])
def test_an_evaluation_counts_completions_by_their_exact_kl(method, pair):
    learner, rows, _ = learner_of(settings(pair, **method))
    figures, samples = evaluate(learner.collector, learner.student, rows * 4, Clock())
    kl = [sample["cumulative_kl"] for sample in samples]
    assert [sample["cumulative"] for sample in samples] == pytest.approx(kl, rel=1e-5)
    budget = sorted(kl)[len(kl) // 2]  # another budget than the default, that some keep and some do not
    config = dataclasses.replace(learner.config, budget=(budget + max(kl)) / 2)
    learner.collector.config = config
    figures, samples = evaluate(learner.collector, learner.student, rows * 4, Clock())
    within = [sample["cumulative_kl"] <= config.budget for sample in samples]
    assert 0 < sum(within) < len(within)
    assert figures["constraint_satisfaction"] == pytest.approx(sum(within) / len(within))

"""verl's loss with our policy loss and direct term: against the reference on whole distributions."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip(
    "verl", reason="verl 0.9 requires transformers<5.11, older than the one tested here; .ci/run installs it beside"
)

from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, get_policy_loss_fn
from verl_batch import PROMPTS, RESPONSES, Batch, composed, engine_outputs, loss_of, padded, parts

import cmdp_fast as cf
from cmdp_fast import objective, reference
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.constraint import constraint_from_settings
from cmdp_fast.integrations.verl import compute_cmdp_direct_term

BUDGET = 5.0
MASK = padded([torch.ones(r, dtype=torch.bool) for r in RESPONSES])
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def configured(*overrides: str, budget: float = BUDGET):
    return composed(f"algorithm.cmdp.budget={budget}", "algorithm.cmdp.discrepancy_weight=0.5", *overrides)


def merged_forward_kl(batch: Batch, logits: list[torch.Tensor]) -> torch.Tensor:
    """KL [B, T] of distributions in which all but the teacher's likeliest tokens are one, by the reference."""
    rows = []
    for student, teacher in zip(batch.response(logits), batch.response(batch.teacher), strict=True):
        order = teacher.argsort(-1, descending=True)
        ordered = (x.log_softmax(-1).gather(-1, order) for x in (student, teacher))
        k = batch.topk
        merged = [torch.cat([x[:, :k], x[:, k:].logsumexp(-1, keepdim=True)], -1) for x in ordered]
        rows.append(reference.divergence(*merged, "forward_kl"))
    return padded(rows)


def expected_loss(batch: Batch, logits: list[torch.Tensor], kind: str, budget: float) -> torch.Tensor:
    """Score term and direct term of the whole batch, a mean over its completions."""
    cost = merged_forward_kl(batch, logits)
    weight = {"cmdp": 0.5, "hinge": 0.5, "lagrangian": 0.25}[kind]
    over = torch.where(MASK, cost.detach(), 0.0).sum(1, keepdim=True) > budget
    direct = weight * (over.float() if kind != "lagrangian" else torch.ones_like(cost))
    new = padded(batch.logprob(logits))
    old = padded([x + s for x, s in zip(batch.logprob(batch.student), batch.shift, strict=True)])
    ratio, advantage = (new - old).exp(), padded(batch.advantages)
    score = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return torch.where(MASK, score + direct * cost, 0.0).sum() / len(PROMPTS)


@pytest.mark.parametrize("kind", ["cmdp", "hinge", "lagrangian"])
def test_loss_and_gradient_are_those_of_the_formula(kind: str) -> None:
    batch = Batch()
    budget = merged_forward_kl(batch, batch.student).mul(MASK).sum(1).sort().values[1:3].mean().item()  # half are over
    coefficient = ["algorithm.cmdp.coefficient=0.25"] if kind == "lagrangian" else []
    config = configured(f"algorithm.cmdp.kind={kind}", *coefficient, budget=budget)
    ours, theirs = ([x.clone().requires_grad_() for x in batch.student] for _ in range(2))
    loss, metrics = loss_of(batch, config, ours)
    expected = expected_loss(batch, theirs, kind, budget)
    assert torch.allclose(loss, expected, atol=1e-5)
    gradients = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    spent = merged_forward_kl(batch, batch.student).mul(MASK).sum()
    assert metrics["distillation/cmdp_spent"] == pytest.approx(spent.item() / len(PROMPTS), rel=1e-4)
    assert metrics["distillation/cmdp_cost"] == pytest.approx(spent.item() / sum(RESPONSES), rel=1e-4)
    assert 0 < metrics["distillation/teacher_mass"] < 1


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up_to_the_whole(mode: str) -> None:
    batch = Batch(1)
    config = configured(f"actor_rollout_ref.actor.loss_agg_mode={mode}", "actor_rollout_ref.actor.loss_scale_factor=7")
    whole, _ = loss_of(batch, config, batch.student)
    one, two = (loss_of(batch, config, batch.student, rows)[0] for rows in ([0, 3], [1, 2]))
    assert torch.allclose(one + two, whole, atol=1e-5)


def test_within_budget_there_is_no_direct_term() -> None:
    batch = Batch()
    within, _ = loss_of(batch, configured(budget=1e6), batch.student)
    over, _ = loss_of(batch, configured(budget=0.0), batch.student)
    assert within < over
    assert torch.allclose(within, expected_loss(batch, batch.student, "cmdp", 1e6), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [{}, dict(dp_size=2, batch_num_tokens=40, global_batch_size=16)])
@pytest.mark.parametrize("weights", [False, True])
def test_policy_loss_is_vanilla_without_the_second_clip(mode: str, shared: dict[str, int], weights: bool) -> None:
    torch.manual_seed(0)
    old, new, advantages = (torch.randn(4, 5) for _ in range(3))
    actor, _ = parts(
        configured("actor_rollout_ref.actor.clip_ratio_c=1000000000.0", "actor_rollout_ref.actor.clip_ratio_high=0.4")
    )
    actor.global_batch_info.clear()
    actor.global_batch_info.update(shared)
    values, gradients = [], []
    for function in (get_policy_loss_fn("cmdp"), compute_policy_loss_vanilla):
        logprob = new.clone().requires_grad_()
        loss, metrics = function(
            old_log_prob=old,
            log_prob=logprob,
            advantages=advantages,
            response_mask=MASK.long(),
            loss_agg_mode=mode,
            config=actor,
            rollout_is_weights=torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) if weights else None,
        )
        loss.backward()
        values.append((loss.detach(), torch.tensor(metrics["actor/pg_clipfrac"])))
        gradients.append(logprob.grad)
    for ours, theirs in [*zip(*values, strict=True), gradients]:
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_mean_over_the_tokens_of_a_completion_is_refused() -> None:
    actor, _ = parts(configured())
    with pytest.raises(InputError, match="loss_agg_mode=seq-mean-token-mean"):
        get_policy_loss_fn("cmdp")(*[torch.zeros(4, 5)] * 3, MASK.long(), "seq-mean-token-mean", actor)


@pytest.mark.parametrize("cost", ["k1", "k3", "nll"])
def test_a_sampled_cost_has_the_score_term_alone(cost: str) -> None:
    batch = Batch(topk=None)
    config = configured(f"algorithm.cmdp.cost={cost}", "distillation.distillation_loss.loss_mode=cmdp_sampled")
    loss, metrics = loss_of(batch, config, batch.student)
    assert torch.allclose(loss, expected_loss(Batch(topk=4), batch.student, "cmdp", 1e6), atol=1e-5)
    p, w = padded(batch.logprob(batch.student)), padded(batch.logprob(batch.teacher))
    by_name = {"k1": p - w, "k3": (w - p).exp() - 1 + (p - w), "nll": -w}
    expected = torch.where(MASK, by_name[cost], 0.0).sum() / sum(RESPONSES)
    assert metrics["distillation/cmdp_cost"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_weight_of_zero_takes_no_part_of_an_infinite_cost() -> None:
    batch = Batch()
    student = [x.clone() for x in batch.student]
    top = batch.teacher[0][PROMPTS[0] - 1].argmax()
    student[0][PROMPTS[0] - 1, top] = -torch.inf  # the teacher's likeliest token, impossible for the student
    actor, distillation = parts(composed("algorithm.cmdp.kind=saute", "algorithm.cmdp.budget=1.0"))
    data = batch.data()
    loss = partial(distillation_ppo_loss, config=actor, distillation_config=distillation)
    outputs = engine_outputs(batch, data, loss, student)
    assert torch.isinf(outputs["distillation_losses"].values()).any()
    with pytest.warns(UserWarning, match="saute"):
        terms, _ = compute_cmdp_direct_term(actor, distillation, outputs, data)
    assert not terms.any()


def test_a_mass_without_a_gradient_is_refused() -> None:
    """As Megatron's: the bucket would be a constant, and the gradient of the head alone points elsewhere."""
    batch = Batch()
    actor, distillation = parts(composed())
    data = batch.data()
    loss = partial(distillation_ppo_loss, config=actor, distillation_config=distillation)
    outputs = engine_outputs(batch, data, loss, [x.requires_grad_() for x in batch.student])
    outputs["student_mass"] = outputs["student_mass"].detach()
    with pytest.raises(InputError, match="has no gradient, so the bucket's would be lost"):
        loss(model_output=outputs, data=data)


def test_the_weights_are_the_objectives() -> None:
    """The indicator is that of the whole completion: its tokens before the crossing are weighed too."""
    cost = torch.tensor([[1.0, 2.0, 3.0]])
    for name, weight in (("forward_kl", 0.5), ("k1", 0.0)):
        constraint = constraint_from_settings({"budget": 2.0, "cost": name, "discrepancy_weight": 0.5}, "here")
        trace = cf.budget_trace(cost, constraint=constraint)
        assert torch.equal(objective.direct_coefficient(trace, constraint), torch.full((1, 3), weight))

"""verl's loss with our policy loss and direct term: against the reference on whole distributions."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip(
    "verl", reason="verl 0.9 requires transformers<5.11, older than the one tested here; .ci/run installs it beside"
)

from verl.trainer.distillation.losses import compute_topk_loss, distillation_ppo_loss
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, get_policy_loss_fn
from verl.utils.metric import Metric
from verl.workers.utils.padding import no_padding_2_padding
from verl_batch import (
    PROMPTS,
    RESPONSES,
    Batch,
    composed,
    engine_outputs,
    loss_function,
    loss_of,
    nested,
    padded,
    parts,
)

import cmdp_fast as cf
from cmdp_fast import objective, reference
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.constraint import constraint_from_settings
from cmdp_fast.integrations.verl import compute_cmdp_direct_term, costs
from cmdp_fast.integrations.verl.costs import cost_of_logits

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
    # two of the four are over budget by the lower bound already; one of the others is within it for certain
    assert (metrics["distillation/cmdp_refuted"], metrics["distillation/cmdp_certified"]) == (0.5, 0.25)


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
@pytest.mark.parametrize("second_clip", [1.1, 3.0, 1e9])
def test_policy_loss_is_vanilla(mode: str, shared: dict[str, int], weights: bool, second_clip: float) -> None:
    """Value, gradient and all that verl's dashboards show of it; nothing of padding, whatever stands there."""
    torch.manual_seed(0)
    old, new, advantages = (2 * torch.randn(4, 5) for _ in range(3))
    advantages[0, 1] = 0.0
    actor, _ = parts(
        configured(f"actor_rollout_ref.actor.clip_ratio_c={second_clip}", "actor_rollout_ref.actor.clip_ratio_high=0.4")
    )
    actor.global_batch_info.clear()
    actor.global_batch_info.update(shared)
    losses, metrics, gradients = [], [], []
    for name, function in (("cmdp", get_policy_loss_fn("cmdp")), ("vanilla", compute_policy_loss_vanilla)):
        logprob = new.clone().masked_fill(~MASK, torch.nan if name == "cmdp" else 0.0).requires_grad_()
        loss, figures = function(
            old_log_prob=old,
            log_prob=logprob,
            advantages=advantages,
            response_mask=MASK.long(),
            loss_agg_mode=mode,
            config=actor,
            rollout_is_weights=torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) if weights else None,
        )
        loss.backward()
        losses.append(loss.detach())
        metrics.append(figures)
        gradients.append(logprob.grad)
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-6) and torch.allclose(*gradients, rtol=1e-5, atol=1e-6)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    assert set(metrics[0]) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
    assert metrics[0]["actor/pg_clipfrac"] > 0 and (metrics[0]["actor/pg_clipfrac_lower"] > 0) is (second_clip < 1e9)


def test_a_mean_over_the_tokens_of_a_completion_is_refused() -> None:
    actor, _ = parts(configured())
    with pytest.raises(InputError, match="loss_agg_mode=seq-mean-token-mean"):
        get_policy_loss_fn("cmdp")(*[torch.zeros(4, 5)] * 3, MASK.long(), "seq-mean-token-mean", actor)


@pytest.mark.parametrize("clamp", [None, 0.25])
@pytest.mark.parametrize("cost", ["k1", "k3", "nll"])
def test_a_sampled_cost_has_the_score_term_alone(cost: str, clamp: float | None) -> None:
    batch = Batch(topk=None)
    clamped = () if clamp is None else (f"algorithm.cmdp.cost_clamp={clamp}",)
    config = configured(
        f"algorithm.cmdp.cost={cost}", *clamped, "distillation.distillation_loss.loss_mode=cmdp_sampled"
    )
    loss, metrics = loss_of(batch, config, batch.student)
    assert torch.allclose(loss, expected_loss(Batch(topk=4), batch.student, "cmdp", 1e6), atol=1e-5)
    p, w = padded(batch.logprob(batch.student)), padded(batch.logprob(batch.teacher))
    by_name = {"k1": p - w, "k3": (w - p).exp() - 1 + (p - w), "nll": -w}
    charged = by_name[cost] if clamp is None else by_name[cost].clamp(-clamp, clamp)
    expected = torch.where(MASK, charged, 0.0).sum() / sum(RESPONSES)
    assert metrics["distillation/cmdp_cost"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_weight_of_zero_takes_no_part_of_an_infinite_cost() -> None:
    batch = Batch()
    student = [x.clone() for x in batch.student]
    top = batch.teacher[0][PROMPTS[0] - 1].argmax()
    student[0][PROMPTS[0] - 1, top] = -torch.inf  # the teacher's likeliest token, impossible for the student
    config = composed("algorithm.cmdp.kind=saute", "algorithm.cmdp.budget=1.0")
    actor, distillation = parts(config)
    data = batch.data()
    outputs = engine_outputs(batch, data, loss_function(config), student)
    assert torch.isinf(outputs["cmdp_cost"].values()).any()
    with pytest.warns(UserWarning, match="saute"):
        terms, _ = compute_cmdp_direct_term(actor, distillation, outputs, data)
    assert not terms.any()


def test_a_worker_that_makes_no_cost_of_the_logits_is_refused() -> None:
    """verl's own has masses alone, whose rounding a bucket counts as divergence."""
    batch = Batch()
    actor, distillation = parts(composed())
    data = batch.data()
    loss = partial(distillation_ppo_loss, config=actor, distillation_config=distillation)
    outputs = engine_outputs(batch, data, loss, [x.requires_grad_() for x in batch.student])
    with pytest.raises(InputError, match=r"loss_mode=cmdp has no cost .* expected trainer\.v1\.trainer_mode=cmdp"):
        loss(model_output=outputs, data=data)


def test_the_weights_are_the_objectives() -> None:
    """The indicator is that of the whole completion: its tokens before the crossing are weighed too."""
    cost = torch.tensor([[1.0, 2.0, 3.0]])
    for name, weight in (("forward_kl", 0.5), ("k1", 0.0)):
        constraint = constraint_from_settings({"budget": 2.0, "cost": name, "discrepancy_weight": 0.5}, "here")
        trace = cf.budget_trace(cost, constraint=constraint)
        assert torch.equal(objective.direct_coefficient(trace, constraint), torch.full((1, 3), weight))


# ------------------------------------------------------------------------------------- the cost is made of the logits


def sure_batch() -> Batch:
    """A teacher that is sure of most tokens, and a student close to it: what tails of 1e-4 to 1e-9 cost."""
    batch = Batch(3)
    generator = torch.Generator().manual_seed(4)
    for i, teacher in enumerate(batch.teacher):
        teacher.scatter_add_(1, batch.tokens[i][:, None], 9 + 8 * torch.rand(len(teacher), 1, generator=generator))
        batch.student[i] = teacher + 0.05 * torch.randn(teacher.shape, generator=generator)
    return batch


def in_float64(batch: Batch, logits: list[torch.Tensor]) -> torch.Tensor:
    exact = Batch()
    exact.__dict__.update(batch.__dict__, teacher=[x.double() for x in batch.teacher])
    return merged_forward_kl(exact, [x.double() for x in logits])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunked", [False, True])
def test_no_dtype_and_no_setting_of_verls_makes_a_cost_of_rounding(dtype: torch.dtype, chunked: bool) -> None:
    batch = sure_batch()
    price = ("algorithm.cmdp.kind=lagrangian", "algorithm.cmdp.coefficient=0.5")  # of every token, if it costs 0 too
    config = configured(*price, f"distillation.distillation_loss.use_chunked_topk={chunked}".lower())
    logits = [x.to(dtype, copy=True).requires_grad_() for x in batch.student]
    loss, metrics = loss_of(batch, config, logits)
    exact_logits = [x.detach().double().requires_grad_() for x in logits]
    exact = in_float64(batch, exact_logits)
    spent = exact.mul(MASK).sum()
    # lowered by what the rounding of a message in float32 may have added to a token, so that it is a bound
    rounding, per_token = 1e-6, spent.item() / sum(RESPONSES)
    assert per_token - rounding < metrics["distillation/cmdp_cost"] <= per_token
    # the score term alone, to be taken off
    without = [x.detach().requires_grad_() for x in logits]
    score, _ = loss_of(batch, configured(budget=1e6), without)
    direct = 0.5 * spent / len(PROMPTS)
    lost = 0.5 * rounding * sum(RESPONSES) / len(PROMPTS)
    assert direct.item() - lost - 1e-6 < (loss - score).item() < direct.item() + 1e-6
    ours, theirs = torch.autograd.grad(loss, logits), torch.autograd.grad(score, without)
    expected = torch.autograd.grad(direct, exact_logits)
    for one, other, right in zip(ours, theirs, expected, strict=True):
        rounding = 5e-7 + 2 * torch.finfo(dtype).eps * one.abs().max().item()
        assert torch.allclose((one - other).double(), right, atol=rounding)


def test_verls_masses_would_have() -> None:
    """What the bucket of verl's own outputs counts in bfloat16 with `use_chunked_topk`: several times the cost."""
    batch = sure_batch()
    config = configured("distillation.distillation_loss.use_chunked_topk=true")
    actor, distillation = parts(config)
    logits = [x.bfloat16() for x in batch.student]
    data = batch.data()
    loss = partial(distillation_ppo_loss, config=actor, distillation_config=distillation)
    outputs = engine_outputs(batch, data, loss, logits)
    tails = [1 - no_padding_2_padding(outputs[name], data).float() for name in ("teacher_mass", "student_mass")]
    head = no_padding_2_padding(outputs["distillation_losses"], data)
    wrong = head + tails[0] * (tails[0].clamp(min=1e-7) / tails[1].clamp(min=1e-7)).log()
    exact = in_float64(batch, logits).mul(MASK).sum()
    assert (wrong.clamp(min=0.0).mul(MASK).sum() > 3 * exact).item()


def test_masses_and_the_part_of_the_k_tokens_are_verls_where_verl_is_right() -> None:
    batch = Batch()
    actor, distillation = parts(composed())
    data = batch.data()
    logits = torch.cat(batch.student)[None]
    theirs = compute_topk_loss(actor, distillation, data, logits, "thd")
    ours = cost_of_logits(logits, data)
    for name in ("student_mass", "teacher_mass"):
        assert torch.allclose(ours[name], theirs[name], atol=1e-6)
    outside = [1 - theirs[name] for name in ("teacher_mass", "student_mass")]
    bucket = outside[0] * (outside[0] / outside[1]).log()
    counted = outside[0] > 0.01  # the last position of a sequence has a message of zeros
    assert counted.sum() > 10
    assert torch.allclose((ours["cmdp_cost"] - theirs["distillation_losses"])[counted], bucket[counted], atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_has_the_logits_of_its_part_of_the_sequence(monkeypatch, rank: int) -> None:
    """Ulysses: the packed tokens are cut into as many parts as there are processes, filled up with zeros."""
    batch = Batch()
    data = batch.data()
    logits = torch.cat(batch.student)[None]
    whole = cost_of_logits(logits, data)
    half = -(-logits.shape[1] // 2)
    monkeypatch.setattr(costs, "get_ulysses_sequence_parallel_world_size", lambda: 2)
    monkeypatch.setattr(costs, "slice_input_tensor", partial(cut, parts=2, rank=rank))
    mine = cost_of_logits(cut(logits, 1, 2, rank), data)
    for name, value in whole.items():
        expected = value[:, rank * half : (rank + 1) * half]
        assert torch.equal(mine[name][:, : expected.shape[1]], expected) and mine[name].isfinite().all()


def cut(x: torch.Tensor, dim: int, parts: int, rank: int) -> torch.Tensor:
    """verl's `slice_input_tensor` without a process group."""
    part = -(-x.shape[dim] // parts)
    x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, part * parts - x.shape[dim]))
    return x.narrow(dim, rank * part, part)


def test_gradient_survives_a_loss_that_writes_over_the_logits_in_its_backward_pass() -> None:
    """As the cross-entropy of flash-attn does, which verl takes of the same logits after ours."""

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            ctx.logits = logits.detach()
            return logits.sum()

        @staticmethod
        def backward(ctx, upstream):
            return torch.from_dlpack(ctx.logits).fill_(0.0)  # autograd's counter of versions knows nothing of it

    batch = Batch()
    data = batch.data()
    gradients = []
    for overwriting in (False, True):
        logits = torch.cat(batch.student)[None].clone().requires_grad_()
        used = logits * 1.0
        cost = cost_of_logits(used, data)["cmdp_cost"].sum()
        total = cost + Overwriting.apply(used) if overwriting else cost
        gradients.append(torch.autograd.grad(total, logits)[0])
    assert torch.equal(*gradients) and gradients[0].any()


# ------------------------------------------------------------------------------------------ batches that are filled up


def filled_up(data, rows: list[int]):
    """The batch with rows as verl's `construct_minimal_padding_template` leaves them: no token of theirs counts."""
    masks = [m * (i not in rows) for i, m in enumerate(data["response_mask"].unbind())]
    data["response_mask"] = nested(masks)
    for name, value in (("teacher_ids", 0), ("teacher_logprobs", 0.0)):
        values = [torch.full_like(x, value) if i in rows else x for i, x in enumerate(data[name].unbind())]
        data[name] = nested(values)
    return data


@pytest.mark.parametrize("topk", [4, None])
def test_a_micro_batch_without_a_token_trains_nothing(topk: int | None) -> None:
    batch = Batch(topk=topk)
    sampled = () if topk else ("algorithm.cmdp.cost=k1", "distillation.distillation_loss.loss_mode=cmdp_sampled")
    loss = loss_function(configured(*sampled, budget=0.0))
    results = {}
    for rows in ([], [1, 2], [0, 1, 2, 3]):
        logits = [x.clone().requires_grad_() for x in batch.student]
        data = filled_up(batch.data(), rows)
        outputs = engine_outputs(batch, data, loss, logits)
        value, metrics = loss(model_output=outputs, data=data, dp_group=None)
        gradients = torch.autograd.grad(value, logits)
        assert [bool(g.any()) for g in gradients] == [i not in rows for i in range(4)]
        assert all(g.isfinite().all() for g in gradients)
        results[len(rows)] = value, metrics
    value, metrics = results[4]
    assert value.item() == 0.0
    counted = {name for name, metric in results[0][1].items() if isinstance(metric, Metric)}
    assert counted == {name for name, metric in metrics.items() if isinstance(metric, Metric)}
    for name in ("distillation/loss", "distillation/loss_min", "distillation/loss_max"):
        both = [Metric.aggregate_dp([results[n][1][name]]) for n in (0, 4)]
        joined = results[0][1][name].init_list()
        joined.extend(results[0][1][name])
        joined.extend(metrics[name])
        assert joined.aggregate() == both[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_batch_without_a_token_has_a_loss_of_nothing(mode: str) -> None:
    batch = Batch()
    loss = loss_function(configured(f"actor_rollout_ref.actor.loss_agg_mode={mode}"))
    logits = [x.clone().requires_grad_() for x in batch.student]
    data = filled_up(batch.data(batch_num_tokens=0), [0, 1, 2, 3])
    value, _ = loss(model_output=engine_outputs(batch, data, loss, logits), data=data, dp_group=None)
    assert value.item() == 0.0 and not any(g.any() for g in torch.autograd.grad(value, logits))


def test_verl_itself_stops_at_a_micro_batch_without_a_token() -> None:
    """Once it does not, `actor_loss` need not look."""
    batch = Batch()
    config = configured()
    data = filled_up(batch.data(), [0, 1, 2, 3])
    outputs = engine_outputs(batch, data, loss_function(config), batch.student)
    actor, distillation = parts(config)
    with pytest.raises(RuntimeError, match="min"):
        distillation_ppo_loss(actor, distillation, outputs, data)

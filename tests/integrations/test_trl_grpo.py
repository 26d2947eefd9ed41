"""TRL's GRPO with a teacher and a budget: where it is GRPO, what differs, and against plain PyTorch on full logits."""

from __future__ import annotations

import math
import warnings

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

import torch
from tiny_pair import tiny_model
from transformers import AutoTokenizer
from trl_pair import COMMON, digits, grpo, logged, prompts, student, trained

import cmdp_fast as cf
from cmdp_fast import objective
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.trl import CMDPGRPOConfig, CMDPGRPOTrainer

# Both make the same numbers in another order. A float32 sum over the 24 tokens of a step is off by at most 24 eps =
# 3e-6 in units of its terms, which are of size 1, and Adam's small steps carry that on. (Measured over the runs below:
# 2e-7 in the losses, 2e-6 in gradient norms of 3.)
ROUNDING = {"abs": 1e-5, "rel": 1e-5}


def one_batch(trainer):
    """The first generation batch of a trainer, as the update gets it."""
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def dense_logits(model, batch, width=None):
    """The logits [B, T, V] of the completions' tokens, all of them."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return model(ids, attention_mask=attention).logits[:, -batch["completion_ids"].shape[1] - 1 : -1, :width]


@pytest.mark.parametrize(
    "changes",
    [
        {"discrepancy_weight": 0.0},  # TRL's loss, with our advantages
        {},  # the loss from our operation, with a direct term of 0
        {"scale_rewards": "none"},
        {"scale_rewards": "batch"},
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"steps_per_generation": 2, "num_iterations": 2, "loss_type": "grpo"},
        {"gradient_checkpointing": True},
        {"mask_truncated_completions": True, "loss_type": "dr_grpo"},
        {"bf16": True, "cast_lm_head_to_fp32": True},
        {"beta": 0.1, "entropy_coef": 0.01, "temperature": 0.8},
        {"importance_sampling_level": "sequence", "loss_type": "luspo", "num_iterations": 2},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()) or "direct",
)
def test_an_infinite_budget_is_grpo_step_by_step(pair, tmp_path, changes):
    changes = {"learning_rate": 1e-3, "max_steps": 20, **changes}
    theirs = trained(grpo, pair, tmp_path, plain=True, **{k: changes[k] for k in changes if k != "discrepancy_weight"})
    ours = trained(grpo, pair, tmp_path, budget=math.inf, **changes)
    for name in ("loss", "grad_norm", "reward", "entropy", "completions/mean_length"):
        expected = logged(theirs, name)
        assert len(expected) == 20 or name not in ("loss", "grad_norm")
        # bfloat16 layers round what the head hands back to 8 bits: a difference in the last bit of float32 may flip one
        allowed = {"rel": 2e-4, "abs": 2e-4} if changes.get("bf16") else ROUNDING
        assert logged(ours, name) == pytest.approx(expected, **allowed), name
    moved = [a - b for a, b in zip(ours.model.parameters(), student(pair["student"]).parameters(), strict=True)]
    assert max(float(m.abs().max()) for m in moved) > 1e-3


def test_an_adapter_is_trained_as_in_grpo(pair, tmp_path):
    from peft import LoraConfig

    changes = {"learning_rate": 1e-2, "max_steps": 20, "gradient_checkpointing": True}
    adapter = {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])}
    theirs = trained(grpo, pair, tmp_path, plain=True, trainer=adapter, **changes)
    ours = trained(grpo, pair, tmp_path, budget=math.inf, trainer=adapter, **changes)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), **ROUNDING)
    weights = dict(ours.model.named_parameters())
    for name, parameter in theirs.model.named_parameters():
        torch.testing.assert_close(weights[name], parameter, atol=1e-3, rtol=1e-3)
    assert max(float(w.abs().max()) for n, w in weights.items() if "lora_B" in n) > 1e-2


SETTINGS = [
    {},
    {"scale_rewards": "none", "kind": "hinge", "cost": "forward_kl", "discrepancy_weight": 2.0},
    {"scale_rewards": "batch", "penalty": 3.0, "budget": 0.9, "budget_per_token": True},
    {"scale_rewards": "none", "baseline": "position_rloo"},
    {"kind": "lagrangian", "coefficient": 0.3},
    {"kind": "saute", "cost": "k1"},
    {"kind": "barrier", "coefficient": 0.5, "scale_rewards": "none"},
    {"kind": "worst_case", "cost": "nll", "budget": 3.5},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda c: "-".join(map(str, c.values())) or "defaults")
def test_advantages_are_those_of_the_objective_on_the_same_rollout(pair, tmp_path, changes):
    trainer = grpo(pair, tmp_path, per_device_train_batch_size=8, **changes)
    batch, args = one_batch(trainer), trainer.args
    mask, tokens = batch["completion_mask"].bool(), batch["completion_ids"]
    texts = trainer.processing_class.batch_decode(tokens, skip_special_tokens=True)
    task = torch.zeros(mask.shape)
    task[torch.arange(len(mask)), mask.sum(1) - 1] = torch.tensor(digits(texts))
    with torch.no_grad():
        logits = [dense_logits(model, batch) for model in (trainer.model, trainer.teacher_model)]
    constraint = cf.Constraint(
        budget=args.budget,
        cost=args.cost,
        kind=args.kind,
        penalty=args.penalty,
        per_token=args.budget_per_token,
        reduction="mean" if args.kind == "worst_case" else "sum",
        discrepancy_weight=args.discrepancy_weight,
        coefficient=args.coefficient,
    )
    found = cf.constrained_reward(*logits, tokens, task, constraint=constraint, mask=mask)
    assert found.trace.violated.any(1).float().mean() not in (0.0, 1.0)  # some are within the budget, some are not
    direct = objective.direct_coefficient(found.trace, constraint, mask=mask)
    if args.baseline == "position_rloo":
        part = objective.task_part(task, found.trace, constraint)
        score = objective.score_coefficient(found.reward, part, constraint, mask=mask)
        expected, scale = objective.position_rloo(score, 4, mask), torch.ones(len(mask))
    else:
        returns = objective.returns_to_go(found.reward, mask=mask)[:, 0]
        advantage, scale = objective.grpo(returns, 4)
        if args.scale_rewards != "group":
            centred = objective.rloo(returns, 4) * 3 / 4
            scale = torch.ones(8) if args.scale_rewards == "none" else (returns.std() + 1e-4).expand(8)
            advantage = centred / scale
        expected = torch.where(mask, advantage[:, None], 0.0)
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-4, rtol=1e-4)
    assert batch["advantages"].shape == mask.shape
    assert ("direct" in batch) == (args.kind not in ("saute", "worst_case"))
    if "direct" in batch:
        torch.testing.assert_close(batch["direct"], direct / scale[:, None], atol=1e-4, rtol=1e-4)
        assert batch["direct"].any()


@pytest.mark.parametrize(("cost", "recompute"), [("reverse_kl", False), ("forward_kl", True)])
def test_the_gradient_is_that_of_both_terms_on_full_logits(pair, tmp_path, cost, recompute):
    changes = {"temperature": 0.7, "per_device_train_batch_size": 8, "gradient_checkpointing": recompute}
    trainer = grpo(pair, tmp_path, cost=cost, scale_rewards="none", **changes)
    if recompute:
        trainer.model.gradient_checkpointing_enable()  # as `train` does
    batch = one_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch).backward()

    copy = student(pair["student"])
    p = (dense_logits(copy, batch) / 0.7).log_softmax(-1)
    q = (dense_logits(trainer.teacher_model, batch) / 0.7).log_softmax(-1).detach()
    logprob = p.gather(-1, batch["completion_ids"][..., None])[..., 0]
    divergence = (p.exp() * (p - q)).sum(-1) if cost == "reverse_kl" else (q.exp() * (q - p)).sum(-1)
    mask = batch["completion_mask"].bool()
    per_token = batch["direct"] * divergence - batch["advantages"] * logprob
    (torch.where(mask, per_token, 0.0).sum() / mask.sum()).backward()
    assert float(batch["direct"].sum()) > 0
    for (name, ours), expected in zip(trainer.model.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, atol=2e-6, rtol=2e-4, msg=name)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_direct_term_is_divided_by_what_trl_divides_its_own_terms_by(pair, tmp_path, loss_type, training):
    """With a ratio of 1 and advantages of -1 the gradient of TRL's loss in a token's logprob is that token's weight."""
    trainer = grpo(
        pair,
        tmp_path,
        loss_type=loss_type,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        mask_truncated_completions=True,
        epsilon_high=5.0,  # where cispo stops the ratio itself
    )
    batch = one_batch(trainer)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train(training)
    batch["advantages"] = torch.full(batch["completion_mask"].shape, -1.0)
    logprob = torch.zeros_like(batch["advantages"], requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprob, torch.zeros_like(logprob), None)
    super(CMDPGRPOTrainer, trainer)._compute_loss(None, batch).backward()
    mask = batch["completion_mask"].bool()
    weights = torch.where(mask, trainer._token_weights(batch), 0.0)
    torch.testing.assert_close(weights, logprob.grad)
    assert 0 < mask.sum() < mask.numel()


def test_a_budget_of_two_nats_holds_the_divergence_there(pair, tmp_path):
    """The same run from the same seed with a budget of 2 nats and with none: the first three steps and the last ten.

    The reward asks for digits, which the teacher writes seldom, so it and the teacher pull in different directions.
    """
    kl, within, reward = {}, {}, {}
    for budget in (2.0, math.inf):
        trainer = trained(
            grpo, pair, tmp_path, budget=budget, scale_rewards="none", max_steps=40, per_device_train_batch_size=16
        )
        kl[budget], within[budget], reward[budget] = (
            torch.tensor(logged(trainer, name))
            for name in ("cmdp/cumulative_kl", "cmdp/constraint_satisfaction", "reward")
        )
    assert kl[2.0][:3].mean() > 4.0
    assert kl[2.0][-10:].mean() < 2.5
    assert within[2.0][-10:].mean() > 0.3 > 0.1 > within[2.0][:3].mean()
    assert kl[math.inf][-10:].mean() > 6.0
    assert reward[math.inf][-10:].mean() > reward[2.0][-10:].mean() + 0.1


@pytest.mark.parametrize(("ours", "theirs"), [(3, 0), (0, 5)], ids=["wider student", "wider teacher"])
def test_vocabularies_of_different_width(tmp_path, ours, theirs):
    pair = {
        "student": tiny_model(tmp_path / "s", seed=1, spare=ours),
        "teacher": tiny_model(tmp_path / "t", seed=2, spare=theirs),
    }
    trainer = grpo(pair, tmp_path, per_device_train_batch_size=16, scale_rewards="none", max_steps=2, num_iterations=2)
    width = len(trainer.processing_class)
    batch = one_batch(trainer)
    assert int(batch["completion_ids"].max()) < width
    mask = batch["completion_mask"].bool()
    with torch.no_grad():
        logits = [dense_logits(model, batch, width) for model in (trainer.model, trainer.teacher_model)]
    total = cf.token_stats(*logits, batch["completion_ids"], mask=mask).reverse_kl.sum(1)
    assert trainer._metrics["train"]["cmdp/cumulative_kl"][-1] == pytest.approx(float(total.mean()), rel=1e-4)
    expected = torch.where(mask, (total > 2.0).float()[:, None], 0.0)
    torch.testing.assert_close(batch["direct"], expected)
    trainer.train()
    assert logged(trainer, "clip_ratio/region_mean")[0] == 0.0  # the sampled and the updated distribution are one
    assert all(map(math.isfinite, logged(trainer, "loss")))


def test_the_teachers_hidden_states_may_be_computed_again(pair, tmp_path):
    losses = []
    for size in (512, 0):
        trainer = grpo(pair, tmp_path, teacher_cache_mb=size, num_iterations=2, max_steps=4)
        assert ("teacher_hidden" in one_batch(trainer)) == (size > 0)
        trainer = grpo(pair, tmp_path, teacher_cache_mb=size, num_iterations=2, max_steps=4)
        before = [p.clone() for p in trainer.teacher_model.parameters()]
        trainer.train()
        losses.append(logged(trainer, "loss"))
        assert all(torch.equal(p, b) for p, b in zip(trainer.teacher_model.parameters(), before, strict=True))
        assert all(p.grad is None and not p.requires_grad for p in trainer.teacher_model.parameters())
    assert losses[0] == losses[1]


def test_the_teachers_logits_are_never_made(pair, tmp_path):
    trainer = grpo(pair, tmp_path, teacher_cache_mb=0)
    rows = []
    trainer.teacher_model.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(output.numel()))
    trainer.train()
    assert len(rows) == 6 and not any(rows)  # in scoring and in the update of three steps


def test_a_divisor_that_may_be_next_to_nothing_is_warned_of(tmp_path):
    settings = {"use_cpu": True, "bf16": False}
    for given, whose in (({}, "group'.* a group's"), ({"scale_rewards": "batch"}, "batch'.* the batch's")):
        said = f"scale_rewards='{whose} .*scale_rewards='none' keeps what penalty and discrepancy_weight mean"
        with pytest.warns(UserWarning, match=said):
            CMDPGRPOConfig(str(tmp_path), budget=2.0, **given, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        CMDPGRPOConfig(str(tmp_path), budget=2.0, scale_rewards="none", **settings)
        for scale in ("group", "batch"):
            CMDPGRPOConfig(str(tmp_path), budget=math.inf, scale_rewards=scale, **settings)
            CMDPGRPOConfig(str(tmp_path), budget=2.0, cost="k1", scale_rewards=scale, **settings)  # no direct term


def test_a_penalty_without_a_gradient_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="kind='saute' with cost='reverse_kl'"):
        CMDPGRPOConfig(str(tmp_path), budget=2.0, kind="saute", scale_rewards="none", use_cpu=True, bf16=False)


def test_metrics_beside_trls(pair, tmp_path):
    trainer = grpo(
        pair, tmp_path, gradient_accumulation_steps=2, eval_strategy="no", trainer={"eval_dataset": prompts()}
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    names = (
        *("constraint_satisfaction", "mean_excess", "mean_cumulative", "cvar", "mean_token_cost", "max_token_cost"),
        *("first_violation", "modified_reward", "budget", "cumulative_kl", "cumulative_k1", "cumulative_k3"),
        "cumulative_kl_cvar",
    )
    assert {f"cmdp/{name}" for name in names} | {"loss/direct", "reward", "entropy", "rewards/digits/mean"} <= set(
        entry
    )
    assert entry["cmdp/budget"] == 2.0
    assert entry["cmdp/mean_cumulative"] == entry["cmdp/cumulative_kl"] > 0
    assert entry["loss/direct"] > 0
    found = trainer.evaluate()
    assert found["eval_cmdp/cumulative_kl"] > 0


def test_an_evaluation_may_sample_one_completion_a_prompt(pair, tmp_path):
    trainer = grpo(
        pair, tmp_path, num_generations_eval=1, per_device_eval_batch_size=2, trainer={"eval_dataset": prompts()}
    )
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_a_reward_function_without_an_opinion_says_nothing_for_or_against(pair, tmp_path):
    def some(completions, **_):
        return [None if i % 2 else float(i) for i in range(len(completions))]

    changes = {"scale_rewards": "none", "per_device_train_batch_size": 8}
    for plain in (True, False):
        budget = {} if plain else {"budget": math.inf, "discrepancy_weight": 0.0}
        batch = one_batch(grpo(pair, tmp_path, plain=plain, trainer={"reward_funcs": some}, **budget, **changes))
        advantage = batch["advantages"] if plain else batch["advantages"][:, 0]
        expected = torch.tensor([-1.0, 0.0, 1.0, 0.0] * 2)
        torch.testing.assert_close(advantage, expected)


def test_trls_table_of_completions_shows_the_advantages_that_were_used(pair, tmp_path):
    trainer = grpo(pair, tmp_path)
    batch = one_batch(trainer)
    assert list(trainer._logs["advantages"]) == pytest.approx(batch["advantages"][:, 0].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": None}, "budget is missing"),
        ({"budget": -1.0}, "budget must be at least 0 nats, got -1.0"),
        ({"budget": "2"}, "budget must be a number"),
        ({"budget": math.nan}, "budget must be at least 0 nats, got nan"),
        ({"kind": "strict"}, "kind='strict' is unknown"),
        ({"cost": "jsd"}, "cost='jsd' is unknown; expected one of reverse_kl, forward_kl, k1, k3, nll"),
        ({"kind": "worst_case"}, "kind='worst_case' is defined for cost='nll'"),
        ({"kind": "worst_case", "cost": "nll", "budget_per_token": True}, "leave budget_per_token out"),
        ({"kind": "lagrangian"}, "kind='lagrangian' needs coefficient="),
        ({"penalty": -1.0}, "penalty must be finite and not negative"),
        ({"discrepancy_weight": math.inf}, "discrepancy_weight must be finite"),
        ({"teacher_cache_mb": -1}, "teacher_cache_mb must be at least 0"),
        ({"baseline": "gae"}, "baseline must be 'grpo' or 'position_rloo'"),
        ({"baseline": "position_rloo"}, "it needs scale_rewards='none', got 'group'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation must be"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_in_one_line(tmp_path, changes, message):
    settings = {"budget": 2.0, "use_cpu": True, "bf16": False, **changes}
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        CMDPGRPOConfig(str(tmp_path), **settings)
    assert message in str(caught.value)


def test_models_that_do_not_fit_are_refused_before_anything_is_trained(pair, tmp_path):
    def refused(message, *, teacher, **changes):
        with pytest.raises(InputError, match=message):
            grpo(pair, tmp_path, trainer={"teacher_model": teacher, **changes.pop("trainer", {})}, **changes)

    refused("teacher_model is missing", teacher=None)
    refused("no causal language model there", teacher=str(tmp_path / "nothing"))
    refused("got a int", teacher=3)
    refused("is loaded already", teacher=student(pair["teacher"]), teacher_model_init_kwargs={"dtype": "float32"})
    refused("given twice", teacher=student(pair["teacher"]), teacher_model=pair["teacher"])
    other = tiny_model(tmp_path / "other", seed=3, alphabet="abcdefgh")
    refused("must share a tokenizer", teacher=other)
    longer = tiny_model(tmp_path / "longer", seed=3, alphabet="0123456789+=;B")
    refused("share a tokenizer, but token", teacher=longer)
    changed = student(pair["teacher"])
    changed.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, changed.lm_head.weight) + 1
    refused("teacher_model cannot be used: the head of", teacher=changed)
    with pytest.raises(InputError, match="args must be a CMDPGRPOConfig, got NoneType"):
        CMDPGRPOTrainer(pair["student"], digits, train_dataset=prompts(), teacher_model=pair["teacher"])


def test_a_teacher_by_its_name(pair, tmp_path):
    trainer = grpo(pair, tmp_path, teacher_model=pair["teacher"], trainer={"teacher_model": None}, max_steps=1)
    trainer.train()
    assert len(logged(trainer, "loss")) == 1


def test_under_bfloat16_autocast(pair, tmp_path):
    """TRL's default. The heads are bfloat16, the statistics float32."""
    changes = {"scale_rewards": "none", "max_steps": 2, "per_device_train_batch_size": 8}
    full, half = (trained(grpo, pair, tmp_path, bf16=bf16, **changes) for bf16 in (False, True))
    assert half.accelerator.mixed_precision == "bf16"
    for name in ("cmdp/cumulative_kl", "loss/direct", "loss"):
        # the first step: after it the two sample differently
        assert logged(half, name)[0] == pytest.approx(logged(full, name)[0], rel=0.15), name
    assert logged(half, "cmdp/cumulative_kl")[0] != logged(full, "cmdp/cumulative_kl")[0]


def test_a_token_that_the_teacher_has_no_column_for_is_refused(tmp_path):
    pair = {"student": tiny_model(tmp_path / "s", seed=1, spare=3), "teacher": tiny_model(tmp_path / "t", seed=2)}

    def rollout(prompts, trainer):
        spare = len(trainer.processing_class) + 1
        ids = [[1, spare, 2]] * len(prompts)
        return {"prompt_ids": [[1]] * len(prompts), "completion_ids": ids, "logprobs": [[-1.0] * 3] * len(prompts)}

    trainer = grpo(pair, tmp_path, trainer={"rollout_func": rollout})
    with pytest.raises(InputError, match="a completion has token 18, but student and teacher share 17 columns alone"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_batch_without_a_token_that_counts_changes_nothing(pair, tmp_path, poison, dtype):
    """Every completion is truncated and masked: no gradient, whatever stood in memory before."""
    tokenizer = AutoTokenizer.from_pretrained(pair["student"], padding_side="left")
    settings = {**COMMON, "max_steps": 1, "num_generations": 4, "mask_truncated_completions": True, "temperature": 1.0}
    trainer = CMDPGRPOTrainer(
        student(pair["student"]).to(dtype),
        teacher_model=student(pair["teacher"]).to(dtype),
        reward_funcs=digits,
        processing_class=tokenizer,
        train_dataset=prompts(),
        args=CMDPGRPOConfig(
            str(tmp_path), budget=0.01, generation_kwargs={"suppress_tokens": [tokenizer.eos_token_id]}, **settings
        ),
    )
    trainer.train()
    assert logged(trainer, "completions/clipped_ratio") == [1.0]
    assert logged(trainer, "grad_norm") == [0.0] and logged(trainer, "loss") == [0.0]
    for ours, before in zip(trainer.model.parameters(), student(pair["student"]).to(dtype).parameters(), strict=True):
        assert torch.equal(ours, before)

"""`kl_reward` and `kl_loss` against TRL's own RLOO and GRPO, whose reference model stands for the teacher."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

import torch
from transformers import AutoTokenizer
from trl import RLOOConfig, RLOOTrainer
from trl_pair import COMMON, digits, grpo, prompts, student

import cmdp_fast as cf
from cmdp_fast import credit, objective
from cmdp_fast.trainer.methods.kl_loss import k3
from cmdp_fast.trainer.settings.recipe import read_recipe


def one_batch(trainer):
    """The first generation batch of a trainer, as the update gets it."""
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def make_a_teacher_of(model):
    """TRL's reference model is the student itself until it is changed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def logits(model, batch):
    """Of the completions' tokens, [B, T, V]."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return model(ids, attention_mask=attention).logits[:, -batch["completion_ids"].shape[1] - 1 : -1]


def test_the_advantage_of_kl_reward_is_that_of_trls_rloo(pair, tmp_path):
    """The reward less beta times the sum of k1, less the mean of the group's others, from one rollout."""
    config = read_recipe("quickstart", "kl_reward")
    settings = COMMON | {"num_generations": 4, "per_device_train_batch_size": 8, "beta": config.coefficient}
    tokenizer = AutoTokenizer.from_pretrained(pair["student"], padding_side="left")
    trainer = RLOOTrainer(
        student(pair["student"]),
        reward_funcs=digits,
        args=RLOOConfig(str(tmp_path), **settings),
        train_dataset=prompts(),
        processing_class=tokenizer,
    )
    make_a_teacher_of(trainer.ref_model)
    batch = one_batch(trainer)

    tokens, mask = batch["completion_ids"], batch["completion_mask"].bool()
    task = torch.zeros(mask.shape)
    task[torch.arange(len(mask)), mask.sum(1) - 1] = torch.tensor(digits(tokenizer.batch_decode(tokens, True)))
    with torch.no_grad():
        both = [logits(model, batch) for model in (trainer.model, trainer.ref_model)]
    constraint = cf.Constraint(budget=config.budget, cost=config.cost, kind=config.kind, coefficient=config.coefficient)
    found = cf.constrained_reward(*both, tokens, task, constraint=constraint, mask=mask)
    returns = objective.returns_to_go(found.reward, mask=mask)[:, 0]
    advantage, scale = credit.sequence_advantage(returns, 4, config.baseline)
    torch.testing.assert_close(batch["advantages"], advantage, atol=1e-5, rtol=1e-4)
    assert (scale == 1).all() and not torch.allclose(advantage, objective.rloo(task.sum(1), 4), atol=1e-2)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_loss_of_kl_loss_is_that_of_trls_grpo(pair, tmp_path, corrected):
    """Value and gradient in the tokens' log-probabilities, at random ratios, some of them beyond the clip."""
    settings = {"loss_type": "dr_grpo", "beta": 0.3, "use_bias_correction_kl": corrected, "num_iterations": 2}
    trainer = grpo(pair, tmp_path, plain=True, per_device_train_batch_size=8, **settings)
    make_a_teacher_of(trainer.ref_model)
    batch = one_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    mask = batch["completion_mask"].bool()
    assert 0 < mask.sum() < mask.numel()
    moved = batch["old_per_token_logps"] + 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    theirs, ours = (moved.clone().requires_grad_() for _ in range(2))
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (theirs, torch.zeros_like(theirs), None)
    expected = trainer._compute_loss(None, batch)
    expected.backward()

    penalty = k3(ours, batch["ref_per_token_logps"])
    if corrected:
        penalty = penalty * (ours - batch["old_per_token_logps"]).exp()
    loss, metrics = objective.ppo_loss(
        ours,
        batch["old_per_token_logps"],
        torch.where(mask, batch["advantages"][:, None], 0.0),
        mask=mask,
        cost=penalty,
        direct=0.3 * mask.float(),
        normalizer=len(mask) * COMMON["max_completion_length"],
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert metrics["clip_ratio/region_mean"] > 0 and metrics["loss/direct"] > 0
    task = torch.tensor(digits(trainer.processing_class.batch_decode(batch["completion_ids"], True)))
    torch.testing.assert_close(batch["advantages"], objective.grpo(task, 4)[0])

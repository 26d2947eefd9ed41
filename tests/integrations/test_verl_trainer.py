"""The estimator, the trainer's steps and the configuration, on verl's own data structures; no Ray is started."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip(
    "verl", reason="verl 0.9 requires transformers<5.11, older than the one tested here; .ci/run installs it beside"
)

import transfer_queue as tq
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer import distillation
from verl.trainer.distillation.losses import distillation_ppo_loss, get_distillation_loss_settings
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.config import validate_config
from verl.utils.metric import Metric
from verl.utils.ulysses import slice_input_tensor
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding
from verl_batch import FOLDER, RESPONSES, Batch, composed, engine_outputs, nested, padded, parts
from verl_store import UID, meta, trainer_and_store

import cmdp_fast.integrations.verl as integration
from cmdp_fast import objective, reference
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.verl.advantage import charging
from cmdp_fast.integrations.verl.config import constraint_of
from cmdp_fast.integrations.verl.losses import actor_loss

SAMPLED = ("distillation.distillation_loss.loss_mode=cmdp_sampled",)


# ---------------------------------------------------------------------------------- what this was written against


def parameters(function) -> set[str]:
    return set(inspect.signature(inspect.unwrap(function)).parameters)


# where it is, what it is, the parameters that we give or take
RELIED_ON = {
    "core_algos.register_adv_est": (core_algos.register_adv_est, {"name_or_enum"}),
    "core_algos.register_policy_loss": (core_algos.register_policy_loss, {"name"}),
    "core_algos.compute_policy_loss_vanilla": (
        core_algos.compute_policy_loss_vanilla,
        parameters(integration.compute_policy_loss_cmdp),
    ),
    "core_algos.agg_loss": (
        core_algos.agg_loss,
        {"loss_agg_mode", "dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"},
    ),
    "ray_trainer.compute_advantage": (ray_trainer.compute_advantage, {"data", "adv_estimator", "config"}),
    "distillation.losses.distillation_ppo_loss": (
        distillation_ppo_loss,
        {"config", "distillation_config", "model_output", "data", "dp_group", "student_logits", "data_format"},
    ),
    "distillation.register_distillation_loss": (distillation.losses.register_distillation_loss, {"loss_settings"}),
    "PPOTrainer._compute_old_log_prob": (PPOTrainer._compute_old_log_prob, {"batch", "metrics"}),
    "PPOTrainer._compute_advantage": (PPOTrainer._compute_advantage, {"batch", "metrics"}),
    "PPOTrainer._init_resource_pool_mgr": (PPOTrainer._init_resource_pool_mgr, {"self"}),
    "TrainingWorker.infer_batch": (TrainingWorker.infer_batch, {"data"}),
    "TrainingWorker.set_loss_fn": (TrainingWorker.set_loss_fn, {"loss_fn"}),
    "workers.utils.losses.ppo_loss": (ppo_loss, {"config", "model_output", "data", "dp_group"}),
    "ulysses.slice_input_tensor": (slice_input_tensor, {"x", "dim"}),
    "metric.Metric": (Metric, {"aggregation", "value"}),
    "ActorRolloutRefWorker.actor_worker_cls": (ActorRolloutRefWorker.actor_worker_cls, {"config"}),
    "padding.no_padding_2_padding": (no_padding_2_padding, {"tensor", "data"}),
    "transfer_queue.kv_batch_get": (tq.kv_batch_get, {"keys", "partition_id", "select_fields"}),
}


def test_verl_is_what_this_was_written_against() -> None:
    moved = [
        f"{name} has no {', '.join(sorted(needed - parameters(function)))}"
        for name, (function, needed) in RELIED_ON.items()
        if needed - parameters(function)
    ]
    source = inspect.getsource(core_algos) + inspect.getsource(ray_trainer.compute_advantage)
    for text in ('adv_kwargs["index"]', '"token_level_rewards"', '"response_mask"', '"config"'):
        if text not in source:
            moved.append(f"ray_trainer.compute_advantage no longer passes {text}")
    assert not moved, moved


def test_everything_is_registered() -> None:
    assert core_algos.get_adv_estimator_fn("cmdp") is integration.compute_cmdp_advantage
    assert core_algos.get_policy_loss_fn("cmdp") is integration.compute_policy_loss_cmdp
    assert get_trainer_cls("cmdp") is integration.ConstrainedTrainer
    assert get_distillation_loss_settings("cmdp").use_topk
    assert get_distillation_loss_settings("cmdp_sampled").use_estimator


# ----------------------------------------------------------------------------------------------------- estimator


def algorithm(**settings) -> OmegaConf:
    return OmegaConf.create({"gamma": 1.0, "cmdp": {"cost": "forward_kl", "budget": 0.5, **settings}})


def test_worked_example_through_verls_compute_advantage() -> None:
    """method: C = .125 .1875 .5625 .8125 1, so -2 -2 -.875 -.375 0 before the baseline; the other one costs nothing."""
    cost = torch.tensor([[0.125, 0.0625, 0.375, 0.25, 0.1875], [0.0] * 5])
    data = DataProto.from_dict(
        tensors={
            "token_level_rewards": torch.tensor([[0.0, 0, 0, 0, 1], [0.0, 0, 0, 0, 0]]),
            "response_mask": torch.ones(2, 5, dtype=torch.long),
        },
        non_tensors={"uid": np.array(["a", "a"], dtype=object)},
    )
    config = algorithm(discrepancy_weight=2.0)
    with charging(cost, constraint_of(config, "algorithm")):
        ray_trainer.compute_advantage(data, "cmdp", config=config)
    score = torch.tensor([-2.0, -2.0, -0.875, -0.375, 0.0])
    assert torch.equal(data.batch["advantages"], torch.stack([score, -score]))
    assert torch.equal(data.batch["returns"][0], torch.tensor([-2.0, -2.0, -2.0, -0.875, -0.375]))


def test_completions_of_a_prompt_may_lie_anywhere_and_be_of_any_number() -> None:
    torch.manual_seed(0)
    uid = ["a", "b", "a", "c", "b", "a", "a"]  # the last is a row that fills up a batch
    mask = torch.rand(7, 6).argsort(1) < torch.tensor([3, 6, 4, 5, 2, 6, 0])[:, None]
    reward, cost = torch.randn(7, 6), torch.rand(7, 6)
    config = algorithm(kind="hinge", cost="k1")
    got, _ = integration.compute_cmdp_advantage(reward, mask.long(), np.array(uid, dtype=object), config, cost=cost)
    trace = reference.budget_trace(cost, 0.5, mask=mask)
    modified = reference.modified_reward(reward, cost, trace, kind="hinge", mask=mask)
    score = objective.returns_to_go(modified, mask=mask)
    for rows in ([0, 2, 5], [1, 4]):
        expected = objective.position_rloo(score[rows], len(rows), mask[rows])
        assert torch.allclose(got[rows], expected, atol=1e-6)
    assert torch.allclose(got[3], score[3], atol=1e-6)  # alone: no baseline
    assert not got[6].any()


def test_estimator_says_what_it_lacks() -> None:
    rewards, mask, uid = torch.zeros(2, 3), torch.ones(2, 3), np.array(["a", "a"], dtype=object)
    with pytest.raises(
        InputError, match=r"no token costs, expected trainer\.use_v1=True and trainer\.v1\.trainer_mode=cmdp"
    ):
        integration.compute_cmdp_advantage(rewards, mask, uid, algorithm())
    with pytest.raises(InputError, match="needs the prompts' uid"):
        integration.compute_cmdp_advantage(rewards, mask, None, algorithm(), cost=rewards)
    for settings, message in [
        ({"cost": "reverse_kl"}, "reverse_kl, expected forward_kl, k1"),
        ({"kind": "pid"}, "needs coefficient="),
        ({"budgett": 1}, r"algorithm.cmdp has \['budgett'\]"),
        ({"budget": -1.0}, "budget=-1.0"),
        ({"kind": "lagrangian"}, "coefficient"),
        ({"cost": "nonsense"}, "cost='nonsense'"),
    ]:
        with pytest.raises(InputError, match=message):
            integration.compute_cmdp_advantage(rewards, mask, uid, algorithm(**settings), cost=rewards)


# ------------------------------------------------------------------------------------------------------- trainer


@pytest.mark.parametrize("cost", ["forward_kl", "k1"])
def test_advantages_charge_what_the_completions_cost(monkeypatch, cost: str) -> None:
    batch = Batch(topk=4 if cost == "forward_kl" else None)
    overrides = (f"algorithm.cmdp.cost={cost}", *(SAMPLED if cost == "k1" else ()))
    trainer, store, rewards = trainer_and_store(monkeypatch, batch, *overrides)
    metrics: dict[str, float] = {}
    trainer._compute_advantage(meta(), metrics)
    mask = padded([torch.ones(r, dtype=torch.bool) for r in RESPONSES])
    if cost == "k1":
        old = store.fields["old_log_probs"].to_padded_tensor(0.0)
        charged = torch.where(mask, old - padded(batch.logprob(batch.teacher)), 0.0)
    else:
        from test_verl_losses import merged_forward_kl

        charged = merged_forward_kl(batch, batch.student)
    expected, _ = integration.compute_cmdp_advantage(
        rewards, mask, np.array(UID, dtype=object), trainer.config.algorithm, cost=charged
    )
    advantages = store.written["advantages"]
    assert torch.allclose(advantages.to_padded_tensor(0.0), expected, atol=1e-5) and expected.any()
    spent = charged.sum(1)
    assert metrics["cmdp/mean_cumulative"] == pytest.approx(spent.mean().item(), rel=1e-4)
    assert metrics["cmdp/constraint_satisfaction"] == pytest.approx((spent <= 4.0).float().mean().item())


def test_rows_that_fill_up_a_batch_are_not_counted(monkeypatch) -> None:
    trainer, store, _ = trainer_and_store(monkeypatch, Batch())
    trainer._compute_advantage(meta(), whole := {})
    masks = [torch.ones(r, dtype=torch.long) for r in RESPONSES]
    masks[2] = torch.zeros(RESPONSES[2], dtype=torch.long)
    store.fields["response_mask"] = nested(masks)
    trainer._compute_advantage(meta(), metrics := {})
    assert metrics["cmdp/mean_cumulative"] != whole["cmdp/mean_cumulative"]
    assert not store.written["advantages"].unbind()[2].any()


def test_a_batch_without_any_token_has_no_figures_and_no_advantages(monkeypatch) -> None:
    trainer, store, _ = trainer_and_store(monkeypatch, Batch())
    store.fields["response_mask"] = nested([torch.zeros(r, dtype=torch.long) for r in RESPONSES])
    trainer._compute_advantage(meta(), metrics := {})
    assert not any(name.startswith("cmdp/") for name in metrics)
    assert not store.written["advantages"].to_padded_tensor(0.0).any()


@pytest.mark.parametrize(("overrides", "asked"), [((), True), (("algorithm.cmdp.cost=nll", *SAMPLED), False)])
def test_scoring_pass_is_asked_for_the_masses_where_the_cost_needs_them(monkeypatch, overrides, asked: bool) -> None:
    trainer = integration.ConstrainedTrainer(composed(*overrides))
    monkeypatch.setattr(trainer_base.PPOTrainer, "_compute_old_log_prob", lambda self, batch, metrics: batch)
    assert trainer._compute_old_log_prob(meta(), {}).extra_info["distillation_use_topk"] is asked


def test_the_trainer_is_verls_synchronous_one() -> None:
    trainer = integration.ConstrainedTrainer(composed())
    assert trainer.trainer_mode == "sync" and type(trainer.replay_buffer).__name__ == "ReplayBuffer"


def test_actor_workers_score_with_the_masses(monkeypatch) -> None:
    trainer = integration.ConstrainedTrainer(composed())
    trainer._init_resource_pool_mgr()
    (worker,) = trainer.role_worker_mapping.values()
    assert worker.__ray_actor_class__ is integration.ConstrainedWorker
    assert integration.ConstrainedWorker.actor_worker_cls is integration.ScoringWorker


@pytest.mark.parametrize("topk", [4, None])
def test_scoring_worker_gives_masses_and_leaves_the_loss_alone(monkeypatch, topk: int | None) -> None:
    batch = Batch(topk=topk)
    overrides = () if topk else ("algorithm.cmdp.cost=k1", *SAMPLED)
    actor, distill = parts(composed(*overrides))
    training_loss = partial(distillation_ppo_loss, config=actor, distillation_config=distill)

    def infer(self, data):  # what verl's worker and engine do with the loss function
        loss = self.loss_fn if tu.get(data, "compute_loss", default=True) else None
        outputs = engine_outputs(batch, data, loss, batch.student)
        return outputs if loss is None else (outputs, loss(model_output=outputs, data=data, dp_group=None))

    monkeypatch.setattr(TrainingWorker, "infer_batch", infer)
    worker = object.__new__(integration.ScoringWorker)
    worker.set_loss_fn(training_loss)
    data = batch.data(compute_loss=False)
    del data["advantages"]  # there are none yet
    result = worker.infer_batch(data)
    outputs = result if topk is None else result[0]
    assert ("cmdp_cost" in outputs) is (topk is not None) and "log_probs" in outputs
    assert worker.loss_fn.func is actor_loss and worker.loss_fn.args == (training_loss,)


# ------------------------------------------------------------------------------------------------- configuration

OURS = {
    "algorithm.cmdp",
    "actor_rollout_ref.actor.policy_loss.cmdp",
    "ray_kwargs.ray_init.runtime_env",
}


def leaves(node: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in node.items():
        name = f"{prefix}{key}"
        found += leaves(value, f"{name}.") if isinstance(value, dict) and value else [name]
    return found


def test_every_key_is_verls() -> None:
    example = OmegaConf.to_container(OmegaConf.load(Path(FOLDER) / "cmdp.yaml"))
    del example["defaults"], example["hydra"]
    with initialize_config_dir(str(Path(core_algos.__file__).parents[1] / "config"), version_base=None):
        defaults = OmegaConf.to_container(compose("ppo_trainer"))

    def known(key: str) -> bool:
        node = defaults
        for name in key.split("."):
            if not isinstance(node, dict) or name not in node:
                return False
            node = node[name]
        return True

    own = [key for key in leaves(example) if not any(key.startswith(f"{ours}.") or key == ours for ours in OURS)]
    unknown = [key for key in own if not known(key)]
    assert len(own) > 30 and not unknown, unknown


def test_verl_accepts_the_example() -> None:
    config = composed()
    assert integration.check_config(config).budget == 8.0
    validate_config(config, use_reference_policy=False, use_critic=False)
    actor, distill = parts(config)
    assert isinstance(actor.policy_loss, integration.PolicyLoss)
    assert distill.teacher_models["default"].world_size == 2


def test_the_command_in_the_header_reaches_verls_launcher() -> None:
    """Up to the point where Ray would start: hydra prints the configuration instead."""
    header = (Path(FOLDER) / "cmdp.yaml").read_text().split("\n\n")[0]
    lines = [line.removeprefix("#").strip() for line in header.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("export"))
    setting, command = lines[start], " ".join(line.rstrip("\\") for line in lines[start + 1 : start + 4])
    assert re.match(r"python -m verl\.trainer\.main_ppo --config-name cmdp", command)
    script = f"{setting}; {command.replace('python', shlex.quote(sys.executable))} --cfg job"
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    shown = OmegaConf.create(printed[printed.index("actor_rollout_ref:") :])
    assert shown.data.train_files == "train.parquet" and shown.algorithm.adv_estimator == "cmdp"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.adv_estimator=grpo", "algorithm.adv_estimator=grpo"),
        ("algorithm.use_kl_in_reward=true", "use_kl_in_reward=True"),
        ("actor_rollout_ref.actor.use_kl_loss=true", "use_kl_loss=True"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla", "loss_mode=vanilla"),
        ("actor_rollout_ref.actor.policy_loss.cmdp={budget: 1, cost: forward_kl}", "differs from algorithm.cmdp"),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean", "loss_agg_mode=seq-mean-token-mean"),
        ("actor_rollout_ref.rollout.temperature=0.7", "temperature=0.7"),
        ("algorithm.rollout_correction.bypass_mode=true", "bypass_mode=True"),
        ("algorithm.filter_groups.enable=true", "filter_groups.enable=True"),
        ("distillation.enabled=false", "distillation.enabled=False"),
        ("distillation.distillation_loss.loss_mode=k3", "loss_mode=k3, the trainer 'cmdp' expects cmdp"),
        ("algorithm.cmdp.cost=k1", "loss_mode=cmdp, the trainer 'cmdp' expects cmdp_sampled"),
        ("distillation.distillation_loss.use_task_rewards=false", "use_task_rewards=False"),
        ("distillation.distillation_loss.use_policy_gradient=true", "use_policy_gradient=True"),
        ("distillation.distillation_loss.distillation_loss_coef=0.5", "distillation_loss_coef=0.5"),
        ("distillation.distillation_loss.loss_max_clamp=10", "loss_max_clamp=10"),
        ("distillation.distillation_loss.log_prob_min_clamp=-10", "log_prob_min_clamp=-10"),
        ("actor_rollout_ref.actor.strategy=megatron", "strategy=megatron with cost=forward_kl, expected fsdp or fsdp2"),
        ("actor_rollout_ref.model.use_fused_kernels=true", "use_fused_kernels=True"),
        ("actor_rollout_ref.actor.clip_ratio_c=1.0", "clip_ratio_c=1.0, expected a number above 1"),
        ("~algorithm.cmdp.budget", "algorithm.cmdp has .*expected at least 'budget' and 'cost'"),
    ],
)
def test_what_would_train_something_else_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        integration.ConstrainedTrainer(composed(override))


def test_sampled_cost_needs_no_more_than_its_loss() -> None:
    assert integration.check_config(composed("algorithm.cmdp.cost=k1", *SAMPLED)).action_dependent

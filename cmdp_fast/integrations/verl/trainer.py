"""The trainer `cmdp`: verl's synchronous PPO trainer, with token costs for the estimator of the same name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from torch import Tensor
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

import cmdp_fast as cf
from cmdp_fast import objective
from cmdp_fast.metrics import as_numbers

from . import multiplier
from .advantage import charging
from .config import check_config, multiplier_of
from .costs import SAMPLED_FIELDS, TOPK_FIELDS, cost_of_rollouts
from .losses import COEFFICIENT, SEQUENCE_WEIGHTS, actor_loss


class ScoringWorker(TrainingWorker):
    """An actor that compares its logits with the teacher's k tokens by `costs.cost_of_logits`, also where it only
    scores: verl does that in the loss function, which its scoring pass does without.
    """

    loss_fn: Any

    def set_loss_fn(self, loss_fn: Any) -> None:
        super().set_loss_fn(partial(actor_loss, loss_fn))

    def infer_batch(self, data: Any) -> Any:
        """verl's, with `costs.COST` and both masses where `distillation_use_topk` asks for them."""
        if not tu.get(data, "distillation_use_topk", default=False):
            return super().infer_batch(data)
        training_loss = self.loss_fn
        self.loss_fn = partial(_logits_alone, training_loss)
        tu.assign_non_tensor(data, compute_loss=True)
        try:
            return super().infer_batch(data)
        finally:
            self.loss_fn = training_loss


def _logits_alone(training_loss: Any, student_logits: Tensor | None = None, **arguments: Any) -> Any:
    """What the training loss makes of logits, and a loss of 0."""
    if student_logits is not None:
        return training_loss(student_logits=student_logits, **arguments)
    return torch.zeros(()), {}


class ConstrainedWorker(ActorRolloutRefWorker):
    actor_worker_cls = ScoringWorker


@register_trainer("cmdp")
class ConstrainedTrainer(PPOTrainerSync):
    """`trainer.v1.trainer_mode=cmdp`. Refuses a configuration that would train something else before a model loads."""

    def __init__(self, config: Any) -> None:
        self.constraint = check_config(config)
        self.controller = multiplier_of(config.algorithm)
        # The name has chosen this class and is done; verl asks again for "sync" where it chooses a replay buffer.
        config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(ConstrainedWorker)

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info["distillation_use_topk"] = not self.constraint.action_dependent
        return super()._compute_old_log_prob(batch, metrics)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """verl's, with the costs of the batch; for `pid` lambda is set by them first, as `Learner.price` does."""
        fields = SAMPLED_FIELDS if self.constraint.action_dependent else TOPK_FIELDS
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=[*fields, "response_mask"]
        )
        cost, mask = cost_of_rollouts(data, self.constraint), data["response_mask"].to_padded_tensor(0).bool()
        real = mask.any(1)  # verl fills a batch up with rows that have no token to train on
        if real.any():
            trace = cf.budget_trace(cost[real].detach(), constraint=self.constraint, mask=mask[real])
            figures = as_numbers(objective.constraint_metrics(cost[real], trace, mask=mask[real]))
            if self.controller is not None:
                self.constraint = multiplier.priced(self.constraint, self.controller, figures["mean_cumulative"])
            if self.constraint.is_a.coefficient == "lambda":
                figures["lambda"] = self.constraint.price
            metrics |= {f"cmdp/{name}": value for name, value in figures.items()}
        with charging(cost, self.constraint):
            return super()._compute_advantage(batch, metrics)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info[SEQUENCE_WEIGHTS] = self.config.algorithm.rollout_correction.rollout_is == "sequence"
        if self.controller is not None:
            batch.extra_info[COEFFICIENT] = self.constraint.coefficient
        return super()._update_actor(batch, metrics)

    # ------------------------------------------------------------------------------------------ for a checkpoint

    def _save_checkpoint(self) -> None:
        if self.controller is not None:  # first, since verl's last act is to declare the checkpoint whole
            multiplier.save(self.controller, self._folder())
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.controller is None or self.global_steps == 0:
            return
        given = self.config.trainer.resume_mode == "resume_path"
        multiplier.load(self.controller, Path(self.config.trainer.resume_from_path) if given else self._folder())

    def _folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")

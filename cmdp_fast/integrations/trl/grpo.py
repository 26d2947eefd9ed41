"""GRPO under a budget: TRL's `GRPOTrainer` with advantages from the modified reward and the direct term in its loss."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import GRPOTrainer

import cmdp_fast as cf
from cmdp_fast import batches, credit, objective
from cmdp_fast.errors import InputError
from cmdp_fast.scoring import Models, Outputs, ScoredBatch

from .advantage import position_advantages, sequence_advantages
from .config import CMDPGRPOConfig
from .controller import ConstraintController
from .metrics import constraint_metrics
from .sampler import Drawn, drawn, weighed
from .scoring import Batch, TRLScoring, trained_tokens
from .teacher import check_pair, load_teacher, prepare_teacher, suppress_unshared_columns


class CMDPGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with a teacher that the student must stay close to; all its other arguments are TRL's.

    A rollout is scored as TRL does it; then student and teacher read it, and `cf.linear_constrained_reward` gives
    costs, the budget's account and the modified reward. Advantages ``[B, T]`` are those of `cmdp_fast.objective`. Where
    the cost has a gradient the loss gets the direct term, each token divided as TRL divides its own terms, and
    the student's log-probabilities, entropies and costs come from one forward pass, `cf.linear_token_stats`, and one
    backward pass. Without a direct term the loss is TRL's, untouched.

    With an infinite budget and no direct term it is GRPO. A completion that TRL masks because it was truncated has no
    cost, and keeps its reward in the group's baseline. One that no reward function has an opinion on is left out of the
    baseline and the deviation, and only the constraint acts on it. A model with absolute positions gets a hook that
    counts them from the prompt's first token (`positions`). Text alone: no images.

    Args:
        teacher_model: hub id, folder or model, or one that is asked: a `Teacher`, or its name such as
            `served:http://10.0.0.2:8765`; instead of `args.teacher_model`. It never gets a gradient.

    Metrics: `metrics.constraint_metrics`, at each generation, and ``loss/direct``, the direct term of the loss.

    Raises InputError, before any training, for settings and models that do not fit.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "cmdp"]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: CMDPGRPOConfig | None = None,
        *others: Any,
        teacher_model: Any = None,
        **named: Any,
    ) -> None:
        if not isinstance(args, CMDPGRPOConfig):
            raise InputError(f"args must be a CMDPGRPOConfig, got {type(args).__name__}")
        if teacher_model is not None and args.teacher_model is not None:
            raise InputError("teacher_model was given twice, as an argument and in args; expected one of them")
        teacher = load_teacher(args.teacher_model if teacher_model is None else teacher_model, args)
        super().__init__(model, reward_funcs, args, *others, **named)
        if self._is_vlm:
            raise InputError("the processing class is one of images and text; expected a tokenizer, for text alone")
        if args.has_direct_term and self.aux_loss_enabled:
            raise InputError(
                "the direct term is computed from hidden states, without a mixture of experts' auxiliary loss: set "
                "router_aux_loss_coef=0"
            )
        width = check_pair(self.model, teacher, self._tokenizer)
        suppress_unshared_columns(self, width)
        self.teacher_model = prepare_teacher(teacher, self)
        self.constraint = args.constraint
        if args.kind == "pid":
            kp, ki, kd = args.pid_gains
            self.add_callback(ConstraintController(kp, ki, kd, self.constraint.price))
        self.scoring = TRLScoring(self, self.teacher_model, width)

    # ------------------------------------------------------------------------------------- score

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's; the rewards of all processes by function are needed again in a moment."""
        self._rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        """TRL's batch with the advantages ``[B, T]`` of the modified reward. Where there is a direct term also
        ``direct`` ``[B, T]``, its weights divided as the advantages are, and the teacher's hidden
        states if they fit in the cache."""
        batch: Batch = super()._generate_and_score_completions(inputs)
        self.scoring.check_tokens(batch)
        training, args, constraint = self.model.training, self.args, self.constraint
        group_size = self.num_generations if training else self.num_generations_eval
        size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        mask = trained_tokens(batch)
        task = credit.task_rewards(self._rewards, self.reward_weights, group_size)
        mine = batches.of_this_process(len(mask), self.accelerator)
        task_reward = credit.at_last_token(task.reward[mine], mask)

        def settle(models: Models, outputs: Outputs, tokens: Tensor, part: slice) -> cf.ConstrainedReward:
            return self.scoring.constrained_reward(
                models, outputs, tokens, task_reward[part], mask=mask[part], constraint=constraint
            )

        direct = args.has_direct_term
        account = self.scoring.account(self.model, batch, settle, rows_at_once=size, keep=direct)
        sampled = drawn(args, batch, account.stats.logprob, mask) if training else None
        if self.controller is not None and training:
            account = self._priced(account, task_reward, mask, sampled)
            constraint = self.constraint
        batch["advantages"], scale = self._advantages(account, task, task_reward, mask, group_size)
        if direct:
            weights = objective.direct_coefficient(account.trace, constraint, mask=mask) / scale
            batch["direct"] = weighed(weights, args, batch)
            if account.teacher_outputs is not None:
                batch["teacher_hidden"] = account.teacher_outputs
            if "old_per_token_logps" in batch:  # of the same columns and from the same operation as in the update
                batch["old_per_token_logps"] = account.stats.logprob
        found = constraint_metrics(
            self.accelerator,
            account.stats,
            cf.token_cost(account.stats, constraint.cost, clamp=constraint.cost_clamp),
            mask,
            trace=account.trace,
            budget=args.budget,
            reward=account.reward,
            drawn=sampled,
        )
        if found and constraint.is_a.coefficient == "lambda":
            found["cmdp/lambda"] = constraint.price
        for name, value in found.items():
            self._metrics["train" if training else "eval"][name].append(value)
        self._show_advantages(batch["advantages"], mask)
        return batch

    @property
    def controller(self) -> ConstraintController | None:
        """That of ``pid``; transformers may have put another in its place, with a checkpoint's state."""
        callbacks = self.callback_handler.callbacks
        return next((each for each in callbacks if isinstance(each, ConstraintController)), None)

    def _priced(self, account: ScoredBatch, task_reward: Tensor, mask: Tensor, sampled: Drawn | None) -> ScoredBatch:
        """The account by the lambda that the controller sets by these completions, of all processes; the constraint
        has it from here on. A budget per token is compared with the mean cost of completions as so much times their
        mean length. One without a token has no cost."""
        assert self.controller is not None
        spent, ratio = (
            credit.of_last_token(account.trace.cumulative, mask),
            None if sampled is None else sampled.log_ratio,
        )
        spent, everywhere, ratio = batches.gathered((spent, mask, ratio), self.accelerator)
        lengths = everywhere.sum(1).float()
        real = lengths > 0
        if not real.any():
            return account
        weight = None
        if sampled is not None and ratio is not None:
            weight = sampled._replace(log_ratio=ratio).weight(everywhere)[real]
        cost, length = (float(objective.weighted_mean(each[real], weight)) for each in (spent, lengths))
        budget = float(self.constraint.budget) * (length if self.constraint.per_token else 1.0)
        self.constraint = replace(self.constraint, coefficient=self.controller.pid.update(cost, budget))
        costs = cf.token_cost(account.stats, self.constraint.cost, clamp=self.constraint.cost_clamp)
        reward = cf.modified_reward(task_reward, costs, account.trace, constraint=self.constraint, mask=mask)
        return account._replace(reward=reward)

    def _advantages(
        self, account: ScoredBatch, task: credit.TaskRewards, task_reward: Tensor, mask: Tensor, group_size: int
    ) -> tuple[Tensor, Tensor]:
        """(advantage [B, T], the number [B, 1] by which it was divided); ``task_reward`` [B, T]: of this process."""
        if self.args.baseline == "position_rloo":
            score = credit.score(account.reward, task_reward, account.trace, self.constraint, mask=mask)
            return position_advantages(score, task, mask, group_size, self.accelerator), torch.ones_like(score[:, :1])
        mine = batches.of_this_process(len(mask), self.accelerator)
        returns = torch.where(mask.any(1), account.reward.sum(1), task.reward[mine])
        return sequence_advantages(
            returns, task.scored, mask, group_size, self.accelerator, "grpo", scale_rewards=self.args.scale_rewards
        )

    def _show_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """Puts the means over tokens where TRL keeps a completion's advantage for its table of completions."""
        means = self.accelerator.gather(advantages.sum(1) / mask.sum(1).clamp(min=1)).tolist()
        shown = self._logs["advantages"]
        for _ in range(min(len(means), len(shown))):
            shown.pop()
        shown.extend(means)

    # ------------------------------------------------------------------------------------- update

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        """TRL's loss and the direct term, sum k c, each token of both divided by the same."""
        if "direct" not in inputs:
            return super()._compute_loss(model, inputs)
        policy = _Policy(self.scoring, model, inputs)
        loss = super()._compute_loss(policy, inputs)
        assert policy.stats is not None
        cost = cf.token_cost(policy.stats, self.constraint.cost)
        weight = inputs["direct"] * self._token_weights(inputs)
        direct = torch.where(weight != 0, weight * cost, 0.0).sum()  # 0 * inf: no part of the objective
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        shown = self.accelerator.gather(direct.detach() * accumulated).mean().item()
        self._metrics["train" if self.model.training else "eval"]["loss/direct"].append(shown)
        return loss + direct

    def _token_weights(self, inputs: Batch) -> Tensor:
        """The factor of a token's term in TRL's loss, [B, 1] or a scalar; the tokens' terms are then summed."""
        mask = trained_tokens(inputs)
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.loss_type in ("grpo", "sapo"):
            divisor = mask.sum(1, keepdim=True).clamp(min=1) * len(mask)
        elif self.loss_type == "bnpo":
            divisor = mask.sum().clamp(min=1)
        elif self.loss_type == "dr_grpo":
            divisor = torch.tensor(len(mask) * self.max_completion_length, device=mask.device)
        elif self.loss_type == "luspo":
            divisor = torch.tensor(len(mask), device=mask.device)
        elif self.loss_type in ("cispo", "dapo", "vespo"):
            divisor = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if self.model.training:
                divisor = divisor / self.args.steps_per_generation
        else:
            raise InputError(f"loss_type={self.loss_type!r} is not known here, so the direct term has no divisor")
        return 1.0 / (divisor * accumulated)


class _Policy:
    """The student as TRL's `_get_per_token_logps_and_entropies` calls it, answered from `cf.linear_token_stats`.

    So TRL's loss is computed from the statistics that the direct term is made of: one forward and one backward pass.
    """

    def __init__(self, scoring: TRLScoring, model: Any, batch: Batch) -> None:
        self.scoring, self.model, self.batch = scoring, model, batch
        self.stats: cf.TokenStats | None = None

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, fused_lm_head: bool) -> Any:
        tokens, mask = self.batch["completion_ids"], self.batch["completion_mask"].bool()
        outputs = (self.scoring.outputs(self.model, self.batch), self.scoring.teacher_outputs(self.batch))
        self.stats = self.scoring.token_stats((self.model, self.scoring.teacher), outputs, tokens, mask)
        return SimpleNamespace(log_probs=self.stats.logprob, entropy=self.stats.entropy)

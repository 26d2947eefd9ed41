"""On-policy distillation with a reward and under a budget: TRL's `DistillationTrainer` on this package's operations."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler, nanstd

import cmdp_fast as cf
from cmdp_fast import batches, credit, objective, reward_functions
from cmdp_fast.errors import InputError
from cmdp_fast.messages import as_completion
from cmdp_fast.reference import CostName
from cmdp_fast.scoring import Models, Outputs

from .advantage import sequence_advantages
from .completions_table import Row, add_columns, table_rows
from .config import CMDPDistillationConfig
from .metrics import constraint_metrics
from .scoring import Batch, TRLScoring, trained_tokens
from .teacher import check_pair, load_teacher, prepare_teacher, suppress_unshared_columns


class CMDPDistillationTrainer(DistillationTrainer):
    """`DistillationTrainer` that logs exact divergences and takes rewards and a budget; other arguments are TRL's.

    The loss is a mean over tokens of k c - A log pi. c is the divergence that `args.beta` names, with its gradient.
    With neither rewards nor a budget, k = `args.discrepancy_weight` = 1 and A = 0: TRL's loss, of vocabularies that
    may differ in width. With rewards, A is the task reward less the mean of the other completions of its prompt
    (`objective.rloo`). With a budget, the account of c decides: completions within it are left to the reward, those
    over it are distilled (k is `objective.direct_coefficient`), and A comes from the modified reward.

    Completions are sampled from the student as it is, so there is no ratio and nothing to clip. Text alone: no images.

    Args:
        teacher_model: hub id, folder or model, or one that is asked: a `Teacher`, or its name such as
            `served:http://10.0.0.2:8765`; instead of `args.teacher_model_name_or_path`.
        reward_funcs: one or several, as GRPO's but for reward models: functions, partials or objects, coroutine
            functions too, which are called as `cmdp_fast/reward_functions.py` says. Several are added up.

    Metrics: `metrics.constraint_metrics`, and with rewards ``reward``, ``reward_std``, ``rewards/NAME/mean`` and
    ``/std``, and under its own name what a function gives to ``log_metric``. With `args.log_completions` the table of
    completions has the rewards and the columns of ``log_extra``.

    Raises InputError, before any training, for settings and models that do not fit.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "distillation", "cmdp"]

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: CMDPDistillationConfig | None = None,
        *others: Any,
        reward_funcs: reward_functions.RewardFunction | Sequence[reward_functions.RewardFunction] | None = None,
        **named: Any,
    ) -> None:
        if not isinstance(args, CMDPDistillationConfig):
            raise InputError(f"args must be a CMDPDistillationConfig, got {type(args).__name__}")
        self.reward_functions = _named_functions(reward_funcs)
        if self.reward_functions and args.num_generations < 2:
            raise InputError(
                f"rewards need completions to compare: num_generations must be at least 2, got {args.num_generations}"
            )
        teacher = load_teacher(args.teacher_model_name_or_path if teacher_model is None else teacher_model, args)
        super().__init__(model, None, args, *others, **named)  # None: TRL takes no teacher of another width
        if self._is_vlm:
            raise InputError("the processing class is one of images and text; expected a tokenizer, for text alone")
        if args.num_generations > 1 and not hasattr(self.train_dataset, "__len__"):
            raise InputError("num_generations > 1 repeats prompts by their number: expected a dataset with a length")
        width = check_pair(self.model, teacher, self._tokenizer)
        suppress_unshared_columns(self, width)
        self.teacher_model = prepare_teacher(teacher, self)
        self.scoring = TRLScoring(self, self.teacher_model, width)
        self._judged: deque[Row] = deque(maxlen=self._logs["prompt"].maxlen)  # rows of the table of completions
        self._seen: tuple[cf.TokenStats, Tensor, Tensor] | None = None  # with cost and mask, of the last loss

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        """TRL's, with each prompt `num_generations` times in a row."""
        args = self.args
        size = args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        return RepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=args.num_generations,
            batch_size=size // args.num_generations,
            repeat_count=args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=args.seed,
        )

    # ------------------------------------------------------------------------------------- score

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        """TRL's batch; with rewards or a budget also ``advantages`` ``[B, T]``, with a budget ``direct`` ``[B, T]``,
        the weights of the divergence, ``modified_reward`` ``[B, T]`` and the teacher's hidden states."""
        batch: Batch = super()._generate_and_score_completions(inputs)
        self.scoring.check_tokens(batch)
        args, training = self.args, self.model.training
        if not self.reward_functions and args.budget is None:
            return batch
        mask = trained_tokens(batch)
        group_size = args.num_generations if training else 1
        everyones = self._task_rewards(inputs, batch, group_size)
        reward = credit.at_last_token(everyones.reward[batches.of_this_process(len(mask), self.accelerator)], mask)
        if args.constraint is not None:
            account = self.scoring.account(
                self.model,
                batch,
                lambda models, outputs, tokens, part: self._settle(models, outputs, tokens, mask[part], reward[part]),
                rows_at_once=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
                keep=True,
            )
            reward = batch["modified_reward"] = account.reward
            batch["direct"] = objective.direct_coefficient(account.trace, args.constraint, mask=mask)
            if account.teacher_outputs is not None:
                batch["teacher_hidden"] = account.teacher_outputs
        batch["advantages"], _ = sequence_advantages(
            reward.sum(1), everyones.scored, mask, group_size, self.accelerator, "rloo"
        )
        return batch

    def _settle(
        self, models: Models, outputs: Outputs, tokens: Tensor, mask: Tensor, task_reward: Tensor
    ) -> cf.ConstrainedReward:
        """The account of completions, charged with the divergence that is the loss, and the modified reward."""
        stats, cost = self._statistics(models, outputs, tokens, mask)
        trace = cf.budget_trace(cost, constraint=self.args.constraint, mask=mask)
        reward = cf.modified_reward(task_reward.to(cost.dtype), cost, trace, constraint=self.args.constraint, mask=mask)
        return cf.ConstrainedReward(stats, trace, reward)

    def _task_rewards(self, inputs: Sequence[dict[str, Any]], batch: Batch, group_size: int) -> credit.TaskRewards:
        """The task rewards of the completions of all processes; 0 without reward functions."""
        ids = [
            tokens[kept].tolist()
            for tokens, kept in zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
        ]
        rewards = torch.zeros(len(ids), 1, device=self.accelerator.device)
        if self.reward_functions:
            texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
            prompts = [row["prompt"] for row in inputs]
            given = reward_functions.Given(
                prompts=prompts,
                completions=[as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
                completion_ids=ids,
                columns=reward_functions.columns_of(inputs),
                trainer_state=self.state,
            )
            numbers, logged = reward_functions.call(self.reward_functions, given)
            if self.log_completions:
                named = {function.name: row for function, row in zip(self.reward_functions, numbers, strict=True)}
                self._judged.extend(gather_object(table_rows(named, logged.rows())))
            rewards = torch.tensor(numbers, device=self.accelerator.device).T
        rewards = batches.gathered(rewards, self.accelerator)
        task = credit.task_rewards(rewards, torch.ones(rewards.shape[1]), group_size)
        if self.reward_functions:
            self._log_rewards(rewards, reward_functions.mean_metrics(logged, self.accelerator))
        return task

    def _log_rewards(self, rewards: Tensor, logged: dict[str, float]) -> None:
        """As TRL's GRPO: rewards [N, F] of all processes, NaN for no opinion, and what the functions have logged."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for function, column in zip(self.reward_functions, rewards.T, strict=True):
            metrics[f"rewards/{function.name}/mean"].append(column.nanmean().item())
            metrics[f"rewards/{function.name}/std"].append(nanstd(column).item())
        total = torch.where(rewards.isnan().all(1), torch.nan, rewards.nansum(1))
        metrics["reward"].append(total.nanmean().item())
        metrics["reward_std"].append(nanstd(total).item())
        for name, value in logged.items():
            metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; its table of completions gets the rewards and what their functions log of each completion."""
        super().log(logs, start_time)
        if self._judged and self.accelerator.is_main_process:
            name = f"completions_{self.state.global_step:05d}.parquet"
            add_columns(Path(self.args.output_dir) / "completions" / name, self._judged)

    # ------------------------------------------------------------------------------------- update

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's; the statistics that the loss was made of are logged once all processes are out of it."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self._seen is not None
        stats, cost, mask = self._seen
        self._seen, constraint = None, self.args.constraint
        figures = constraint_metrics(
            self.accelerator,
            stats,
            cost,
            mask,
            trace=None if constraint is None else cf.budget_trace(cost, constraint=constraint, mask=mask),
            budget=self.args.budget,
            reward=inputs.get("modified_reward"),
        )
        for name, value in figures.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        return result

    def _compute_loss(
        self, unwrapped_student: Any, inputs: Batch, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, sum of the entropies, number of tokens) of a micro-batch."""
        mask, tokens = trained_tokens(inputs), inputs["completion_ids"]
        models = (unwrapped_student, self.scoring.teacher)
        outputs = (self.scoring.outputs(unwrapped_student, inputs), self.scoring.teacher_outputs(inputs))
        stats, cost = self._statistics(models, outputs, tokens, mask, likelihood="advantages" in inputs)
        count = mask.sum()
        loss, _ = objective.ppo_loss(
            stats.logprob,
            stats.logprob,  # the student has not changed since it sampled: the ratio is 1
            inputs.get("advantages", torch.zeros_like(stats.logprob)),
            mask=mask,
            cost=cost,
            direct=inputs.get("direct", torch.full_like(cost, self.args.discrepancy_weight)),
            normalizer=count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch,
        )
        self._seen = (cf.TokenStats(*(column.detach() for column in stats)), cost.detach(), mask)
        return loss, stats.entropy.sum().detach(), count

    def _statistics(
        self, models: Models, outputs: Outputs, tokens: Tensor, mask: Tensor, *, likelihood: bool = True
    ) -> tuple[cf.TokenStats, Tensor]:
        """The statistics of tokens and the divergence that is the loss; ``likelihood``: whether a gradient is to flow
        through the statistics where the divergence is none of them."""
        kinds: dict[float, CostName] = {0.0: "forward_kl", 1.0: "reverse_kl"}
        plain = kinds.get(float(self.beta))
        with nullcontext() if plain or likelihood else torch.no_grad():
            stats = self.scoring.token_stats(models, outputs, tokens, mask)
        if plain:
            return stats, cf.token_cost(stats, plain)
        return stats, self.scoring.divergence(models, outputs, mask, self.beta)


def _named_functions(given: Any) -> list[reward_functions.Named]:
    """Reward functions with their names, of which TRL lets several be the same. Raises InputError for a value that is
    no function."""
    functions = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for function in functions:
        if not callable(function) or isinstance(function, torch.nn.Module):
            raise InputError(
                f"reward_funcs must be functions here, got {function!r}; CMDPGRPOTrainer takes reward models, too"
            )
    return [reward_functions.Named(reward_functions.name_of(function), function) for function in functions]

"""One step of constrained PPO, to be read from top to bottom.

roll out   the student samples a group of completions of each prompt
score      teacher and student read them; `constrained_reward` turns what both say into costs, the account of the
           budget and the modified reward, in one pass over the vocabulary, without holding logits (experience.py)
advantage  what each token is worth, compared with the group's other completions or with a value head's prediction
update     some epochs of clipped PPO over minibatches, with the direct term: the gradient through the divergence

The methods that distil without a reward (gkd.py, minillm.py, off_policy.py) differ in where completions come from, in
what a token is worth, or in the loss, and in nothing else.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import cmdp_fast as cf
from cmdp_fast import batches, credit, objective
from cmdp_fast.constraint import Constraint
from cmdp_fast.errors import InputError
from cmdp_fast.metrics import as_numbers

from ..experience import Collector, Experience, Metrics
from ..models.value_head import ValueHead, explained_variance
from ..records.clock import Clock
from ..settings.constraint import training_constraint
from ..tasks.data import Problem

Targets = dict[str, Tensor]  # [B, T] each


class PPO:
    """A student, the teacher it must stay close to, and the means to improve the student by a step."""

    # What a loss is a mean over. The objective is a sum over a completion's tokens and a mean over completions.
    mean_over: ClassVar[Literal["completions", "tokens"]] = "completions"

    def __init__(
        self, collector: Collector, *, optimizer: torch.optim.Optimizer, scheduler: Any, value_head: Any = None
    ) -> None:
        self.collector = collector
        self.config = collector.config
        self.accelerator = collector.accelerator
        self.student, self.teacher, self.scoring = collector.student, collector.teacher, collector.scoring
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.value_head: ValueHead | None = value_head
        self.clock = Clock(self.accelerator.device)
        kp, ki, kd = self.config.pid_gains
        self.pid = objective.PIDController(kp=kp, ki=ki, kd=kd, initial_integral=self.config.coefficient)
        self.steps_done = 0
        self.tokens_seen = 0

    def step(self, rows: list[Problem], prompts: list[list[int]]) -> Metrics:
        """Improves the student on some problems, this process's share; returns what is logged, of all processes."""
        start = self.clock.now()
        group = self.config.num_generations
        constraint = self.constraint()
        experience = self.collect(
            [row for row in rows for _ in range(group)], [ids for ids in prompts for _ in range(group)], constraint
        )
        metrics = self.collector.measure(experience, constraint)
        metrics |= self.update(experience, self.targets(experience, constraint))
        if self.config.kind == "pid":
            self.pid.update(metrics["cmdp/mean_cumulative"], float(constraint.budget))
        self.steps_done += 1
        self.tokens_seen += round(metrics["completions/mean_length"] * len(experience.rollout) * self._processes)
        seconds = self.clock.now() - start
        per_second = metrics["completions/mean_length"] * len(experience.rollout) * self._processes / seconds
        return metrics | {"num_tokens": self.tokens_seen, "step_time": seconds, "tokens_per_second": per_second}

    @property
    def _processes(self) -> int:
        return self.accelerator.num_processes

    def constraint(self) -> Constraint:
        """What holds in this step."""
        coefficient = {
            "lagrangian": self.config.coefficient,
            "barrier": self.config.coefficient,
            "pid": self.pid.coefficient,
        }.get(self.config.kind)
        return training_constraint(self.config, self.steps_done, coefficient)

    # ------------------------------------------------------------------------------------- roll out and score

    def collect(self, rows: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        """Completions of the prompts, a group of each, sampled and scored."""
        return self.collector.collect(
            self.student, rows, prompts, constraint, self.clock, keep_outputs=True, value_head=self.value_head
        )

    # ------------------------------------------------------------------------------------- advantage

    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        """``advantage``, what the score term weighs a token with; ``direct``, what the direct term weighs its cost
        with, divided by what the advantages were divided by; with a value head, the ``value`` it should have given."""
        c, mask = self.config, experience.rollout.mask
        direct = objective.direct_coefficient(experience.trace, constraint, mask=mask)
        if c.baseline == "gae":
            assert experience.value is not None
            advantage, value = objective.gae(
                experience.reward, experience.value, mask=mask, gamma=c.gamma, lam=c.gae_lambda
            )
            return {"advantage": advantage, "direct": direct, "value": value}
        if c.baseline == "position_rloo":
            score = credit.score(
                experience.reward, experience.last_reward, experience.trace, constraint, mask=mask, gamma=c.gamma
            )
            return {"advantage": objective.position_rloo(score, c.num_generations, mask), "direct": direct}
        returns = objective.returns_to_go(experience.reward, mask=mask, gamma=c.gamma)[:, 0]
        advantage, scale = credit.sequence_advantage(returns, c.num_generations, c.baseline)
        return {"advantage": torch.where(mask, advantage[:, None], 0.0), "direct": direct / scale[:, None]}

    # ------------------------------------------------------------------------------------- update

    def update(self, experience: Experience, targets: Targets) -> Metrics:
        """Some epochs over the completions in minibatches; returns the metrics' means over the minibatches."""
        c, mask = self.config, experience.rollout.mask
        history: list[Metrics] = []
        with self.clock.phase("update"):
            for _ in range(c.epochs):
                for minibatch in torch.randperm(len(mask)).split(c.minibatch_size):
                    tokens = self._mean({"tokens": mask[minibatch].sum()})["tokens"]
                    metrics: dict[str, Tensor] = {}
                    parts = minibatch.split(c.micro_batch_size)
                    for rows in parts:
                        with self._gradients_stay_here(rows is not parts[-1]):
                            part, target = experience.rows(rows), {n: t[rows] for n, t in targets.items()}
                            over = len(minibatch) if self.mean_over == "completions" else tokens
                            loss, found, outputs = self.loss(part, target, over)
                            self.backward(loss, outputs)
                        share = part.rollout.mask.sum() / tokens
                        for name, value in {**found, "loss": loss.detach()}.items():
                            weighted = (
                                value if name.startswith("loss") else share * value
                            )  # a sum, or a mean over tokens
                            metrics[name] = metrics[name] + weighted if name in metrics else weighted
                    history.append(self._mean(metrics) | self.descend())
            learning_rate = self.scheduler.get_last_lr()[0]
            self.scheduler.step()
        means = {name: sum(m[name] for m in history) / len(history) for name in history[0]}
        if experience.value is not None:
            tensors = (experience.value, targets["value"], mask)
            means["value/explained_variance"] = float(
                explained_variance(*(batches.gathered(tensor, self.accelerator) for tensor in tensors))
            )
        return means | {"learning_rate": learning_rate}

    def loss(self, part: Experience, target: Targets, over: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss, metrics, the student's outputs) of some completions of a minibatch; sums are divided by ``over``."""
        c, mask, constraint = self.config, part.rollout.mask, self.constraint()
        stats, outputs, cost = self.statistics(part, constraint)
        loss, metrics = objective.ppo_loss(
            stats.logprob,
            part.stats.logprob,
            target["advantage"],
            mask=mask,
            clip_low=c.clip_low,
            clip_high=c.clip_high,
            cost=cost,
            direct=None if cost is None else target["direct"],
            normalizer=over,
        )
        if self.value_head is not None:
            error = torch.where(mask, self.value_head(outputs[0]) - target["value"], 0.0)
            metrics["loss/value"] = error.square().sum() / over
            loss = loss + metrics["loss/value"]
        return loss, {name: value.detach() for name, value in metrics.items()}, outputs[0]

    def statistics(
        self, part: Experience, constraint: Constraint
    ) -> tuple[cf.TokenStats, tuple[Tensor, Tensor], Tensor | None]:
        """(statistics of the student as it is now, both models' outputs, the cost where it passes a gradient)."""
        models, outputs = (self.student, self.teacher), self.outputs(part)
        tokens, mask = part.rollout.tokens, part.rollout.mask
        with self.clock.phase("kernels"):
            if constraint.cost == "jsd":
                cost = self.scoring.divergence(models, outputs, mask, constraint.beta)
                return self.scoring.token_stats(models, outputs, tokens, mask, inplace=False), outputs, cost
            stats = self.scoring.token_stats(models, outputs, tokens, mask)
        return stats, outputs, None if constraint.action_dependent else cf.token_cost(stats, constraint.cost)

    def outputs(self, part: Experience) -> tuple[Tensor, Tensor]:
        """Student's and teacher's hidden states or logits; the teacher's are those of the scoring if they were kept."""
        teacher = part.teacher_outputs
        if teacher is None:
            with torch.no_grad():
                teacher = self.collector.outputs(self.teacher, part.rollout)
        return self.collector.outputs(self.student, part.rollout), teacher

    def backward(self, loss: Tensor, outputs: Tensor) -> None:
        """The backward pass; its part above the outputs, loss and statistics, is booked as time in the kernels."""
        since = self.clock.now()
        if outputs.requires_grad:  # not where the head alone is trained
            outputs.register_hook(lambda _: self.clock.add("kernels", since))
        self.accelerator.backward(loss)

    def descend(self) -> Metrics:
        """The optimizer's step. Raises InputError, and takes none, if the gradient is not finite."""
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(norm):
            raise InputError(
                "the gradient is not finite: the learning rate is too high, or the cost is infinite where the teacher "
                "excludes a token that the student uses"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"grad_norm": norm}

    def _gradients_stay_here(self, wanted: bool) -> Any:
        """Gradients of a minibatch are exchanged once, with its last part."""
        return self.accelerator.no_sync(self.student) if wanted and self._processes > 1 else nullcontext()

    def _mean(self, values: dict[str, Tensor]) -> Metrics:
        """The mean over processes of each scalar."""
        here = as_numbers(values)
        if self._processes == 1:
            return here
        together = torch.tensor(list(here.values()), device=self.accelerator.device)
        return dict(zip(here, self.accelerator.reduce(together, "mean").tolist(), strict=True))

    # ------------------------------------------------------------------------------------- what a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the models, the optimizer and the schedule; plain numbers."""
        return {"steps_done": self.steps_done, "tokens_seen": self.tokens_seen, "pid": self.pid.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.steps_done, self.tokens_seen = state["steps_done"], state["tokens_seen"]
        self.pid.load_state_dict(state["pid"])

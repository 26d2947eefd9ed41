"""One step of training, to be read from top to bottom.

roll out   a method samples a group of completions of each prompt, from the student in most
score      teacher and student read them; `constrained_reward` turns their logits into costs, the account of the
           budget and the modified reward, in one pass over the vocabulary, without holding logits (`experience.py`)
target     the method weighs each token; for PPO that is its advantage (`methods/ppo.py`)
update     some epochs over minibatches with the method's loss

The methods (`methods/`) differ in the source of the completions, in the weights of the tokens, or in the loss, and in
nothing else.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from cmdp_fast import objective
from cmdp_fast.constraint import KINDS, Constraint
from cmdp_fast.errors import InputError
from cmdp_fast.metrics import as_numbers
from cmdp_fast.reward_functions import mean_metrics

from .experience import Experience, Metrics
from .methods.method import Method, Targets
from .models.offload import Offload
from .settings.constraint import training_constraint
from .tasks.data import Problem


class Learner:
    """A student, the method by which it learns, and the optimizer: one step after another."""

    def __init__(self, method: Method, *, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
        self.method, self.optimizer, self.scheduler = method, optimizer, scheduler
        self.collector, self.clock = method.collector, method.clock
        self.config, self.accelerator = method.config, method.accelerator
        self.student, self.teacher = method.student, method.teacher
        self.offload = Offload(self.config, self.teacher, optimizer)
        kp, ki, kd = self.config.pid_gains
        self.pid = objective.PIDController(kp=kp, ki=ki, kd=kd, initial_integral=self.config.coefficient)
        self.tokens_seen = 0

    @property
    def steps_done(self) -> int:
        """The steps behind it; the collector tells the reward functions."""
        return self.collector.steps_done

    def step(self, problems: list[Problem], prompts: list[list[int]]) -> Metrics:
        """Improves the student on some problems, this process's share; returns the metrics of all processes."""
        start = self.clock.now()
        group = self.config.num_generations
        constraint = self.constraint()
        experience = self.method.collect(
            [problem for problem in problems for _ in range(group)],
            [ids for ids in prompts for _ in range(group)],
            constraint,
        )
        metrics = self.collector.measure(experience, constraint)
        metrics |= self.update(experience, self.method.targets(experience, constraint), constraint)
        if self.config.kind == "pid":
            self.pid.update(metrics["cmdp/mean_cumulative"], float(constraint.budget))
        self.collector.steps_done += 1
        self.tokens_seen += round(metrics["completions/mean_length"] * len(experience.rollout) * self._processes)
        seconds = self.clock.now() - start
        per_second = metrics["completions/mean_length"] * len(experience.rollout) * self._processes / seconds
        metrics |= {"num_tokens": self.tokens_seen, "step_time": seconds, "tokens_per_second": per_second}
        return _with_logged(metrics, mean_metrics(experience.logged, self.accelerator))

    @property
    def _processes(self) -> int:
        return self.accelerator.num_processes

    def constraint(self) -> Constraint:
        """The constraint of this step."""
        coefficient = self.pid.coefficient if self.config.kind == "pid" else self.config.coefficient
        has_one = KINDS[self.config.kind].coefficient is not None
        return training_constraint(self.config, self.steps_done, coefficient if has_one else None)

    def update(self, experience: Experience, targets: Targets, constraint: Constraint) -> Metrics:
        """Some epochs over the completions in minibatches; returns the metrics' means over the minibatches."""
        c, history = self.config, list[Metrics]()
        with self.clock.phase("update"), self.offload.updating():
            for _ in range(c.epochs):
                for minibatch in torch.randperm(len(experience.rollout)).split(c.minibatch_size):
                    metrics = self._accumulate(experience, targets, constraint, minibatch)
                    history.append(self._mean(metrics) | self.descend())
            learning_rate = float(self.scheduler.get_last_lr()[0])
            self.scheduler.step()
        means = {name: sum(each[name] for each in history) / len(history) for name in history[0]}
        return means | self.method.explained(experience, targets) | {"learning_rate": learning_rate}

    def _accumulate(
        self, experience: Experience, targets: Targets, constraint: Constraint, minibatch: Tensor
    ) -> dict[str, Tensor]:
        """The gradient of a minibatch, one part after another; returns this process's metrics of it."""
        tokens = self._mean({"tokens": experience.rollout.mask[minibatch].sum()})["tokens"]
        over = len(minibatch) if self.method.mean_over == "completions" else tokens
        metrics: dict[str, Tensor] = {}
        parts = minibatch.split(self.config.micro_batch_size)
        for rows in parts:
            with self._gradients_stay_here(rows is not parts[-1]):
                part, target = experience.rows(rows), {name: tensor[rows] for name, tensor in targets.items()}
                loss, figures, outputs = self.method.loss(part, target, constraint, over)
                self.backward(loss, outputs)
            share = part.rollout.mask.sum() / tokens
            for name, value in {**figures, "loss": loss.detach()}.items():
                weighted = value if name.startswith("loss") else share * value  # a sum, or a mean over tokens
                metrics[name] = metrics[name] + weighted if name in metrics else weighted
        return metrics

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

    def _gradients_stay_here(self, wanted: bool) -> AbstractContextManager[None]:
        """Gradients of a minibatch are exchanged once, with its last part."""
        return self.accelerator.no_sync(self.student) if wanted and self._processes > 1 else nullcontext()

    def _mean(self, values: dict[str, Tensor]) -> Metrics:
        """The mean over processes of each scalar."""
        here = as_numbers(values)
        if self._processes == 1:
            return here
        together = torch.tensor(list(here.values()), device=self.accelerator.device)
        return dict(zip(here, self.accelerator.reduce(together, "mean").tolist(), strict=True))

    # ------------------------------------------------------------------------------------- for a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The state beside that of the models, the optimizer and the schedule; plain numbers."""
        return {"steps_done": self.steps_done, "tokens_seen": self.tokens_seen, "pid": self.pid.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.collector.steps_done, self.tokens_seen = state["steps_done"], state["tokens_seen"]
        self.pid.load_state_dict(state["pid"])
        self.offload.rest()  # a checkpoint's optimizer is read to where the parameters are


def _with_logged(metrics: Metrics, logged: Metrics) -> Metrics:
    """The metrics of a step with those that reward functions have logged. Raises InputError for a name of ours."""
    if taken := sorted(logged.keys() & {"step", *metrics}):
        raise InputError(f"log_metric({taken[0]!r}, ...): a step has a metric of that name; expected another name")
    return metrics | logged

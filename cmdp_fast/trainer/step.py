"""One step of training, to be read from top to bottom.

roll out   a method samples a group of completions of each prompt, from the student in most
score      teacher and student read them; `constrained_reward` turns their logits into costs, the account of the
           budget and the modified reward, in one pass over the vocabulary, without holding logits (`experience.py`)
price      for `pid`, the controller sets lambda by what these completions have spent
target     the method weighs each token; for PPO that is its advantage (`methods/ppo.py`). What another sampler has
           drawn for the student is weighed by how likely the student makes it (`correction.py`)
update     some epochs over minibatches with the method's loss

The methods (`methods/`) differ in the source of the completions, in the weights of the tokens, or in the loss, and in
nothing else.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import cmdp_fast as cf
from cmdp_fast import batches, objective
from cmdp_fast.constraint import Constraint
from cmdp_fast.credit import of_last_token
from cmdp_fast.errors import InputError
from cmdp_fast.metrics import as_numbers, frac_reward_zero_std
from cmdp_fast.reward_functions import mean_metrics
from cmdp_fast.teachers.teacher import Taken, Teacher

from .correction import estimate_weight, weighed
from .distributed import any_process
from .experience import Experience, Metrics
from .methods.method import Method, Targets
from .micro_batches import Lengths, lengths_of
from .models.offload import Offload
from .records.checkpoint import Trained
from .records.throughput import Throughput, read_tokens
from .settings.constraint import training_constraint
from .tasks.data import Problem

CAUSES = "a cost is infinite where the teacher excludes a token that the student uses, or the learning rate is too high"
CURES = "with a smaller --learning-rate, or with a teacher or a --cost that is finite where the student goes"


class NotFinite(InputError):
    """Loss, gradient or weights are not finite: the step that has led to it has perhaps ruined the student."""


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
        self.between = False  # the weights are those of no step: some of its minibatches are behind them, not all
        here = (
            nn.Module() if isinstance(self.teacher, Teacher) else self.teacher
        )  # what is computed elsewhere is not ours
        models = self.accelerator.unwrap_model(self.student), here
        self.throughput = Throughput(self.config, self.accelerator, self.clock, *models)

    @property
    def steps_done(self) -> int:
        """The steps behind it; the collector tells the reward functions."""
        return self.collector.steps_done

    def step(self, problems: list[Problem], prompts: list[list[int]]) -> Metrics:
        """Improves the student on some problems, this process's share; returns the metrics of all processes."""
        self.throughput.begin()
        taken = self.teacher.taken if isinstance(self.teacher, Teacher) else None
        splitter = self.collector.splitter
        before = splitter.padded_tokens, splitter.real_tokens
        group = self.config.num_generations
        constraint = self.constraint()
        experience = self.method.collect(
            [problem for problem in problems for _ in range(group)],
            [ids for ids in prompts for _ in range(group)],
            constraint,
        )
        if self.config.kind == "pid":
            constraint = self.price(experience, constraint)
        metrics = self.collector.measure(experience, constraint, corrected=True)
        targets, rollout = self.targets(experience, constraint), experience.rollout
        if self.config.mask_truncated_completions:  # they are compared with the others, and give no gradient
            experience = replace(experience, rollout=rollout.without_truncated())
        metrics |= self.update(experience, targets, constraint)
        self.collector.steps_done += 1
        self.between = False
        means = {"tokens": rollout.prompt_mask.sum() + rollout.mask.sum()}  # `num_tokens` has the prompts, as TRL's
        if self.config.grouped:
            rewards = experience.task_reward.masked_fill(~experience.scored, torch.nan)
            means["frac_reward_zero_std"] = frac_reward_zero_std(rewards, group)
        of_all = self._mean(means)
        self.tokens_seen += round(of_all.pop("tokens") * self._processes)
        metrics |= of_all
        given = splitter.padded_tokens - before[0], splitter.real_tokens - before[1]
        real, learned = (read_tokens(each.prompt_mask, each.mask) for each in (rollout, experience.rollout))
        took = self.throughput.end(sampled=float(rollout.mask.sum()), real=real, learned=learned, given=given)
        metrics |= {"num_tokens": self.tokens_seen, **took}
        if taken is not None:
            metrics |= self._asked(taken)
        return _with_logged(metrics, mean_metrics(experience.logged, self.accelerator))

    def _asked(self, before: Taken) -> Metrics:
        """What the answers of a teacher that is asked took in a step: bytes per token, and seconds that were waited for
        them, of the process that waited longest. Every process must call this."""
        assert isinstance(self.teacher, Teacher)
        tokens, size, seconds = (after - earlier for after, earlier in zip(self.teacher.taken, before, strict=True))
        here = torch.tensor([tokens, size, seconds], dtype=torch.float64)
        of_all = self.accelerator.gather(here.float().to(self.accelerator.device)).view(-1, 3).cpu()
        total, sent, _ = of_all.double().sum(0).tolist()
        return {"teacher/bytes_per_token": sent / max(total, 1.0), "timing_s/teacher": float(of_all[:, 2].max())}

    @property
    def _processes(self) -> int:
        return self.accelerator.num_processes

    def price(self, experience: Experience, constraint: Constraint) -> Constraint:
        """The constraint with the lambda that the controller sets by this step's completions, of all processes; the
        experience gets the modified reward that follows from it.

        So the costs are weighed by the lambda that they have led to, as in algorithm 1 of Stooke et al. and in
        OmniSafe, and not by that of a policy one update older. In return lambda depends a little on each of the
        completions: a bias of the order of one in their number. A budget per token is compared with the cost of
        completions as so much times their mean length. Both means are estimates for the student, where another sampler
        has drawn the completions for it. Raises InputError if their mean cost is not finite.
        """
        mask = experience.rollout.mask
        here = (of_last_token(experience.trace.cumulative, mask), mask.sum(1).float(), experience.sampler_log_ratio)
        spent, lengths, ratio = batches.gathered(here, self.accelerator)
        weight = estimate_weight(ratio, self.config)
        cost, length = (float(objective.weighted_mean(each, weight)) for each in (spent, lengths))
        self.pid.update(cost, float(constraint.budget) * (length if constraint.per_token else 1.0))
        constraint = replace(constraint, coefficient=self.pid.coefficient)
        experience.reward = cf.modified_reward(
            *(experience.last_reward, experience.cost(constraint), experience.trace), constraint=constraint, mask=mask
        )
        return constraint

    def constraint(self) -> Constraint:
        """The constraint of this step; for `pid` before the controller has seen its completions (`price`)."""
        return training_constraint(self.config, self.steps_done, self.pid.coefficient)

    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        """The method's, by the weights of completions that another sampler has drawn."""
        return weighed(self.method.targets(experience, constraint), experience.sampler_log_ratio, self.config)

    def update(self, experience: Experience, targets: Targets, constraint: Constraint) -> Metrics:
        """Some epochs over the completions in minibatches; returns the metrics' means over the minibatches. Raises
        NotFinite, in every process, as soon as it sees that the student is, or would be, ruined."""
        history = list[Metrics]()
        with self.clock.phase("update"), self.offload.updating():
            lengths = lengths_of(experience.rollout)
            for _ in range(self.config.epochs):
                for minibatch in minibatches(len(experience.rollout), self.config.minibatch_size):
                    metrics = self._mean(self._accumulate(experience, targets, constraint, minibatch, lengths))
                    if not math.isfinite(metrics["loss"]):
                        raise NotFinite(f"the loss is not finite: {CAUSES}")
                    history.append(metrics | self.descend())
            self.check_weights()
            learning_rate = float(self.scheduler.get_last_lr()[0])
            self.scheduler.step()
        means = {name: sum(each[name] for each in history) / len(history) for name in history[0]}
        return means | self.method.explained(experience, targets) | {"learning_rate": learning_rate}

    def _accumulate(
        self, experience: Experience, targets: Targets, constraint: Constraint, minibatch: Tensor, lengths: Lengths
    ) -> dict[str, Tensor]:
        """The gradient of a minibatch, one part after another; returns this process's metrics of it."""
        tokens = self._mean({"tokens": experience.rollout.mask[minibatch].sum()})["tokens"]
        tokens = tokens or 1.0  # where all are masked there is nothing to divide
        over = len(minibatch) if self.method.mean_over == "completions" else tokens
        metrics: dict[str, Tensor] = {}
        parts = self.collector.splitter(minibatch.tolist(), lengths, experience.rollout.teacher_index)
        for some in parts:
            with self._gradients_stay_here(some is not parts[-1]):
                part, target = experience.rows(some), {name: some.of(tensor) for name, tensor in targets.items()}
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
        """The optimizer's step, with the gradients of student and value head each cut to the largest norm. Raises
        NotFinite, and takes none, if one of them is not finite."""
        norms = {"grad_norm": self._clipped(self.student)}
        if self.method.value_head is not None:
            norms["value/grad_norm"] = self._clipped(self.method.value_head)
        if not all(map(math.isfinite, norms.values())):
            raise NotFinite(f"the gradient is not finite: {CAUSES}")
        self.between = True
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norms

    def check_weights(self) -> None:
        """Raises NotFinite, in every process, if one of the weights that are trained is not finite."""
        modules = (self.student, self.method.value_head or nn.Module())
        trained = [p.detach() for module in modules for p in module.parameters() if p.requires_grad]
        here = (p.to_local() if hasattr(p, "to_local") else p for p in trained)  # of a DTensor, where FSDP2 shards
        # Smallest and largest tell it of all, in one reading and without copies of a parameter's size: `isfinite` makes
        # three. A shard may be empty.
        fine = [torch.stack(p.aminmax()).isfinite().all() for p in here if p.numel()]
        if any_process(bool(fine) and not bool(torch.stack(fine).all()), self.accelerator):
            raise NotFinite(f"a weight of the student is not finite: {CAUSES}")

    def _clipped(self, model: nn.Module) -> float:
        """The norm of a model's gradient before it is cut to the largest."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # a DTensor, where FSDP2 shards

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

    @property
    def trained(self) -> Trained:
        """The models that are trained, and their optimizer."""
        return Trained(self.student, self.method.value_head, self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The state beside that of the models, the optimizer and the schedule; plain numbers."""
        return {
            "steps_done": self.steps_done,
            "tokens_seen": self.tokens_seen,
            "pid": self.pid.state_dict(),
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        if "method" not in state:
            raise ValueError("an earlier version of cmdp_fast wrote it, with which its run can be ended")
        self.collector.steps_done, self.tokens_seen = state["steps_done"], state["tokens_seen"]
        self.pid.load_state_dict(state["pid"])
        self.method.load_state_dict(state["method"])
        self.offload.rest()  # a checkpoint's optimizer is read to where the parameters are


def minibatches(count: int, size: int) -> tuple[Tensor, ...]:
    """The indices of ``count`` completions in random order, in as few parts of at most ``size`` as they fit into.

    Each is an optimizer step of its own, so they are as equal as can be: a remainder of two completions would move the
    student as far as all others together, with a gradient that is mostly noise.
    """
    return torch.randperm(count).tensor_split(math.ceil(count / size))


def _with_logged(metrics: Metrics, logged: Metrics) -> Metrics:
    """The metrics of a step with those that reward functions have logged. Raises InputError for a name of ours."""
    if taken := sorted(logged.keys() & {"step", *metrics}):
        raise InputError(f"log_metric({taken[0]!r}, ...): a step has a metric of that name; expected another name")
    return metrics | logged

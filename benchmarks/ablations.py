"""Ablations of the method that are no settings of the trainer: parts of the gradient left out, stale rollouts.

    python benchmarks/ablations.py [--seeds 0 1 2 3 4] [--out comparisons/study-ablations-of-the-gradient]

The situations, the task and the seeds are those of the study `ablations` (recipes/studies/ablations.toml). Each variant
is the method `PPO` with one thing changed, trained in a process of its own, and gives the lines of a study, so that its
page serves. What has a line is not run again; a variant whose class has changed needs another folder, since its lines
go by its name.

    no direct term          the divergence in the reward alone: what is differentiated is the score. It takes both the
                            direct term of the price and that of the excess
    no future cost          the score is the return of the task's reward alone, which still stops at the crossing; costs
                            and penalty of later tokens are left out, and the direct term is as it is
    no gate, with penalty   hinge that pays the penalty at the crossing: the task's reward goes on beyond it
    penalty at every token  in violation, not at the crossing alone
    log excess              what is charged is log(1 + excess): a completion far over budget counts for little more than
                            one just over it, and its gradient is no longer many times that of the task's reward
    N steps old             completions of the student of N steps ago, with its log-probabilities: not corrected, by
                            token, or by completion

The one before the last is for a reason why cmdp may be behind methods that charge every nat: that the charges of rare
violations drown the task's reward. The other, that within the budget nothing draws the student to its teacher, is what
the setting `budget_price` is for.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmdp_fast import objective
from cmdp_fast.constraint import Constraint
from cmdp_fast.credit import of_last_token
from cmdp_fast.info import machine
from cmdp_fast.trainer.comparison.launching import remove
from cmdp_fast.trainer.comparison.study.lines import FILE, append_lines, read_lines
from cmdp_fast.trainer.comparison.study.page import write_page
from cmdp_fast.trainer.comparison.study.plan import AFTER, Study, StudyMethod, Training, head, plan, read_study
from cmdp_fast.trainer.comparison.study.run import lines_of
from cmdp_fast.trainer.experience import Completions, Experience
from cmdp_fast.trainer.methods import ppo
from cmdp_fast.trainer.methods.method import Targets
from cmdp_fast.trainer.methods.ppo import PPO
from cmdp_fast.trainer.records.lock import alone_in
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.run import train
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks.data import Problem

NAME = "ablations-of-the-gradient"


# ------------------------------------------------------------------------------------- parts of the gradient


class NoDirectTerm(PPO):
    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        targets = super().targets(experience, constraint)
        return targets | {"direct": torch.zeros_like(targets["direct"])}


class NoFutureCost(PPO):
    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        task = objective.task_part(experience.last_reward, experience.trace, constraint)
        return super().targets(replace(experience, reward=task), constraint)


class PenaltyWithoutGate(PPO):
    """For the kind `hinge`, which has no gate."""

    def collect(self, problems: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        experience = super().collect(problems, prompts, constraint)
        violated = experience.trace.violated
        crossing = violated & (violated.long().cumsum(1) == 1)
        return replace(experience, reward=experience.reward - self.config.penalty * crossing)


class PenaltyAtEveryToken(PPO):
    def collect(self, problems: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        return super().collect(problems, prompts, replace(constraint, penalty_at="every"))


class LogExcess(PPO):
    def collect(self, problems: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        experience = super().collect(problems, prompts, constraint)
        over = (-experience.trace.remaining).clamp(min=0.0)
        less = constraint.discrepancy_weight * (over - over.log1p())
        less = less.diff(dim=1, prepend=torch.zeros_like(less[:, :1]))
        return replace(experience, reward=torch.where(experience.rollout.mask, experience.reward + less, 0.0))

    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        targets = super().targets(experience, constraint)
        mask = experience.rollout.mask
        over = of_last_token(-experience.trace.remaining, mask).clamp(min=0.0)[:, None]
        charged = objective.direct_coefficient(experience.trace, replace(constraint, coefficient=None), mask=mask)
        return targets | {"direct": targets["direct"] - charged + charged / (1.0 + over)}


# ------------------------------------------------------------------------------------- stale rollouts


class Stale(PPO):
    """Learns from completions of the student of ``age`` steps ago, as an asynchronous sampler would send them: with the
    log-probabilities that they were drawn with. In the first steps of the student before the training."""

    age = 0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.past = deque[Mapping[str, Tensor]](maxlen=self.age + 1)

    def collect(self, problems: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        self.past.append({name: value.clone() for name, value in self.student.state_dict().items()})
        with weights(self.student, self.past[0]):
            drawn = super().collect(problems, prompts, constraint)
        completions = Completions(**{f.name: getattr(drawn, f.name) for f in fields(Completions)})
        completions.rollout = replace(drawn.rollout, sampler_logprob=drawn.stats.logprob)
        with self.clock.phase("scoring"):
            scored = self.collector.score(completions, self.student, constraint, self.clock, keep_outputs=True)
        return self.in_unit(scored, constraint)


@contextlib.contextmanager
def weights(model: nn.Module, of_then: Mapping[str, Tensor]) -> Iterator[None]:
    """The model has these weights in the body."""
    now = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(of_then)
    try:
        yield
    finally:
        model.load_state_dict(now)


def stale(steps: int) -> type[Stale]:
    return type(f"Stale{steps}", (Stale,), {"age": steps})


# ------------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Variant:
    """A class in place of `PPO`, for a candidate as a study has them, with settings that it would not read itself."""

    name: str
    candidate: str
    method: type[PPO]
    settings: dict[str, Any] = field(default_factory=dict)


CORRECTIONS = {"off": "not corrected", "token": "corrected by token", "sequence": "corrected by completion"}

VARIANTS = (
    Variant("cmdp", "cmdp", PPO),
    Variant("cmdp, no direct term", "cmdp", NoDirectTerm),
    Variant("cmdp, no future cost", "cmdp", NoFutureCost),
    Variant("cmdp, penalty at every token", "cmdp", PenaltyAtEveryToken),
    Variant("cmdp, no gate, with penalty", "hinge", PenaltyWithoutGate),
    Variant("cmdp, log excess", "cmdp", LogExcess),
    Variant("hinge", "hinge", PPO),
    Variant("hinge, no direct term", "hinge", NoDirectTerm),
    Variant("hinge, no future cost", "hinge", NoFutureCost),
    *(
        Variant(f"cmdp, {steps} steps old, {said}", "cmdp", stale(steps), {"sampler_correction": correction})
        for steps in (1, 2, 4, 8)
        for correction, said in CORRECTIONS.items()
    ),
)


def plan_of(study: Study, variants: Sequence[Variant], runs: Path) -> list[tuple[Variant, Training]]:
    """The trainings of the variants, those of a seed before the next; each is named after its settings and its variant,
    of which the settings alone do not tell."""
    planned = []
    for seed in study.seeds:
        for variant in variants:
            alone = replace(study, seeds=(seed,), methods=(StudyMethod(variant.name, (variant.candidate,)),))
            for training in plan(alone, runs):
                name = hashlib.sha256(f"{training.config.name} {variant.name}".encode()).hexdigest()[:12]
                looks = (seed, variant) == (study.seeds[0], variants[0])  # at teacher and student before, once
                kept = [w for w in training.wanted if looks or w.who == AFTER]
                wanted = tuple(w._replace(line=replace(w.line, training=name)) for w in kept)
                config = replace(training.config, name=name, eval_before=looks, **variant.settings)
                planned.append((variant, Training(config, wanted)))
    return planned


def run(variant: Variant, config: TrainConfig, log: Path) -> str:
    """Trains in a process of its own; why it failed, or nothing."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(variant, config, log))
    process.start()
    process.join()
    if not process.exitcode:
        return ""
    lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
    return f"exit code {process.exitcode}: {lines[-1].strip() if lines else 'no output'}"


def _train(variant: Variant, config: TrainConfig, log: Path) -> None:
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115  # until the process ends
    ppo.PPO = variant.method  # type: ignore[misc]  # where the table of methods finds it
    train(config)


def study_of(study: Study, variants: Sequence[Variant], name: str) -> Study:
    """The study with the variants as its methods, and with what they are at its head."""
    assert __doc__ is not None
    comment = "".join(f"# {line}".rstrip() + "\n" for line in __doc__.strip().splitlines())
    methods = tuple(StudyMethod(variant.name, (variant.candidate,)) for variant in variants)
    return replace(study, name=name, methods=methods, text=f"{comment}#\n{study.text}")


def run_all(study: Study, variants: Sequence[Variant], folder: Path, command: list[str]) -> bool:
    """Runs what has no line yet and writes the page; returns whether every training succeeded."""
    report = Report()
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, report.say):
        done = {line.key for line in read_lines(folder / FILE, report.say) if not line.failure}
        planned = plan_of(study, variants, folder / "runs")
        todo = [(v, t) for v, t in planned if any(wanted.line.key not in done for wanted in t.wanted)]
        report.say(f"{folder}: {len(planned)} trainings, {len(planned) - len(todo)} of them finished already")
        for variant, training in report.track(todo, f"running {len(todo)}") if todo else ():
            place, log = folder / "runs" / training.config.name, folder / f"{training.config.name}.log"
            remove(place, report)
            failure = run(variant, training.config, log)
            append_lines(folder / FILE, lines_of(training, study, failure), head(study, machine()))
            if not failure:
                remove(place, report)
                log.unlink()
        of_study = {wanted.line.key for _, training in planned for wanted in training.wanted}
        lines = [line for line in read_lines(folder / FILE, report.say) if line.key in of_study]
        write_page(folder, study, lines, command)
    for line in lines:
        if line.failure:
            report.say(f"FAILED {line.method} in {line.situation}, seed {line.seed}: {line.failure}")
    return not any(line.failure for line in lines)


def main(args: argparse.Namespace) -> bool:
    torch.set_num_threads(1)
    study = study_of(read_study("ablations"), VARIANTS, NAME)
    study = replace(study, seeds=tuple(args.seeds or study.seeds))
    return run_all(study, VARIANTS, args.out, ["python", "benchmarks/ablations.py", *sys.argv[1:]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="those of the study")
    parser.add_argument("--out", type=Path, default=Path("comparisons") / f"study-{NAME}")
    raise SystemExit(not main(parser.parse_args()))

"""One setting of each method for all situations, on problems whose optimum is known.

    python benchmarks/known_transfer.py [--out benchmarks/results/study/known]

The situations are the tree of tests/vectors and what is made of it: another scale of the reward, another temperature of
student and teacher, two and four trees in a row (4 and 8 tokens, budgets 0.6 and 1.2), and its bandit. The scale is
that of the reward a training sees; all figures have the reward as it was. A policy is a table of logits, trained by
sampling (tests/support/sampled.py); where a training ends is evaluated over all paths. No figure is an estimate but
for the seeds.

A setting is chosen on the first situation and stays. What a policy is worth is its reward on paths within the budget:
a path over it pays 0. Regret is what the optimum under the budget of every path is worth more, in percent of it.

Written before the runs:
- 200 steps of 256 completions; Adam at 0.05, falling to 0 in a straight line; each from the teacher, five seeds.
- A path is within budget up to 5% above it: an optimum lies on the budget, and training ends on either side of it. The
  optimum is that of the budget itself, so a regret may be slightly below 0.
- A setting is feasible where 95% of the completions are within budget, on average over the seeds. Of the feasible ones
  the best is chosen, or of all where none is.
- Each method has the candidates below, and more where its number is the one to tune: lambda from 0.001 to 100 by
  factors of about 3, so that every scale of the reward has its own within reach, and 0.5 and 0.55, about the smallest
  that keep every path of the first situation within its budget. pid has gains (kp, ki) and a lambda to start from.
- `k1_reward` is PPO with a KL penalty in the reward, as verl has it; `k3_loss` GRPO with k3 in the loss, as
  DeepSeekMath and verl have it (TRL multiplies it by the ratio), with advantages divided by their deviation. All others
  have the baseline of their position.

What was looked at before: some trainings on the first situation with one seed, by which the number of steps and the
gains of pid were set so that most of them come to rest, and exact ascents for the 0.5 and 0.55. No setting has changed
since. The page's table of the dearest paths and its line on the library's defaults came after a look at first results.
`trainer` came when the trainer's defaults had changed: its cmdp, with n and beta of 1, counts the reward in units of
its range, here that of all paths, and has a price of every nat, half of that range for the whole budget; and the same
without the price. Last came "lagrangian, in units", to see what the units are worth without a budget:
lambdas that are what the whole budget costs, in units of that range. 0.5 is the trainer's price and nothing else.

Every setting in a situation is a line of runs.jsonl. A study that was stopped goes on with those that have none.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

import exact  # noqa: E402
import known_page  # noqa: E402
import sampled  # noqa: E402
from exact import Problem, Setting  # noqa: E402
from optimum import best_value  # noqa: E402

from cmdp_fast.errors import InputError  # noqa: E402
from cmdp_fast.files import as_json, write_text  # noqa: E402
from cmdp_fast.info import machine  # noqa: E402
from cmdp_fast.trainer.records.report import Report  # noqa: E402

SCHEDULE = sampled.Schedule(steps=200, completions=256, rate=0.05)
SLACK = 0.05
FEASIBLE = 0.95
IN_UNITS = ("trainer", "trainer, no price", "lagrangian, in units")  # of the reward's range
PRICES = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 0.5, 0.55, 1.0, 3.0, 10.0, 30.0, 100.0)
SCALES = (1.0, 0.01, 0.1, 10.0, 100.0)


@dataclass(frozen=True)
class Situation:
    """A problem with its budget in nats, and what a training sees of it."""

    name: str
    problem: Problem
    budget: float
    optimum: float
    scale: float = 1.0  # of the reward
    temperature: float = 1.0  # of student and teacher; the problem's teacher is at it

    @property
    def seen(self) -> Problem:
        return replace(self.problem, reward=self.scale * self.problem.reward)

    @property
    def in_range(self) -> Problem:
        """What is seen of it by a training that counts the reward from the worst path (0) to the best (1)."""
        seen = self.seen
        low, high = seen.reward.sum(1).min(), seen.reward.sum(1).max()
        reward = seen.reward.clone()
        reward[:, -1] -= low
        return replace(seen, reward=reward / (high - low))


def situations() -> list[Situation]:
    """All of them; settings are chosen on the first."""
    out = []
    for name in ("tree", "bandit"):
        problem, budget = getattr(exact, name)(), {"tree": 0.3, "bandit": 0.1}[name]
        best = best_value(problem, budget)
        out += [Situation(f"{name}, reward x {scale:g}", problem, budget, best, scale=scale) for scale in SCALES]
        if name == "tree":
            for temperature in (0.5, 2.0):
                other = exact.tempered(problem, temperature)
                value = best_value(other, budget)
                out.append(
                    Situation(f"tree, temperature {temperature:g}", other, budget, value, temperature=temperature)
                )
            for times in (2, 4):
                longer = exact.repeated(problem, times)
                out.append(Situation(f"tree, {2 * times} tokens", longer, times * budget, best))
    return out


def candidates(budget: float) -> dict[str, dict[str, sampled.Method]]:
    """The settings of each method that are tried, by what they are called."""

    def kinds(kind: str, *settings: dict[str, float], **options: Any) -> dict[str, sampled.Method]:
        return {
            " ".join(f"{name}={value:g}" for name, value in each.items()): sampled.Method(
                Setting(kind, budget, **each, **options)  # type: ignore[arg-type]
            )
            for each in settings
        }

    prices = [{"coefficient": price} for price in PRICES]
    no_budget = Setting("lagrangian", budget, coefficient=0.0)
    return {
        "cmdp": kinds("cmdp", *({"penalty": n, "weight": beta} for n in (0.5, 1.0) for beta in (1.0, 3.0, 10.0))),
        "hinge": kinds("hinge", *({"weight": beta} for beta in (1.0, 3.0, 10.0))),
        "barrier": kinds("barrier", *({"coefficient": kappa} for kappa in (1e-3, 5e-3, 0.02))),
        "pid": {
            f"kp={kp:g} ki={ki:g} coefficient={first:g}": sampled.Method(
                Setting("pid", budget, coefficient=first), pid_gains=(kp, ki, 0.0)
            )
            for kp, ki in ((0.3, 0.03), (1.0, 0.1), (3.0, 0.1))
            for first in (0.0, 0.3)
        },
        "lagrangian": kinds("lagrangian", *prices),
        "k1_reward": kinds("lagrangian", *prices, cost="k1"),
        "k3_loss": {f"k3={price:g}": sampled.Method(no_budget, "grpo", k3=price) for price in PRICES},
        "grpo": {"": sampled.Method(no_budget, "grpo")},
        "trainer": {"price=0.5": sampled.Method(Setting("cmdp", budget, coefficient=0.5 / budget))},
        "trainer, no price": {"": sampled.Method(Setting("cmdp", budget))},
        "lagrangian, in units": {
            f"price={price:g}": sampled.Method(Setting("lagrangian", budget, coefficient=price / budget))
            for price in (*PRICES, 0.15, 0.165)  # what 0.5 and 0.55 a nat are on the first situation
        },
    }


def figures(situation: Situation, logits: torch.Tensor) -> dict[str, float]:
    """What a policy is worth, over all paths: the reward as it was, and the exact reverse KL of each path."""
    problem, budget = situation.problem, situation.budget
    rollout = exact.roll_out(problem, logits, Setting("hinge", budget))
    within = (rollout.totals <= budget * (1.0 + SLACK)).double()
    reward = problem.reward.sum(1)
    numbers = {
        "score": rollout.expect(within * reward),
        "reward": rollout.expect(reward),
        "within": rollout.expect(within),
        "mean_kl": rollout.expect(rollout.totals),
        "largest_kl": rollout.totals.max(),
    }
    return {name: float(f"{float(number):.5g}") for name, number in numbers.items()}


@dataclass(frozen=True)
class Training:
    """A setting of a method in a situation."""

    NAMES: ClassVar[tuple[str, ...]] = ("situation", "method", "candidate")

    situation: Situation
    method: str
    candidate: str
    trained: sampled.Method

    @property
    def names(self) -> dict[str, str]:
        return dict(zip(self.NAMES, (self.situation.name, self.method, self.candidate), strict=True))

    def line(self, schedule: sampled.Schedule, seeds: list[int]) -> dict[str, Any]:
        """Trains with these seeds: a line of runs.jsonl, whose figures are lists in the order of the seeds."""
        situation = self.situation
        seen = situation.in_range if self.method in IN_UNITS else situation.seen
        policies = sampled.train(seen, self.trained, schedule, seeds, temperature=situation.temperature)
        each = [figures(situation, logits) for logits in policies]
        return self.names | {"seeds": seeds} | {name: [one[name] for one in each] for name in each[0]}


def trainings(of: list[Situation]) -> list[Training]:
    return [
        Training(situation, method, candidate, trained)
        for situation in of
        for method, settings in candidates(situation.budget).items()
        for candidate, trained in settings.items()
    ]


def head(schedule: sampled.Schedule) -> dict[str, Any]:
    """The first line of runs.jsonl: what all runs share."""
    return {"schedule": asdict(schedule), "slack": SLACK, "feasible": FEASIBLE}


def read(path: Path, schedule: sampled.Schedule) -> list[dict[str, Any]]:
    """The runs that are done; a half last line is dropped. Raises InputError for runs of another schedule."""
    whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    if not whole:
        write_text(path, as_json(head(schedule)) + "\n")
        return []
    try:
        first, *lines = map(json.loads, whole)
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if first != head(schedule):
        raise InputError(f"{path} has runs of {first}, not of {head(schedule)}: give another --out")
    write_text(path, "".join(line + "\n" for line in whole))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "known_transfer")
    args = parser.parse_args()
    torch.set_num_threads(1)  # nothing here is large enough for two
    args.out.mkdir(parents=True, exist_ok=True)
    schedule, report, of = replace(SCHEDULE, steps=args.steps), Report(), situations()
    path = args.out / "runs.jsonl"
    lines = read(path, schedule)
    done = {(*(line[name] for name in Training.NAMES), seed) for line in lines for seed in line["seeds"]}
    missing = [
        (training, seeds)
        for training in trainings(of)
        if (seeds := [seed for seed in range(args.seeds) if (*training.names.values(), seed) not in done])
    ]
    with path.open("a", encoding="utf-8") as file:
        for training, seeds in report.track(missing, "training") if missing else ():
            lines.append(training.line(schedule, seeds))
            file.write(as_json(lines[-1]) + "\n")
            file.flush()
            report.status(f"{training.method} on {training.situation.name}")
    optima = {situation.name: situation.optimum for situation in of}
    teachers = {situation.name: figures(situation, situation.problem.teacher.log())["score"] for situation in of}
    budgets = {situation.name: situation.budget for situation in of}
    study = known_page.Study(lines, optima, teachers, budgets, FEASIBLE)
    known_page.write(args.out, study, machine(), schedule)
    known_page.show(study)
    report.say(str(args.out))


if __name__ == "__main__":
    main()

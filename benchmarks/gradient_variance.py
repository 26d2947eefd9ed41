"""What each estimator of the gradient is worth at equal samples, where the gradient is known.

    python benchmarks/gradient_variance.py [--out benchmarks/results/study/gradient]

The problems are the tree of tests/vectors and four of it in a row (8 tokens, four times the budget), whose gradient is
a sum over all paths. An estimate is one of 64 completions; there are 2,000 of each. The policies are the teacher, a
random one, some of whose paths are over budget, and one that is over budget at its first token.

All estimates for cmdp are compared with the gradient of its objective under the exact reverse KL, and so are those that
keep the account by k1 or k3; those for a fixed weight with the gradient of E[sum r - lambda KL]. k1 and k3 in the
reward, and what leaves a term out, are named so. `grpo` divides by a deviation: it is rescaled to the length of the
gradient along the gradient.

The second part trains with and without the part of the score in which an action answers for later costs (the
long-term part, or future KL), on 2, 4 and 8 tokens, as `known_transfer.py` does, with the settings of the tree in
tests/support/tabular.py, from the teacher and from over budget.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

import exact  # noqa: E402
import gradient_page  # noqa: E402
import sampled  # noqa: E402
import tabular  # noqa: E402
from exact import Problem, Rollout, Setting  # noqa: E402
from known_transfer import SCHEDULE, Situation, figures  # noqa: E402
from sampled import Method  # noqa: E402

from cmdp_fast import objective  # noqa: E402
from cmdp_fast.info import machine  # noqa: E402
from cmdp_fast.objective import GroupAdvantage  # noqa: E402
from cmdp_fast.trainer.records.report import Report  # noqa: E402

COMPLETIONS = 64
AT_ONCE = 250  # estimates
HORIZONS = {2: 1, 4: 2, 8: 4}  # tokens: trees in a row

Credit = Callable[[Problem, Rollout, Tensor], GroupAdvantage | None]


@dataclass(frozen=True)
class Estimator:
    """A name, what is made of a batch, and advantages other than those of the method's baseline."""

    name: str
    method: Method
    credit: Credit = lambda batch, rollout, value: None
    rescaled: bool = False


def undivided(advantage: Tensor) -> GroupAdvantage:
    return GroupAdvantage(advantage, torch.ones_like(advantage[:, :1]))


def estimators(budget: float, price: float) -> dict[str, list[Estimator]]:
    """By objective, the complete one under the exact KL with the baseline of its position first."""
    cmdp = Method(Setting("cmdp", budget, penalty=0.5, weight=3.0))
    soft = Method(Setting("lagrangian", budget, coefficient=price))

    def by_cost(method: Method, cost: str) -> Method:
        return replace(method, setting=replace(method.setting, cost=cost))

    def whole(batch: Problem, rollout: Rollout, value: Tensor) -> GroupAdvantage:
        return undivided(rollout.reward.sum(1, keepdim=True).expand_as(rollout.reward))

    def onward(batch: Problem, rollout: Rollout, value: Tensor) -> GroupAdvantage:
        return undivided(sampled.worth(batch, rollout, cmdp))

    def rloo(batch: Problem, rollout: Rollout, value: Tensor) -> GroupAdvantage:
        return undivided(objective.rloo(rollout.reward.sum(1), COMPLETIONS)[:, None].expand_as(rollout.reward))

    def gae(lam: float) -> Credit:
        return lambda batch, rollout, value: undivided(objective.gae(rollout.reward, value, lam=lam)[0])

    return {
        "cmdp": [
            Estimator("position_rloo", cmdp),
            Estimator("rloo", cmdp, rloo),
            Estimator("grpo, rescaled", replace(cmdp, baseline="grpo"), rescaled=True),
            Estimator("no baseline, whole return", cmdp, whole),
            Estimator("no baseline, return to go", cmdp, onward),
            Estimator("gae, exact values, lambda 1", cmdp, gae(1.0)),
            Estimator("gae, exact values, lambda 0.95", cmdp, gae(0.95)),
            Estimator("without the direct term", replace(cmdp, direct=False)),
            Estimator("without the long-term part", replace(cmdp, long_term=False)),
            Estimator("account by k1", by_cost(cmdp, "k1")),
            Estimator("account by k3", by_cost(cmdp, "k3")),
        ],
        "lagrangian": [
            Estimator("position_rloo", soft),
            Estimator("without the direct term", replace(soft, direct=False)),
            Estimator("without the long-term part", replace(soft, long_term=False)),
            Estimator("k1 in the reward", by_cost(soft, "k1")),
            Estimator("k3 in the reward", by_cost(soft, "k3")),
            Estimator("k3 in the loss", Method(replace(soft.setting, coefficient=0.0), k3=price)),
        ],
    }


def policies(problem: Problem) -> dict[str, Tensor]:
    """Logits [S, V] by name."""
    teacher = problem.teacher.log()
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(7)).double()
    return {"teacher": teacher, "random": teacher + 0.8 * noise, "over budget": tabular.collapsed(problem)}


def exact_gradient(problem: Problem, logits: Tensor, setting: Setting) -> Tensor:
    """Of minus the objective, [S, V]."""
    theta = logits.clone().requires_grad_()
    exact.exact_loss(problem, exact.roll_out(problem, theta, setting), setting).backward()
    assert theta.grad is not None
    return theta.grad


def exact_values(problem: Problem, logits: Tensor, setting: Setting) -> Tensor:
    """The expected return of the modified reward before each token of each path, [P, T], given the tokens so far."""
    rollout = exact.roll_out(problem, logits, setting)
    returns = objective.returns_to_go(rollout.reward)
    values = []
    for t in range(returns.shape[1]):
        _, prefix = problem.tokens[:, :t].unique(dim=0, return_inverse=True) if t else (None, problem.tokens[:, 0] * 0)
        total, share = (
            torch.zeros(int(prefix.max()) + 1).double().index_add(0, prefix, weight)
            for weight in (rollout.probability * returns[:, t], rollout.probability)
        )
        values.append((total / share)[prefix])
    return torch.stack(values, 1)


def estimates(problem: Problem, logits: Tensor, estimator: Estimator, count: int, seed: int = 0) -> Tensor:
    """So many independent estimates of the gradient of minus the objective, [count, S V]."""
    random = torch.Generator().manual_seed(seed)
    share = sampled.path_probability(problem, logits)
    value = exact_values(problem, logits, estimator.method.setting)
    out = []
    for first in range(0, count, AT_ONCE):
        copies = min(AT_ONCE, count - first)
        paths = torch.multinomial(share, copies * COMPLETIONS, True, generator=random).view(copies, COMPLETIONS)
        batch = sampled.side_by_side(problem, paths)
        theta = logits.repeat(copies, 1, 1).requires_grad_()
        rollout = exact.roll_out(batch, theta.flatten(0, 1), estimator.method.setting)
        credit = estimator.credit(batch, rollout, value[paths.flatten()])
        sampled.loss_of(batch, rollout, estimator.method, COMPLETIONS, credit).backward()
        assert theta.grad is not None
        out.append(theta.grad.flatten(1))
    return torch.cat(out)


def measured(found: Tensor, truth: Tensor, *, rescaled: bool) -> dict[str, float]:
    """Of estimates [R, D] of a gradient [D], in units of its squared length: ``variance``, the trace of the
    covariance; ``bias2``, the squared bias, less what chance makes of it; ``beyond``, the squared bias with it, in
    units of what chance alone would make on average (about 1 without a bias); and cosines to the gradient."""
    if rescaled:
        mean = found.mean(0)
        found = found * (truth.dot(truth) / mean.dot(truth))
    mean, size = found.mean(0), truth.dot(truth)
    variance = found.var(0).sum()
    off, chance = (mean - truth).square().sum(), variance / len(found)
    numbers = {
        "variance": variance / size,
        "bias2": (off - chance) / size,
        "beyond": off / chance,
        "cosine": torch.cosine_similarity(found, truth[None], dim=1).mean(),
        "cosine of the mean": torch.cosine_similarity(mean, truth, dim=0),
    }
    return {name: float(f"{float(number):.4g}") for name, number in numbers.items()}


def variance_rows(repetitions: int, report: Report) -> list[dict[str, Any]]:
    """A row per problem, policy, objective and estimator."""
    tree, budget = exact.tree(), exact.vectors("tree")["budget"]
    price = exact.vectors("tree")["expected_budget"]["lambda"]
    cases = [
        (tokens, problem, policy, logits, kind, own)
        for tokens, times in HORIZONS.items()
        if tokens != 4
        for problem in [exact.repeated(tree, times)]
        for policy, logits in policies(problem).items()
        for kind, own in estimators(times * budget, price / times).items()
    ]
    rows = []
    for tokens, problem, policy, logits, kind, own in report.track(cases, "estimates of the gradient"):
        truth = exact_gradient(problem, logits, own[0].method.setting).flatten()
        for estimator in own:
            found = estimates(problem, logits, estimator, repetitions)
            names = {"tokens": tokens, "policy": policy, "objective": kind, "estimator": estimator.name}
            rows.append(names | measured(found, truth, rescaled=estimator.rescaled))
        report.status(f"{kind} at {policy}, {tokens} tokens")
    return rows


def ends(seeds: list[int], report: Report) -> list[dict[str, Any]]:
    """Where training ends with all of the gradient and with a part left out: a row per problem, start and method."""
    base = tabular.methods("tree")
    best = exact.vectors("tree")["per_trajectory_budget"]["value"]
    cases = [
        (tokens, times, kind, start)
        for tokens, times in HORIZONS.items()
        for kind in ("cmdp", "hinge", "lagrangian")
        for start in ("teacher", "over budget")
    ]
    rows = []
    for tokens, times, kind, start in report.track(cases, "training with parts of the gradient"):
        problem, setting = exact.repeated(exact.tree(), times), replace(base[kind], budget=times * base[kind].budget)
        if kind == "lagrangian":
            setting = replace(setting, coefficient=(setting.coefficient or 0.0) / times)
        situation = Situation(f"{tokens} tokens", problem, setting.budget, best)
        for left_out, trained in (
            ("nothing", Method(setting)),
            ("long-term part", Method(setting, long_term=False)),
            ("direct term", Method(setting, direct=False)),
        ):
            first = tabular.collapsed(problem) if start == "over budget" else None
            policies = sampled.train(problem, trained, SCHEDULE, seeds, start=first)
            each = [
                figures(situation, logits) | {"objective": own_objective(problem, logits, setting)}
                for logits in policies
            ]
            row = {"tokens": tokens, "start": start, "method": kind, "left out": left_out}
            rows.append(row | {name: [one[name] for one in each] for name in each[0]})
        report.status(f"{kind}, {tokens} tokens")
    return rows


def own_objective(problem: Problem, logits: Tensor, setting: Setting) -> float:
    """What the method maximises: the expected sum of its modified reward."""
    rollout = exact.roll_out(problem, logits, setting)
    return float(f"{float(rollout.expect(rollout.reward.sum(1))):.5g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gradient_variance")
    args = parser.parse_args()
    torch.set_num_threads(1)  # nothing here is large enough for two
    report = Report()
    found = {
        "machine": machine(),
        "settings": {
            "completions": COMPLETIONS,
            "repetitions": args.repetitions,
            "seeds": args.seeds,
            "schedule": asdict(SCHEDULE),
        },
        "estimators": variance_rows(args.repetitions, report),
        "ends": ends(list(range(args.seeds)), report),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    gradient_page.write(args.out, found)
    report.say((args.out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

"""Evaluation on held-out problems: the policy is sampled as in training, and as it would be deployed."""

from __future__ import annotations

from typing import Any

import torch

from .constraint import evaluation_constraint
from .data import Row
from .experience import Collector
from .report import Clock, Report
from .rollout import encode_prompts

EVALUATION_SEED = 20_250_922  # every evaluation draws the same random numbers, whatever the run's seed


def evaluate(
    collector: Collector, policy: Any, rows: list[Row], clock: Clock, report: Report | None = None, who: str = "student"
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(figures, samples) of a policy on some problems, `eval_generations` completions each.

    ``accuracy`` counts completions whose reward is at least `correct_at`; ``constraint_satisfaction`` those whose
    cumulative cost is within the budget; ``mean_cumulative_kl`` is the mean over completions of the exact reverse KL
    summed over the tokens, in nats; ``mean_length`` counts tokens with the end of sequence; ``examples`` is how many
    completions there were. The teacher's divergence from itself is 0, so it satisfies any budget.

    The random state of the training is left as it was. With a `report` there is a progress bar.
    """
    config, constraint = collector.config, evaluation_constraint(collector.config)
    rows = [row for row in rows for _ in range(config.eval_generations)]
    prompts = encode_prompts(rows, collector.tokenizer)
    device = collector.accelerator.device
    parts, samples = [], []
    with clock.phase("evaluation"), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(EVALUATION_SEED)
        starts = range(0, len(rows), config.batch_size)
        for start in report.track(starts, f"evaluating {who}") if report else starts:
            some = slice(start, start + config.batch_size)
            experience = collector.collect(policy, rows[some], prompts[some], constraint, Clock())
            parts.append((len(experience.texts), collector.measure(experience, constraint)))
            last = experience.rollout.mask.sum(1, keepdim=True) - 1
            cumulative = experience.trace.cumulative.gather(1, last)[:, 0].tolist()
            remaining = experience.trace.remaining.gather(1, last)[:, 0].tolist()
            for i, row in enumerate(rows[some]):
                samples.append(
                    {
                        "prompt": row["prompt"],
                        "completion": experience.texts[i],
                        "correct": bool(experience.task_reward[i] >= config.correct_at),
                        "cumulative": cumulative[i],
                        "feasible": remaining[i] >= 0,
                    }
                )
    total = sum(count for count, _ in parts)
    names = {
        "accuracy": "cmdp/accuracy",
        "constraint_satisfaction": "cmdp/constraint_satisfaction",
        "correct_and_feasible": "cmdp/correct_and_feasible",
        "mean_cumulative_kl": "cmdp/cumulative_kl",
        "mean_cumulative": "cmdp/mean_cumulative",
        "mean_excess": "cmdp/mean_excess",
        "mean_length": "completions/mean_length",
    }
    figures = {ours: sum(n * m[theirs] for n, m in parts) / total for ours, theirs in names.items()}
    return figures | {"examples": total}, samples

"""Evaluation on held-out problems: the policy is sampled as in training, and as it would be deployed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from cmdp_fast.constraint import Constraint

from .distributed import share, whole
from .experience import Collector, Completions, Experience, joined
from .records.clock import Clock
from .records.report import Report
from .records.token_texts import cut_texts, token_texts
from .rollout import encode_prompts
from .routing import held_to
from .settings.constraint import evaluation_constraint
from .stored import stored_by
from .tasks.data import Problem

# Problems whose first completion is kept with its tokens and what each has cost, and how many tokens a process keeps at
# most: checkpoints hold them too
DETAILED, TOKENS = 200, 20_000
EVALUATION_SEED = 20_250_922  # every evaluation draws the same random numbers, for any seed of the run

# The figures of an evaluation, from the metrics of all its completions together; those that do not apply are absent.
FIGURES = {
    "accuracy": "cmdp/accuracy",
    "constraint_satisfaction": "cmdp/constraint_satisfaction",
    "certified": "cmdp/certified",
    "never_violated": "cmdp/never_violated",
    "prefix_satisfaction": "cmdp/prefix_satisfaction",
    "correct_and_feasible": "cmdp/correct_and_feasible",
    "reasoning_success": "cmdp/reasoning_success",
    "reasoning_checked": "cmdp/reasoning_checked",
    "unjudged": "cmdp/unjudged",
    "mean_cumulative_kl": "cmdp/cumulative_kl",
    "cvar_cumulative_kl": "cmdp/cumulative_kl_cvar",
    "mean_cumulative": "cmdp/mean_cumulative",
    "cvar_cumulative": "cmdp/cvar",
    "mean_excess": "cmdp/mean_excess",
    "mean_token_cost": "cmdp/mean_token_cost",
    "max_token_cost": "cmdp/max_token_cost",
    "first_violation": "cmdp/first_violation",
    "reward": "reward",
    "teacher_perplexity": "cmdp/teacher_perplexity",
    "distinct_2": "completions/distinct_2",
    "repetition_4": "completions/repetition_4",
    "mean_length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "sampling_logp_difference": "sampling/sampling_logp_difference/mean",
}


def evaluate(
    collector: Collector,
    policy: nn.Module,
    rows: list[Problem],
    clock: Clock,
    report: Report | None = None,
    who: str = "student",
    seed: int = EVALUATION_SEED,
    detailed: bool = False,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(figures, samples) of a policy on some problems, `eval_generations` completions each.

    ``accuracy`` counts those whose `accuracy_reward` is at least `correct_at`; ``constraint_satisfaction`` those whose
    cumulative cost is within the budget at the end, ``never_violated`` those where it was at every token (the same but
    for costs that may be negative), ``prefix_satisfaction`` (with a `prefix_budget`) those whose every prefix is likely
    enough for the teacher, ``certified`` (with a teacher that gives bounds of the cost) those that are proven to be
    within the budget at every token, ``reasoning_success`` (with a `step_verifier`) those whose steps are all right
    among the share ``reasoning_checked`` that has any to check; ``unjudged`` those on which a judge in a process of its
    own gave no verdict (it raised, hung or died), or the `accuracy_reward` none; ``mean_cumulative_kl`` is the mean
    over completions of the exact reverse KL summed over the tokens, in nats, ``cvar_cumulative_kl`` that of the worst
    tenth; ``…_cumulative``, ``mean_excess``, ``…_token_cost`` and ``first_violation`` (a share of the length) are those
    of the cost that the budget is for; ``mean_length`` counts tokens with the end of sequence, ``truncated``
    completions without one; ``examples`` is how many completions there were. ``sampling_logp_difference`` is the mean
    over tokens of how far, in nats, the log-probabilities of a sampler are off, where one reports them: figures are of
    what it drew, and corrected for nothing, since they say what the policy does where it is served. The teacher's
    divergence from itself is 0, so it satisfies any budget. For a collector without a teacher, or with one that answers
    for stored completions alone, all that compares with one is absent.

    ``reward`` is the task's, ``teacher_perplexity`` that of the completions to the teacher at its temperature, to be
    read as how usual they are to it, and ``distinct_2`` and ``repetition_4`` say how varied they are (`diversity.py`).

    A sample is one completion's part of these, with what reward functions log of it as ``extra``. If they are to be
    ``detailed``, the first completions of the first `DETAILED` problems have the text of each token, its cost, and
    where the budget was crossed, up to `TOKENS` tokens in all. Several processes evaluate a share each. ``seed``
    decides what is sampled. The random state of the training is left as it was. With a `report` there is a progress
    bar.
    """
    config, constraint = collector.config, evaluation_constraint(collector.config)
    everything = [row for row in rows for _ in range(config.eval_generations)]
    rows = share(everything, collector.accelerator)
    prompts = encode_prompts(rows, collector.tokenizer)
    device = collector.accelerator.device
    parts: list[Completions] = []
    samples: list[dict[str, Any]] = []
    left = TOKENS
    with clock.phase("evaluation"), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + collector.accelerator.process_index)
        each = config.batch_size
        starts = range(0, len(rows), each)
        for start in report.track(starts, f"evaluating {who}", each=each, total=len(rows)) if report else starts:
            some = slice(start, start + each)
            if collector.teacher is None or stored_by(collector.teacher) is not None:
                parts.append(collector.complete(policy, rows[some], prompts[some], Clock()))
            else:
                parts.append(collector.collect(policy, rows[some], prompts[some], constraint, Clock()))
            samples += _samples(
                parts[-1],
                rows[some],
                collector.judging,
                held_to(config, constraint, parts[-1].rollout.teacher_index),
            )
            first = collector.accelerator.process_index * len(rows) + start
            numbers = range(-first % config.eval_generations, len(rows[some]), config.eval_generations)
            if detailed and isinstance(parts[-1], Experience):
                chosen = [i for i in numbers if first + i < DETAILED * config.eval_generations]
                left -= _add_tokens(samples[start:], parts[-1], chosen, constraint, collector.tokenizer, left)
    metrics = collector.measure(joined(parts), constraint, len(everything))
    figures = {ours: metrics[theirs] for ours, theirs in FIGURES.items() if theirs in metrics}
    return figures | {"examples": len(everything)}, whole(samples, len(everything), collector.accelerator)


def _add_tokens(
    samples: list[dict[str, Any]],
    part: Experience,
    rows: list[int],
    constraint: Constraint,
    tokenizer: Any,
    most: int,
) -> int:
    """Gives these rows' samples ``tokens``, the text of each; ``costs``, what each has cost, in nats for a KL; and
    ``crossing``, the place of the first one beyond the budget, None if there is none. Returns how many tokens these
    are, of completions that all together have no more than ``most``."""
    if not rows:
        return 0
    ids, costs, crossed = part.rollout.completion_ids(), part.cost(constraint).tolist(), part.trace.violated.tolist()
    kept = 0
    for row in rows:
        if kept + len(ids[row]) > most:
            return most  # none of the later ones either
        kept += len(ids[row])
        texts = token_texts(ids[row], tokenizer)
        beyond = crossed[row][: len(texts)]
        samples[row] |= {
            "tokens": cut_texts(texts, len(samples[row]["completion"])),
            "costs": [float(f"{cost:.4g}") for cost in costs[row][: len(texts)]],
            "crossing": beyond.index(True) if any(beyond) else None,
        }
    return kept


def of_several(samples: list[dict[str, Any]], n: int) -> dict[str, float]:
    """mean@n and pass@k from ``n`` completions of each problem, one problem's behind another's.

    mean@n is the share of right ones. pass@k, for n and the powers of two below it, is the chance that of k completions
    one is right: 1 - C(n - c, k)/C(n, k) where c of the n are, the estimator without bias of Chen et al. 2021
    (arXiv 2107.03374, equation 1), as a mean over problems.
    """
    right = [sum(bool(sample["correct"]) for sample in samples[i : i + n]) for i in range(0, len(samples), n)]
    figures = {f"mean@{n}": sum(right) / len(samples)}
    for k in sorted({n, *(2**i for i in range(1, n.bit_length()) if 2**i < n)}):
        missed = (math.comb(n - c, k) / math.comb(n, k) for c in right)
        figures[f"pass@{k}"] = 1.0 - sum(missed) / len(right)
    return figures


def _samples(part: Completions, rows: list[Problem], judging: str, constraint: Constraint) -> list[dict[str, Any]]:
    """A dict per completion; `correct` is None where the reward that says so has no opinion, and `reward`, all rewards
    together, where none has. Of a teacher that gives bounds alone, `cumulative` and `feasible` are by the lower one,
    and `certified` says whether the budget is kept by the upper one too."""
    length, unjudged = part.rollout.mask.sum(1), part.named_rewards[judging].isnan().tolist()
    columns: dict[str, list[Any]] = {
        "prompt": [row["prompt"] for row in rows],
        "completion": part.texts,
        "correct": [None if none else right for right, none in zip(part.correct.tolist(), unjudged, strict=True)],
        "reward": [
            value if scored else None
            for value, scored in zip(part.task_reward.tolist(), part.scored.tolist(), strict=True)
        ],
        "length": length.tolist(),
        "finished": part.rollout.finished.tolist(),
    }
    if part.sound is not None:
        columns["sound"] = [None if math.isnan(value) else bool(value) for value in part.sound.tolist()]
    if isinstance(part, Experience):
        last = length[:, None] - 1
        columns["cumulative"] = part.trace.cumulative.gather(1, last)[:, 0].tolist()
        columns["feasible"] = (part.trace.remaining.gather(1, last)[:, 0] >= 0).tolist()
        columns["cumulative_kl"] = part.stats.reverse_kl.sum(1).tolist()
        if (verdict := part.verdict(constraint)) is not None:
            columns["certified"] = verdict.certified.tolist()
    if part.logged.extra:
        columns["extra"] = part.logged.rows()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

"""The figures of a training in a situation, from the samples of its evaluations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from cmdp_fast.objective import cvar

from .lines import QUANTILES, Parts
from .plan import Kind

Sample = dict[str, Any]

SHORTEST = 4  # tokens: the first part of the lengths


def samples_of(path: Path, who: str) -> list[Sample]:
    """The samples of an evaluation, such as `student_after`, of a run's `samples.jsonl`. Raises ValueError if the KL of
    one is not finite."""
    with open(path, encoding="utf-8") as lines:
        samples = [sample for sample in map(json.loads, lines) if sample["who"] == who]
    if any(sample["cumulative_kl"] is None for sample in samples):
        raise ValueError("the KL of a completion is not finite")
    return samples


def figures_of(samples: Sequence[Sample], budget: float, unit: float = 1.0) -> dict[str, float]:
    """The figures of all completions: see `lines.Line`. A completion that no judge had an opinion of is not right, and
    earns nothing. ``budget`` in nats; ``unit``: what the right answer is worth."""
    kl = torch.tensor([sample["cumulative_kl"] for sample in samples], dtype=torch.float64)
    checked = [sample["sound"] for sample in samples if sample.get("sound") is not None]
    return {
        "accuracy": _accuracy(samples),
        "within": _within(samples, budget),
        "right_and_within": _mean(bool(sample["correct"]) and _holds(sample, budget) for sample in samples),
        "reward_within": _mean((sample["reward"] or 0.0) / unit * _holds(sample, budget) for sample in samples),
        **({"reasoning_success": _mean(checked)} if checked else {}),
        "mean_kl": _mean_kl(samples),
        "cvar_kl": float(cvar(kl)),
        "mean_length": _mean(sample["length"] for sample in samples),
        "examples": len(samples),
    }


def kl_quantiles(samples: Sequence[Sample]) -> tuple[float, ...]:
    """The quantiles 0, 0.05, ..., 1 of the cumulative KL, in nats; a straight line between two completions."""
    kl = torch.tensor([sample["cumulative_kl"] for sample in samples], dtype=torch.float64)
    return tuple(kl.quantile(torch.linspace(0, 1, QUANTILES, dtype=torch.float64)).tolist())


def by_kind(samples: Sequence[Sample], budget: float, kinds: Sequence[Kind]) -> Parts:
    """The figures of each kind of prompt that there is, in the order of the kinds."""
    parts: dict[str, list[Sample]] = {kind.name: [] for kind in kinds}
    for sample in samples:
        prompt = sample["prompt"] if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"]
        kind = next((kind for kind in kinds if re.search(kind.pattern, prompt)), None)
        if kind is not None:
            parts[kind.name].append(sample)
    return {name: _part(part, budget, len(samples)) for name, part in parts.items() if part}


def by_length(samples: Sequence[Sample], budget: float) -> Parts:
    """The figures of completions of 1 to 4 tokens, of 5 to 8, and so on in factors of two."""
    parts: dict[int, list[Sample]] = {}
    for sample in samples:
        longest = max(SHORTEST, 2 ** math.ceil(math.log2(max(1, sample["length"]))))
        parts.setdefault(longest, []).append(sample)
    first = {longest: 1 if longest == SHORTEST else longest // 2 + 1 for longest in parts}
    return {f"{first[n]}-{n}": _part(parts[n], budget, len(samples)) for n in sorted(parts)}


def _part(samples: Sequence[Sample], budget: float, total: int) -> dict[str, float]:
    return {
        "share": len(samples) / total,
        "accuracy": _accuracy(samples),
        "within": _within(samples, budget),
        "mean_kl": _mean_kl(samples),
    }


def _accuracy(samples: Sequence[Sample]) -> float:
    return _mean(bool(sample["correct"]) for sample in samples)


def _within(samples: Sequence[Sample], budget: float) -> float:
    return _mean(_holds(sample, budget) for sample in samples)


def _holds(sample: Sample, budget: float) -> bool:
    return bool(sample["cumulative_kl"] <= budget)


def _mean_kl(samples: Sequence[Sample]) -> float:
    return _mean(sample["cumulative_kl"] for sample in samples)


def _mean(values: Iterable[float]) -> float:
    each = list(values)
    return math.fsum(each) / len(each)

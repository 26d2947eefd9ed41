"""How far apart the bounds of `topk_stats` are, by the number of columns that a teacher sends.

    python benchmarks/topk_bounds.py [SETTINGS of cmdp-fast train]

samples completions of the recipe's held-out problems from its student at the training's temperature, and writes
results/topk/bounds.json and results/topk/plots/bounds.png, for another recipe than quickstart bounds-RECIPE: per
completion the exact divergences, their bounds for each k, and the share of the completions that the bounds certify or
refute under the recipe's budget. The models of quickstart need no download; `--recipe
benchmarks/pruned_smollm2.toml` and `--recipe pair --student FOLDER --teacher FOLDER` take models that are there.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.files import replacing, write_json
from cmdp_fast.reading import completion_logits
from cmdp_fast.trainer import material
from cmdp_fast.trainer.parse import parse
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.rollout import Rollout, encode_prompts, generate, make_sampling

FOLDER = Path(__file__).parent / "results" / "topk"
MOST = 512  # columns
KINDS = ("forward_kl", "reverse_kl")


def compare(student: Tensor, teacher: Tensor, rollout: Rollout, budget: float, temperature: float) -> list[dict]:
    """A row per k and message: means per completion in nats, and shares of the completions."""
    logprob = (teacher.double() / temperature).log_softmax(-1).float()
    least = logprob.amin(-1)
    exact = cf.token_stats(student, teacher, rollout.tokens, mask=rollout.mask, temperature=temperature)
    vocab = student.shape[-1]
    table = []
    for k in [2**i for i in range(10) if 2**i < min(vocab, MOST)] + [min(vocab, MOST)]:
        own = logprob.topk(k, -1).indices
        for message, ids in (("top k", own), ("union", torch.cat([own, student.topk(k, -1).indices], -1))):
            stats = cf.topk_stats(
                student,
                ids,
                logprob.gather(-1, ids),
                rollout.tokens,
                mask=rollout.mask,
                temperature=temperature,
                top_k=k,
                min_logprob=least,
            )
            row: dict[str, Any] = {"k": k, "message": message}
            for kind in KINDS:
                lower, upper = getattr(stats, kind), getattr(stats, f"{kind}_upper")
                verdict = cf.budget_verdict(lower, upper, budget, mask=rollout.mask)
                row[kind] = {
                    "exact": getattr(exact, kind).sum(1).mean().item(),
                    "lower": lower.sum(1).mean().item(),
                    "upper": upper.sum(1).mean().item(),
                    "certified": verdict.certified.double().mean().item(),
                    "refuted": verdict.refuted.double().mean().item(),
                }
            row["teacher outside"] = 1 - (stats.teacher_mass.sum() / rollout.mask.sum()).item()
            table.append(row)
    return table


def draw(path: Path, title: str, table: list[dict], budget: float) -> None:
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    figure.suptitle(title, fontsize=10)
    for (above, below), kind in zip(panels.T, KINDS, strict=True):
        for message, style in (("top k", "-"), ("union", ":")):
            rows = [row for row in table if row["message"] == message]
            k = [row["k"] for row in rows]
            values = {name: [row[kind][name] for row in rows] for name in rows[0][kind]}
            for name, color in (("lower", "C0"), ("upper", "C3")):
                missed = [abs(bound - exact) for bound, exact in zip(values[name], values["exact"], strict=True)]
                above.plot(k, missed, style, color=color, label=f"{name}, {message}")
            for name, color in (("certified", "C2"), ("refuted", "C1")):
                below.plot(k, values[name], style, color=color, label=f"{name}, {message}")
        above.axhline(values["exact"][0], color="black", lw=1, label="the exact value itself")
        above.set(yscale="log", ylabel="nats per completion", title=f"{kind.replace('_kl', ' KL')}: bound beside exact")
        below.set(xlabel="k", ylabel="share of completions", ylim=(-0.02, 1.02))
        below.set_title(f"what the bounds prove of a budget of {budget:g} nats", fontsize=10)
        below.set_xscale("log", base=2)
        below.set_xticks(k, k)
        below.minorticks_off()
        above.legend(fontsize=8)
        below.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    asked = sys.argv[1:]
    config, report = parse(asked, prog="topk_bounds.py"), Report()
    models = material.load(config, report)
    torch.manual_seed(config.seed)
    sampling = make_sampling(config, models.student, models.teacher, models.tokenizer)
    prompts = encode_prompts(models.held_out, models.tokenizer)
    rollout = generate(models.student, prompts, sampling)
    with torch.no_grad():
        student, teacher = (completion_logits(model, rollout).float() for model in (models.student, models.teacher))
    table = compare(student, teacher, rollout, float(config.budget), config.temperature)
    command = shlex.join(["python", "benchmarks/topk_bounds.py", *asked])
    page = {
        "command": command,
        "student": config.student,
        "teacher": config.teacher,
        "vocabulary": student.shape[-1],
        "temperature": config.temperature,
        "budget": config.budget,
        "completions": len(rollout),
        "tokens": int(rollout.mask.sum()),
        "rows": table,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    name = "bounds" if config.recipe == "quickstart" else f"bounds-{Path(config.recipe).stem}"
    write_json(FOLDER / f"{name}.json", page)
    title = f"{config.student} beside {config.teacher}, {len(rollout)} completions: {command}"
    draw(FOLDER / "plots" / f"{name}.png", title, table, float(config.budget))
    for row in table:
        print(json.dumps(row))


if __name__ == "__main__":
    main()

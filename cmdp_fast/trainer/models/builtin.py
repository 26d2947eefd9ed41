"""The recipes' own teacher and students: tiny Llamas that add a few numbers, made on the first run.

`builtin:arithmetic-teacher` is trained on careful solutions only, "3+4=7;7+2=9;A9.": each step, then the answer.
`builtin:arithmetic-student` is smaller and is warmed up on few problems and on a mixture of habits, as a pre-trained
model has: careful, the answer without its steps, and a step that goes wrong. It *can* do the arithmetic, which
reinforcement learning could not teach it in minutes, but it does not know which habit is wanted.
`builtin:arithmetic-shortcut-student` knows all training problems and seldom slips: its answers without steps are mostly
right, so that a reward that likes brevity tempts it to skip them.
The models of the studies (`recipes/studies/`) have what a situation needs: a teacher that is not sure, one that is
wrong in one respect, students that are smaller or larger, other shortcuts.

All see training problems only, never held-out ones, and are kept in a cache folder named after a hash of everything
that went into them.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cmdp_fast.errors import InputError
from cmdp_fast.nearest import did_you_mean

from ..records.report import Report
from ..settings.config import TrainConfig
from ..tasks.data import Problem
from ..tasks.sums import worked_solution
from .cache import cache_dir, made_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1  # raise it when the models made here change, so that old caches are left alone


@dataclass(frozen=True)
class Recipe:
    """How a built-in model is made."""

    layers: int
    steps: int
    habits: dict[str, float]
    """The share of each of `sums.HABITS` in the solutions that it reads."""
    problems: int = 10_000
    """How many of the training problems are used."""
    habits_of_short: dict[str, float] = field(default_factory=dict)
    """The same for sums of up to three terms; empty: as for all."""
    width: int = 96
    heads: int = 4
    batch: int = 64
    learning_rate: float = 2e-3
    seed: int = 0


TEMPTED = {"careful": 0.5, "direct": 0.4, "slip": 0.1}

RECIPES = {
    "builtin:arithmetic-teacher": Recipe(3, 500, {"careful": 1.0}),
    "builtin:arithmetic-student": Recipe(2, 900, {"careful": 0.4, "direct": 0.3, "slip": 0.3}, problems=500),
    "builtin:arithmetic-shortcut-student": Recipe(2, 1500, TEMPTED),
    "builtin:study-small-student": Recipe(2, 1500, TEMPTED, width=48),
    "builtin:study-large-student": Recipe(4, 1500, TEMPTED, width=128),
    "builtin:study-unsure-teacher": Recipe(3, 800, {"careful": 0.9, "direct": 0.1}),
    "builtin:study-patient-teacher": Recipe(3, 1200, {"careful": 1.0}),
    "builtin:study-brief-teacher": Recipe(3, 1500, {"direct": 1.0}),
    "builtin:study-bare-student": Recipe(2, 1500, {"direct": 0.4, "bare": 0.3, "careful": 0.3}),
    "builtin:study-merging-student": Recipe(2, 1500, {"careful": 0.5, "merged": 0.4, "slip": 0.1}),
    "builtin:study-mixed-teacher": Recipe(3, 800, {"careful": 1.0}, habits_of_short={"careful": 0.97, "direct": 0.03}),
    "builtin:study-mixed-student": Recipe(
        2, 1500, {"careful": 0.9, "slip": 0.1}, habits_of_short={"careful": 0.5, "direct": 0.5}
    ),
    "builtin:study-faulty-teacher": Recipe(3, 800, {"faulty": 0.9, "careful": 0.1}),
    "builtin:study-faulty-student": Recipe(2, 1500, {"faulty": 0.4, "careful": 0.2, "direct": 0.3, "slip": 0.1}),
}


def builtin_folder(name: str, config: TrainConfig, train: Sequence[Problem], report: Report) -> Path:
    """The folder with a built-in model for this task, made now if it is not in the cache, or not as it was made."""
    if name not in RECIPES:
        raise InputError(f"there is no model {name}, only {' and '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
    if not all("expression" in row.get("metadata", {}) and isinstance(row["prompt"], str) for row in train):
        raise InputError(f"{name} only learns reasoning-gym tasks that are sums (basic_arithmetic, chain_sum)")
    recipe = RECIPES[name]
    task = [config.task, config.task_args, config.task_size, config.prompt_template, config.holdout_fraction]
    settings = json.dumps([FORMAT, asdict(recipe), task], sort_keys=True)
    label = name.removeprefix("builtin:")
    folder = cache_dir() / f"{label}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"

    def make(part: Path) -> None:
        _make(recipe, train, part, report, f"first run: training the {label}")
        (part / "settings.json").write_text(settings)

    return made_once(folder, make, report.say)


def _habits(recipe: Recipe, expressions: Sequence[str], rng: random.Random) -> list[str]:
    """A habit for each sum."""

    def drawn(shares: dict[str, float]) -> list[str]:
        return rng.choices(list(shares), weights=list(shares.values()), k=len(expressions))

    habits = drawn(recipe.habits)
    if not recipe.habits_of_short:
        return habits
    terms = (len(re.findall(r"[0-9]+", expression)) for expression in expressions)
    of_short = drawn(recipe.habits_of_short)
    return [short if count <= 3 else other for count, short, other in zip(terms, of_short, habits, strict=True)]


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a character, spaces dropped; "." ends a solution."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set("".join(texts)) - {" ", "."})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", ".", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token=".", padding_side="left"
    )


def _make(recipe: Recipe, train: Sequence[Problem], folder: Path, report: Report, description: str) -> None:
    """Trains a model on the cross-entropy of solutions and saves it with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer([row["prompt"] for row in train] + ["0123456789+-=;A"])
    rng = random.Random(recipe.seed)
    problems = sorted(train, key=lambda row: row["prompt"])
    problems = rng.sample(problems, min(recipe.problems, len(problems)))
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=recipe.width,
                intermediate_size=3 * recipe.width,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
        )
        for _ in report.track(range(recipe.steps), description):
            batch = rng.choices(problems, k=recipe.batch)
            habits = _habits(recipe, [row["metadata"]["expression"] for row in batch], rng)
            prompts = [tokenizer.encode(row["prompt"]) for row in batch]
            solutions = [
                tokenizer.encode(worked_solution(row["metadata"]["expression"], habit, rng) + ".")
                for row, habit in zip(batch, habits, strict=True)
            ]
            width = max(len(p) + len(s) for p, s in zip(prompts, solutions, strict=True))
            ids = torch.full((recipe.batch, width), tokenizer.pad_token_id)
            labels = torch.full((recipe.batch, width), -100)
            for i, (p, s) in enumerate(zip(prompts, solutions, strict=True)):
                ids[i, : len(p) + len(s)] = torch.tensor(p + s)
                labels[i, len(p) : len(p) + len(s)] = torch.tensor(s)
            loss = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

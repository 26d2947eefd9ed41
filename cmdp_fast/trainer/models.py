"""Loading the pair: student, teacher and the tokenizer that they must share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .builtin import builtin_folder
from .config import TrainConfig
from .data import Row
from .errors import InputError, first_line
from .report import Report


def load_pair(config: TrainConfig, train: Sequence[Row], report: Report) -> tuple[Any, Any, Any]:
    """(student, teacher, tokenizer), on the CPU; the teacher frozen. The student's weights are float32.

    Raises InputError if a model cannot be loaded or the tokenizers differ.
    """
    from transformers import AutoConfig, AutoTokenizer

    sources = {"student": config.student, "teacher": config.teacher}
    folders, tokenizers = {}, {}
    for role, name in sources.items():  # everything cheap before anything is trained or read
        if not name.startswith("builtin:"):
            folders[role] = name
            tokenizers[role] = _load(AutoTokenizer, role, name, AutoConfig)
    for role, name in sources.items():
        if name.startswith("builtin:"):
            folders[role] = str(builtin_folder(name, config, train, report))
            tokenizers[role] = _load(AutoTokenizer, role, folders[role])
    check_tokenizers(tokenizers["student"], tokenizers["teacher"])

    tokenizer = tokenizers["student"]
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise InputError(f"--student {config.student}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    student = _load_model("student", folders["student"], torch.float32)
    half = config.mixed_precision == "bf16"
    teacher = _load_model("teacher", folders["teacher"], torch.bfloat16 if half else torch.float32)
    # Dropout off throughout: PPO's ratio has to be 1 where the policy has not changed.
    return student.eval(), teacher.eval().requires_grad_(False), tokenizer


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Raises InputError unless a token has the same number in both: the divergence compares column by column."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = next(
        iter(sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)))
    )
    raise InputError(
        f"student and teacher must share a tokenizer, but {differing!r} is token {ours.get(differing)} of "
        f"{len(ours)} in one and {theirs.get(differing)} of {len(theirs)} in the other"
    )


def common_vocabulary(*models: Any) -> int:
    """The number of columns that all models' logits have; models of a family may pad their vocabulary differently."""
    return min(model.get_output_embeddings().weight.shape[0] for model in models)


def _load_model(role: str, name: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, role, name, dtype=dtype)


def _load(auto: Any, role: str, name: str, *also: Any, **options: Any) -> Any:
    try:
        for other in also:
            other.from_pretrained(name)
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        kind = "folder" if Path(name).is_dir() else "hub id or folder"
        raise InputError(f"--{role} {name}: no causal language model in this {kind}: {first_line(error)}") from error

"""A teacher with quantised weights, by transformers' own quantisation, and how far from the full one it is.

The costs of a run are then divergences from the quantised teacher. How much that changes is measured before the
training: the divergence of the one from the other on a few prompts.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import installation
from cmdp_fast.errors import InputError
from cmdp_fast.reading import rows_hidden

from ..settings.config import TrainConfig

PROMPTS = 4  # on which a quantised teacher is compared
TOKENS = 128  # of each, at most


@dataclass(frozen=True)
class Reading:
    """What a model makes of some prompts: hidden states [N, H] of their tokens, in float32, its head and these
    tokens."""

    hidden: Tensor
    head: cf.Head
    tokens: Tensor


def check_quantization(config: TrainConfig) -> None:
    """Raises InputError for a quantised teacher whose package is missing, or that cannot be what the settings want."""
    name = config.teacher_quantization
    if not name:
        return
    package = name.partition("-")[0]
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"--teacher-quantization {name} needs {package}, of the extra: {installation.extra('quantization')}"
        )
    if config.teacher_device == "offload":
        raise InputError(
            f"--teacher-quantization {name}: its weights stay where they are, without --teacher-device offload"
        )
    if config.lora_rank and config.student == config.teacher:
        raise InputError(
            f"--teacher-quantization {name}: with --lora-rank a teacher that is the student shares its weights"
        )


def quantization_config(name: str) -> Any:
    """transformers' configuration of a name of `teacher_quantization`; the head and the embedding are left as they
    are."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "bitsandbytes-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "bitsandbytes-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@torch.no_grad()
def read_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> Reading:
    """What a model makes of the first prompts' last tokens, on the host."""
    rows = [list(ids[-TOKENS:]) for ids in prompts[:PROMPTS]]
    hidden = rows_hidden(model, rows, [len(row) for row in rows])
    head = cf.head_of(model)
    bias = None if head.bias is None else head.bias.float().cpu()
    head = head._replace(weight=head.weight.float().cpu(), bias=bias)
    return Reading(hidden.float().cpu(), head, torch.tensor([*itertools.chain(*rows)]))


def effect(quantised: Reading, full: Reading) -> str:
    """A line that says how far the quantised teacher is from the full one."""
    stats = cf.linear_token_stats(quantised.hidden, quantised.head, full.hidden, full.head, full.tokens)
    forward, reverse = stats.forward_kl, stats.reverse_kl
    return (
        f"the quantised teacher is {float(reverse.mean()):.2g} nats a token from the full one (KL(quantised‖full), "
        f"{float(forward.mean()):.2g} the other way, {float(reverse.max()):.2g} at most; {len(reverse)} tokens of "
        "prompts): costs are divergences from the quantised one"
    )

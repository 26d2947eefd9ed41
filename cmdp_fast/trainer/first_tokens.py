"""A model's first tokens, before any work.

What its files say may be what no model can go on with, such as layers of a kind that it does not have or an encoder
beside it. transformers makes it all the same, and fails where it reads or goes on with a text: so that is tried with a
token, where the model will be used. It takes as long as a few tokens do, draws no random number and leaves nothing
behind.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import torch

from cmdp_fast.errors import InputError
from cmdp_fast.heads import evaluating
from cmdp_fast.reading import completion_logits

from .models.failing import failing_in_a_line
from .rollout import Rollout, Sampling, generate
from .settings.config import TrainConfig


def check_first_tokens(
    config: TrainConfig, models: Mapping[str, Any], sampling: Sampling, sampled: Container[str], synced: bool = False
) -> None:
    """Raises InputError for one of the models, by its role, that fails as it reads a token, whose logits there are no
    numbers, or, if it is ``sampled``, that cannot go on from there.

    Models without parameters, a student with its adapter off, are not asked. With FSDP (``synced``) every process must
    call it.
    """
    for role, model in models.items():
        if next(model.parameters(), None) is None:
            continue
        with evaluating(model), failing_in_a_line(role, getattr(config, role), model):
            if not _says_numbers(model, sampling):
                raise InputError(
                    f"the {role} cannot be used: logits of {type(model).__name__} are not finite at a first token; its "
                    "weights or a number in its config.json are damaged"
                )
            if role in sampled:
                two = replace(sampling, temperature=0.0, max_new_tokens=2, batch_size=0, stop_strings=())
                generate(model, [[sampling.pad]], two, synced_gpus=synced)


def _says_numbers(model: Any, sampling: Sampling) -> bool:
    """Whether a model's logits are numbers; those of columns that it excludes may be minus infinity."""
    device = next(model.parameters()).device
    ids, real = (torch.full((1, 2), value, device=device) for value in (sampling.pad, True))
    parts = (ids[:, :1], real[:, :1], ids[:, 1:], real[:, 1:])
    logits = completion_logits(model, Rollout(*parts, finished=real[:, -1]))
    return not bool((logits.isnan() | logits.isposinf()).any())

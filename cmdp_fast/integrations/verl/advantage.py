"""The advantage estimator `cmdp`: the worth of each token under the modified reward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from cmdp_fast.constraint import Constraint
from cmdp_fast.credit import constrained_advantage
from cmdp_fast.errors import InputError

from .config import constraint_of

_charged: ContextVar[tuple[Tensor, Constraint] | None] = ContextVar("costs and constraint of the batch", default=None)


@contextmanager
def charging(cost: Tensor, constraint: Constraint) -> Iterator[None]:
    """Within it the estimator charges these costs [B, T] by this constraint, with the lambda of this step: verl hands
    an estimator rewards and groups, and no more."""
    token = _charged.set((cost, constraint))
    try:
        yield
    finally:
        _charged.reset(token)


@register_adv_est("cmdp")
def compute_cmdp_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | None = None,
    config: Any = None,
    cost: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T] under `algorithm.cmdp`; see `credit.constrained_advantage`.

    ``token_level_rewards`` are task rewards, ``response_mask`` is 1 at the B completions' own tokens, ``index`` holds
    the prompt's uid of each, ``config`` is verl's section `algorithm` with `cmdp` in it. The costs [B, T] in nats are
    ``cost`` or, when verl calls, those of `charging`. Raises InputError where there are none, or no uid.
    """
    charged = _charged.get() if cost is None else (cost, constraint_of(config, "algorithm"))
    if charged is None:
        raise InputError(
            "algorithm.adv_estimator=cmdp has no token costs, expected trainer.use_v1=True and "
            "trainer.v1.trainer_mode=cmdp"
        )
    if index is None:
        raise InputError("algorithm.adv_estimator=cmdp needs the prompts' uid for its baseline, the batch has none")
    with torch.no_grad():
        credit = constrained_advantage(
            token_level_rewards.float(),
            charged[0].float(),
            charged[1],
            groups=list(index),
            mask=response_mask.bool(),
            gamma=float(config.get("gamma", 1.0)),
        )
    return credit.advantage, credit.returns

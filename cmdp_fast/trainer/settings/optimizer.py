"""The optimizer and its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .ranges import NOT_NEGATIVE, POSITIVE
from .units import NAME, NUMBER, STEPS


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning rate."""

    learning_rate: Annotated[float, POSITIVE, NUMBER] = 1e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after `lr_warmup_steps`; linear and cosine would be 0 in the step after the last."""
    lr_warmup_steps: Annotated[int, NOT_NEGATIVE, STEPS] = 0
    """Steps before that of the peak, over which the learning rate rises: with 5 of them from 1/6 to 5/6 of it."""
    optim: Annotated[str, NAME] = "adamw_torch"
    """The optimizer, by transformers' name: adamw_torch, adamw_torch_fused, adamw_8bit or paged_adamw_8bit (both of
    bitsandbytes), adafactor, … The betas of Adam's kin are 0.9 and 0.95."""
    weight_decay: Annotated[float, NOT_NEGATIVE, NUMBER] = 0.0
    """The optimizer's weight decay."""
    max_grad_norm: Annotated[float, POSITIVE, NUMBER] = 1.0
    """The gradient is scaled down to this norm; a value head's by itself."""

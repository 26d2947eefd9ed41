"""The settings of a run as its files hold them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cmdp_fast.masking import masked

from .config import TrainConfig

UNRECORDED = ("random_weights",)
"""No run has them, and files from before there were these settings are compared with those of today."""
WHERE_TRUE = ("fast",)
"""For the same reason recorded only where they are on."""


def recorded(config: TrainConfig) -> dict[str, Any]:
    """The settings by name, for `config.json`, which is read again."""
    off = {name for name in WHERE_TRUE if not getattr(config, name)}
    return {name: value for name, value in asdict(config).items() if name not in UNRECORDED and name not in off}


def shared(config: TrainConfig) -> dict[str, Any]:
    """The same for what others look at, `summary.json` and trackers: masked, see masking.py."""
    values: dict[str, Any] = masked(recorded(config))
    return values

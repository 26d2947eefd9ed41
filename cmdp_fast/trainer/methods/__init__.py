"""The methods by which a student is trained: `METHODS`, the table of them, and a module for each.

The settings take their choices from the table and check themselves against it; `method.method_named` finds the class.
So the table is data and imports no method: the methods read settings, and stand above them.
"""

from __future__ import annotations

from typing import NamedTuple


class MethodEntry(NamedTuple):
    """The place of a method, and the settings that it reads."""

    implementation: str
    """Its module here and its class, as ``module:class``."""
    compares: bool = False
    """Whether it compares completions as ``--baseline`` says: within a group, or with a value head's prediction."""
    penalises: bool = False
    """Whether `--coefficient` weighs a penalty in its loss, beside a reward that keeps to no budget."""
    groups: bool = False
    """Whether it compares the completions of a group, with any ``--baseline``."""
    diverges: bool = False
    """Whether its loss is the divergence with ``--jsd-beta``."""
    on_policy: bool = True
    """Whether it samples from the student, so that a sampler may do so for it."""
    mixes: bool = False
    """Whether it samples from a mixture with ``--teacher-mix`` of the teacher."""
    stored: bool = False
    """Whether it learns from the completions of a teacher that has them stored."""


METHODS: dict[str, MethodEntry] = {
    "ppo": MethodEntry("ppo:PPO", compares=True),
    "kl_loss": MethodEntry("kl_loss:KLLoss", compares=True, penalises=True),
    "gkd": MethodEntry("gkd:GKD", diverges=True, stored=True),
    "minillm": MethodEntry("minillm:MiniLLM", groups=True, mixes=True),
    "sft": MethodEntry("off_policy:SequenceLevel", on_policy=False, stored=True),
    "kd": MethodEntry("off_policy:WordLevel", on_policy=False, stored=True),
}

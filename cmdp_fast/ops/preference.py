"""Which of the two GPU backends a call gets where both work, and why.

`cuda` serves only the operations named here; all others are triton's. No speed has been measured on a GPU: every entry
is a prediction, and says so. What is predicted faster by nothing that counts stays with triton, which is also the one of
the two that AMD's GPUs have.
"""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    backend: str  # the one that is taken
    basis: str  # "predicted", or "measured" and on what
    reason: str


CHOICES: dict[str, Choice] = {
    "token_stats": Choice("triton", "predicted", "to be filled"),
    "constrained_reward": Choice("triton", "predicted", "to be filled"),
    "budget_trace": Choice("triton", "predicted", "to be filled"),
    "modified_reward": Choice("triton", "predicted", "to be filled"),
}


def gpu_backends(operation: str) -> tuple[str, ...]:
    """The backends that have kernels for an operation, the preferred one first."""
    if operation not in CHOICES:
        return ("triton",)
    first = CHOICES[operation].backend
    return first, "triton" if first == "cuda" else "cuda"

"""Which of the two GPU backends a call gets where both work, and why.

`cuda` serves only the operations named here; all others are triton's. No speed has been measured on a GPU: every entry
is a prediction, and says so. What is predicted faster by nothing that counts stays with triton, which is also the one
of the two that AMD's GPUs have.
"""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    backend: str  # the one that is taken
    basis: str  # "predicted", or "measured" and on what
    reason: str


# One backend for all: constrained_reward promises bitwise what the other three give in turn. The passes over the logits
# are bound by memory with either on A100, H100, H200 and B200; instructions a column of the statistics (bfloat16) are
# 16.0 for triton and 16.2 for cuda (15.0 where no reference rises) on sm_90, 13.4 and 16.2 on sm_100
# (`python benchmarks/static_gpu.py`). What speaks for cuda is one launch fewer and nothing to compile at run time.
CHOICES: dict[str, Choice] = {
    "token_stats": Choice("triton", "predicted", "both bound by memory; triton has fewer instructions on sm_100"),
    "constrained_reward": Choice("triton", "predicted", "as token_stats; cuda saves one launch"),
    "budget_trace": Choice("triton", "predicted", "as token_stats; triton adds in parallel, cuda token after token"),
    "modified_reward": Choice("triton", "predicted", "as token_stats; alike"),
}


def gpu_backends(operation: str) -> tuple[str, ...]:
    """The backends that have kernels for an operation, the preferred one first."""
    if operation not in CHOICES:
        return ("triton",)
    first = CHOICES[operation].backend
    return first, "triton" if first == "cuda" else "cuda"

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
    # `python benchmarks/static_gpu.py --dtype bfloat16 --vocab 151936`: both are bound by memory on A100, H100, H200 and
    # B200, so neither is predicted faster; on sm_100 Triton's code is the shorter, 13.4 instructions a column to 16.2.
    "token_stats": Choice("triton", "predicted", "both bound by memory; Triton's loop is the shorter on sm_100"),
    # One launch instead of two, and the scan of a sequence runs while other sequences are still read.
    "constrained_reward": Choice("cuda", "predicted", "one launch instead of two, the scans behind other rows' reads"),
    # Triton adds in parallel within a chunk of 1024 tokens, the CUDA kernel one token after another.
    "budget_trace": Choice("triton", "predicted", "adds in parallel"),
    "modified_reward": Choice("triton", "predicted", "nothing that counts"),
}


def gpu_backends(operation: str) -> tuple[str, ...]:
    """The backends that have kernels for an operation, the preferred one first."""
    if operation not in CHOICES:
        return ("triton",)
    first = CHOICES[operation].backend
    return first, "triton" if first == "cuda" else "cuda"

"""Which of the two GPU backends a call gets where both work, and why.

`cuda` has kernels for the operations named here only; all others are triton's. No speed has been measured on a GPU:
every entry is a prediction, and says so. Instructions are those of the main loop for a column of both models, bfloat16,
151936 columns, sm_90: of triton as `python benchmarks/static_gpu.py --arch 90` counts them, of cuda counted likewise.

The entries are of one mind, because `constrained_reward` promises bitwise what its parts give in turn, and the backends
add in different orders.
"""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    backend: str  # the one that is taken
    basis: str  # "predicted", or "measured" and on what
    reason: str


CHOICES: dict[str, Choice] = {
    "token_stats": Choice(
        "cuda",
        "predicted",
        "for many rows the same: both loops wait for memory, at 16.2 instructions a column forward and 16.1 backward "
        "where triton takes 16.0 and 17.0. For few rows one launch in place of two, and none by Triton's launcher.",
    ),
    "constrained_reward": Choice(
        "cuda",
        "predicted",
        "the loop of token_stats, and one launch in place of two: rows are finished by the blocks that have folded "
        "them, where triton's second kernel leaves all rows of a sequence to one program.",
    ),
    "budget_trace": Choice(
        "cuda",
        "predicted",
        "goes with constrained_reward. On its own it is predicted slower for sequences of many hundred tokens, whose "
        "sum one thread makes in order, as the CPU does, and triton in parallel; beside the logits of as many tokens "
        "that is nothing.",
    ),
    "modified_reward": Choice("cuda", "predicted", "goes with constrained_reward; both read and write a token once."),
}


def gpu_backends(operation: str) -> tuple[str, ...]:
    """The backends that have kernels for an operation, the preferred one first."""
    if operation not in CHOICES:
        return ("triton",)
    first = CHOICES[operation].backend
    return first, "triton" if first == "cuda" else "cuda"

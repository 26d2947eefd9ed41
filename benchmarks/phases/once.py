"""Every kernel of a backend once, as a program of its own: `python -m phases.once BACKEND ROWS VOCAB DTYPE [PART]`.

compute-sanitizer and ncu look at it. PART is `all` (default), `logits` (statistics and mixture alone, forward and
backward) or `linear`.
"""

from __future__ import annotations

import sys

import torch

from phases.checks import DTYPES
from phases.operations import Batch


def main(backend: str, rows: str, vocab: str, dtype: str, part: str = "all") -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    height, width = int(rows), int(vocab)
    if part != "all":
        batch = Batch(height, width, DTYPES[dtype], device)
        if part == "linear":
            batch.linear(backend, 1536)
        else:
            batch.statistics(backend)
            batch.mixture(backend)
    else:
        Batch(height, width, DTYPES[dtype], device, masked=True).all(backend)
        Batch(height - 1, width - 3, DTYPES[dtype], device, storage=width + 5).all(backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main(*sys.argv[1:])

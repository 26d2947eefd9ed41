"""The worked example of the mathematics as tensors [1, T]."""

from __future__ import annotations

import math

import torch
from exact import vectors
from torch import Tensor

EXAMPLE = vectors("worked_example")


def row(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


COST, TASK = row(EXAMPLE["cost"]), row(EXAMPLE["task_reward"])
MASK = torch.tensor([[False, True, True, False, True, True, True, False]])


def spread(values: Tensor, fill: float = math.nan) -> Tensor:
    """The example's five tokens among three masked ones that hold ``fill``."""
    return torch.full(MASK.shape, fill, dtype=values.dtype).masked_scatter(MASK, values)
